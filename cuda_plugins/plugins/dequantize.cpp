// Dequantize and DequantizeWeight.
#include "op.h"

namespace qpass {
namespace {

class Dequantize : public Op {
 public:
  using Op::Op;

  int run(const Call& call, cudaStream_t stream) const override {
    const Tensor &q = *call.in("q"), &scale = *call.in("scale");
    qpass_dequantize_args args{};
    args.type = call.out("x")->type;
    args.rows = q.rows();
    args.k = q.last();
    args.q = static_cast<const int8_t*>(q.data);
    args.scale = static_cast<const float*>(scale.data);
    args.per_token = scale.rank == q.rank && scale.rows() == q.rows();
    args.x = call.write<void>("x");
    return qpass_dequantize(&args, stream);
  }
};

class DequantizeWeight : public Op {
 public:
  using Op::Op;

  int run(const Call& call, cudaStream_t stream) const override {
    const Tensor& w = *call.out("w");
    qpass_dequantize_weight_args args{};
    args.type = w.type;
    args.rows = w.rows();
    args.k = w.last();
    args.weight = call.read<int8_t>("weight");
    args.int4 = call.attribute("weight_type_id") == 2;
    args.group_size = call.attribute("group_size");
    args.scale = call.read<float>("scale");
    args.zero = call.read<int8_t>("zero");
    args.w = w.data;
    return qpass_dequantize_weight(&args, stream);
  }
};

}  // namespace

const Op& dequantize() {
  static const Dequantize op(
      "Dequantize", {{"output_type"}},
      {{"q", Kind::kInt8, "... K"}, {"scale", Kind::kFloat32, "... 1 | 1"}},
      {{"x", Kind::kOutputType, "... K"}});
  return op;
}

const Op& dequantize_weight() {
  static const char* grouped = "... N K/group_size";
  static const Shape scales("group_size", {{0, "... N"}, {32, grouped}, {64, grouped}, {128, grouped}});
  static const DequantizeWeight op(
      "DequantizeWeight", {{"output_type"}, {"weight_type_id"}, {"group_size"}, {"has_zero"}},
      {
          {"weight", Kind::kInt8, {"weight_type_id", {{1, "... N K"}, {2, "... N K/2"}}}},
          {"scale", Kind::kFloat32, scales},
          {"zero", Kind::kInt8, scales, {"has_zero"}},
      },
      {{"w", Kind::kOutputType, "... N K"}});
  return op;
}

}  // namespace qpass
