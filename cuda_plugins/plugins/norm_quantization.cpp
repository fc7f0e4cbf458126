// LayernormQuantization and RmsnormQuantization.
#include <cstring>

#include "quantized.h"

namespace qpass {
namespace {

// How the rows of a result with the dims of `result` read `operand`, whose leading dims broadcast.
qpass_rows rows_of(const Tensor& operand, const Tensor& result) {
  qpass_rows rows{};
  bool same = operand.rank == result.rank;
  for (int i = 0; same && i + 1 < operand.rank; ++i) same = operand.dims[i] == result.dims[i];
  if (same) return rows;
  rows.rank = result.rank - 1;
  int64_t stride = 1;
  for (int i = rows.rank - 1, j = operand.rank - 2; i >= 0; --i, --j) {
    bool moves = j >= 0 && operand.dims[j] != 1;
    rows.extent[i] = result.dims[i];
    rows.stride[i] = moves ? stride : 0;
    if (j >= 0) stride *= operand.dims[j];
  }
  return rows;
}

class NormQuantization : public Op {
 public:
  NormQuantization(const char* name, bool rms) : Op(name, fields_(), inputs_(), outputs_()), rms_(rms) {}

  int run(const Call& call, cudaStream_t stream) const override {
    const Tensor &x = *call.in("x"), &q = *call.out("q");
    const Tensor* residual = call.in("residual");
    qpass_norm_quantize_args args{};
    args.type = x.type;
    args.rms = rms_;
    args.epsilon = call.number("epsilon");
    args.rows = q.rows();
    args.k = x.last();
    args.x = x.data;
    args.residual = residual ? residual->data : nullptr;
    args.x_rows = rows_of(x, q);
    if (residual) args.residual_rows = rows_of(*residual, q);
    args.gamma = call.read<void>("gamma");
    args.beta = call.read<void>("beta");
    args.sum = call.write<void>("sum");
    args.result = quantized_of(call);
    return qpass_norm_quantize(&args, stream);
  }

 private:
  static std::vector<Field> fields_() {
    std::vector<Field> fields = {{"epsilon", true}, {"has_residual"}, {"has_beta"}};
    add_quantized_fields(fields);
    fields.push_back({"has_sum"});
    return fields;
  }

  static std::vector<Slot> inputs_() {
    std::vector<Slot> slots = {
        {"x", Kind::kT, "... K"},
        {"residual", Kind::kT, "~... K", {"has_residual"}},
        {"gamma", Kind::kT, "K"},
        {"beta", Kind::kT, "K", {"has_beta"}},
    };
    add_quantized_inputs(slots);
    return slots;
  }

  static std::vector<Slot> outputs_() {
    std::vector<Slot> slots;
    add_quantized_outputs(slots);
    slots.push_back({"sum", Kind::kT, "... K", {"has_sum"}});
    return slots;
  }

  const bool rms_;
};

}  // namespace

const Op& layernorm_quantization() {
  static const NormQuantization op("LayernormQuantization", false);
  return op;
}

const Op& rmsnorm_quantization() {
  static const NormQuantization op("RmsnormQuantization", true);
  return op;
}

}  // namespace qpass
