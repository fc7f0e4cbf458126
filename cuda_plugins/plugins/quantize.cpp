// QuantizeTensor and QuantizePerToken.
#include "op.h"

namespace qpass {
namespace {

class Quantize : public Op {
 public:
  using Op::Op;

  int run(const Call& call, cudaStream_t stream) const override {
    const Tensor& x = *call.in("x");
    qpass_quantize_args args{};
    args.type = x.type;
    args.rows = x.rows();
    args.k = x.last();
    args.x = x.data;
    args.result.smoother = call.read<float>("smoother");
    args.result.scale = call.read<float>("scale");
    args.result.zero = call.read<int8_t>("zero");
    args.result.q = call.write<int8_t>("q");
    args.result.token_scale = call.write<float>("scale");
    return qpass_quantize(&args, stream);
  }
};

}  // namespace

const Op& quantize_tensor() {
  static const Quantize op(
      "QuantizeTensor", {{"has_smoother"}, {"has_zero"}},
      {
          {"x", Kind::kT, "... K"},
          {"smoother", Kind::kFloat32, "K", {"has_smoother"}},
          {"scale", Kind::kFloat32, "1"},
          {"zero", Kind::kInt8, "1", {"has_zero"}},
      },
      {{"q", Kind::kInt8, "... K"}});
  return op;
}

const Op& quantize_per_token() {
  static const Quantize op(
      "QuantizePerToken", {{"has_smoother"}},
      {{"x", Kind::kT, "... K"}, {"smoother", Kind::kFloat32, "K", {"has_smoother"}}},
      {{"q", Kind::kInt8, "... K"}, {"scale", Kind::kFloat32, "... 1"}});
  return op;
}

}  // namespace qpass
