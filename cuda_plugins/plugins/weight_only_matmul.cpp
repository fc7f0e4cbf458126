// WeightOnlyQuantMatmul and WeightOnlyGroupwiseQuantMatmul.
#include "op.h"

namespace qpass {
namespace {

class WeightOnlyMatmul : public Op {
 public:
  using Op::Op;

  size_t workspace(const Call& call) const override {
    qpass_weight_only_matmul_args args = args_of(call);
    return qpass_weight_only_matmul_workspace(&args);
  }

  int run(const Call& call, cudaStream_t stream) const override {
    qpass_weight_only_matmul_args args = args_of(call);
    return qpass_weight_only_matmul(&args, stream);
  }

  int choice(const Call& call, qpass_choice* choice) const override {
    qpass_weight_only_matmul_args args = args_of(call);
    return qpass_weight_only_matmul_choice(&args, choice);
  }

 private:
  static qpass_weight_only_matmul_args args_of(const Call& call) {
    const Tensor &x = *call.in("x"), &y = *call.out("y");
    qpass_weight_only_matmul_args args{};
    args.type = x.type;
    args.m = x.rows();
    args.n = y.last();
    args.k = x.last();
    args.x = x.data;
    args.pre_quant_scale = call.read<float>("pre_quant_scale");
    args.weight = call.read<int8_t>("weight");
    args.int4 = call.attribute("weight_type_id") == 2;
    args.group_size = call.attribute("group_size");  // 0 where the op has none: per channel
    args.scale = call.read<float>("scale");
    args.zero = call.read<int8_t>("zero");
    args.bias = call.read<void>("bias");
    args.y = y.data;
    args.workspace = call.workspace;
    args.variant = call.variant();
    return args;
  }
};

const Shape kWeight("weight_type_id", {{1, "N K"}, {2, "N K/2"}});

}  // namespace

const Op& weight_only_quant_matmul() {
  static const WeightOnlyMatmul op(
      "WeightOnlyQuantMatmul", {{"weight_type_id"}, {"has_zero"}, {"has_bias"}},
      {
          {"x", Kind::kT, "... K"},
          {"weight", Kind::kInt8, kWeight},
          {"scale", Kind::kFloat32, "N"},
          {"zero", Kind::kInt8, "N", {"has_zero"}},
          {"bias", Kind::kT, "N", {"has_bias"}},
      },
      {{"y", Kind::kT, "... N"}});
  return op;
}

const Op& weight_only_groupwise_quant_matmul() {
  static const WeightOnlyMatmul op(
      "WeightOnlyGroupwiseQuantMatmul", {{"quant_algo"}, {"group_size"}, {"weight_type_id"}},
      {
          {"x", Kind::kT, "... K"},
          {"pre_quant_scale", Kind::kFloat32, "K", {"quant_algo", 4}},
          {"weight", Kind::kInt8, kWeight},
          {"scale", Kind::kFloat32, "N K/group_size"},
          {"zero", Kind::kInt8, "N K/group_size", {"quant_algo", 2}},
          {"bias", Kind::kT, "N", {"quant_algo", 1}},
      },
      {{"y", Kind::kT, "... N"}});
  return op;
}

}  // namespace qpass
