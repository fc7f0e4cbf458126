// SmoothQuantGemm.
#include "op.h"

namespace qpass {
namespace {

class SmoothQuantGemm : public Op {
 public:
  using Op::Op;

  size_t workspace(const Call& call) const override {
    qpass_smooth_quant_gemm_args args = args_of(call);
    return qpass_smooth_quant_gemm_workspace(&args);
  }

  int run(const Call& call, cudaStream_t stream) const override {
    qpass_smooth_quant_gemm_args args = args_of(call);
    return qpass_smooth_quant_gemm(&args, stream);
  }

  int choice(const Call& call, qpass_choice* choice) const override {
    qpass_smooth_quant_gemm_args args = args_of(call);
    return qpass_smooth_quant_gemm_choice(&args, choice);
  }

 private:
  static qpass_smooth_quant_gemm_args args_of(const Call& call) {
    const Tensor &q = *call.in("q"), &y = *call.out("y");
    qpass_smooth_quant_gemm_args args{};
    args.type = y.type;
    args.m = q.rows();
    args.n = y.last();
    args.k = q.last();
    args.q = static_cast<const int8_t*>(q.data);
    args.weight = call.read<int8_t>("weight");
    args.scale_a = call.read<float>("scale_a");
    args.scale_w = call.read<float>("scale_w");
    args.per_token = call.attribute("has_per_token_scaling");
    args.per_channel = call.attribute("has_per_channel_scaling");
    args.bias = call.read<void>("bias");
    args.y = y.data;
    args.workspace = call.workspace;
    args.variant = call.variant();
    return args;
  }
};

}  // namespace

const Op& smooth_quant_gemm() {
  static const SmoothQuantGemm op(
      "SmoothQuantGemm", {{"output_type"}, {"has_per_token_scaling"}, {"has_per_channel_scaling"}, {"has_bias"}},
      {
          {"q", Kind::kInt8, "... K"},
          {"weight", Kind::kInt8, "N K"},
          {"scale_a", Kind::kFloat32, {"has_per_token_scaling", {{0, "1"}, {1, "... 1"}}}},
          {"scale_w", Kind::kFloat32, {"has_per_channel_scaling", {{0, "1"}, {1, "N"}}}},
          {"bias", Kind::kOutputType, "N", {"has_bias"}},
      },
      {{"y", Kind::kOutputType, "... N"}});
  return op;
}

}  // namespace qpass
