// ActivationQuantization.
#include "quantized.h"

namespace qpass {
namespace {

class ActivationQuantization : public Op {
 public:
  ActivationQuantization() : Op("ActivationQuantization", fields_(), inputs_(), outputs_()) {}

  int run(const Call& call, cudaStream_t stream) const override {
    const Tensor& x = *call.in("x");
    qpass_activation_quantize_args args{};
    args.type = x.type;
    args.activation = call.attribute("activation");
    args.rows = x.rows();
    args.k = x.last();
    args.x = x.data;
    args.up = call.read<void>("up");
    args.result = quantized_of(call);
    return qpass_activation_quantize(&args, stream);
  }

 private:
  static std::vector<Field> fields_() {
    std::vector<Field> fields = {{"activation"}, {"gated"}};
    add_quantized_fields(fields);
    return fields;
  }

  static std::vector<Slot> inputs_() {
    std::vector<Slot> slots = {{"x", Kind::kT, "... K"}, {"up", Kind::kT, "... K", {"gated"}}};
    add_quantized_inputs(slots);
    return slots;
  }

  static std::vector<Slot> outputs_() {
    std::vector<Slot> slots;
    add_quantized_outputs(slots);
    return slots;
  }
};

}  // namespace

const Op& activation_quantization() {
  static const ActivationQuantization op;
  return op;
}

}  // namespace qpass
