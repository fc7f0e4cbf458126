// Layernorm, Rmsnorm, LayernormQuantization and RmsnormQuantization.
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

class Norm : public Op {
 public:
  Norm(const char* name, bool rms, bool quantized)
      : Op(name, fields_(quantized), inputs_(quantized), outputs_(quantized)), rms_(rms) {}

  int run(const Call& call, cudaStream_t stream) const override {
    const Tensor& x = *call.in("x");
    const Tensor& result = *(call.out("q") ? call.out("q") : call.out("y"));
    const Tensor* residual = call.in("residual");
    qpass_norm_args args{};
    args.type = x.type;
    args.rms = rms_;
    args.epsilon = call.number("epsilon");
    args.rows = result.rows();
    args.k = x.last();
    args.x = x.data;
    args.residual = residual ? residual->data : nullptr;
    args.x_rows = rows_of(x, result);
    if (residual) args.residual_rows = rows_of(*residual, result);
    args.gamma = call.read<void>("gamma");
    args.beta = call.read<void>("beta");
    args.sum = call.write<void>("sum");
    args.result = quantized_of(call);
    return qpass_norm(&args, stream);
  }

 private:
  static std::vector<Field> fields_(bool quantized) {
    std::vector<Field> fields = {{"epsilon", true}, {"has_residual"}, {"has_beta"}};
    if (quantized) add_quantized_fields(fields);
    fields.push_back({"has_sum"});
    return fields;
  }

  static std::vector<Slot> inputs_(bool quantized) {
    std::vector<Slot> slots = {
        {"x", Kind::kT, "... K"},
        {"residual", Kind::kT, "~... K", {"has_residual"}},
        {"gamma", Kind::kT, "K"},
        {"beta", Kind::kT, "K", {"has_beta"}},
    };
    if (quantized) add_quantized_inputs(slots);
    return slots;
  }

  static std::vector<Slot> outputs_(bool quantized) {
    std::vector<Slot> slots;
    if (quantized) add_quantized_outputs(slots);
    else slots.push_back({"y", Kind::kT, "... K"});
    slots.push_back({"sum", Kind::kT, "... K", {"has_sum"}});
    return slots;
  }

  const bool rms_;
};

template <bool kRms, bool kQuantized>
const Op& norm(const char* name) {
  static const Norm op(name, kRms, kQuantized);
  return op;
}

}  // namespace

const Op& layernorm() { return norm<false, false>("Layernorm"); }
const Op& rmsnorm() { return norm<true, false>("Rmsnorm"); }
const Op& layernorm_quantization() { return norm<false, true>("LayernormQuantization"); }
const Op& rmsnorm_quantization() { return norm<true, true>("RmsnormQuantization"); }

}  // namespace qpass
