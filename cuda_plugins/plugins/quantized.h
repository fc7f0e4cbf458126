// What the ops share that quantize their own result, as qpass/ops/quantized_result.py declares it.
#pragma once

#include "op.h"

namespace qpass {

inline void add_quantized_inputs(std::vector<Slot>& slots) {
  slots.push_back({"smoother", Kind::kFloat32, "K", {"has_smoother"}});
  slots.push_back({"scale", Kind::kFloat32, "1", {"dyn_act_scaling", 1, false}});
  slots.push_back({"zero", Kind::kInt8, "1", {"has_zero"}});
}

inline void add_quantized_outputs(std::vector<Slot>& slots) {
  slots.push_back({"q", Kind::kInt8, "... K"});
  slots.push_back({"scale", Kind::kFloat32, "... 1", {"dyn_act_scaling"}});
  slots.push_back({"y", Kind::kT, "... K", {"has_y"}});
}

inline void add_quantized_fields(std::vector<Field>& fields) {
  for (const char* name : {"has_smoother", "dyn_act_scaling", "has_zero", "has_y"}) fields.push_back({name});
}

inline qpass_quantized quantized_of(const Call& call) {
  return {
      call.read<float>("smoother"),
      call.read<float>("scale"),
      call.read<int8_t>("zero"),
      call.write<int8_t>("q"),
      call.write<float>("scale"),
      call.write<void>("y"),
  };
}

}  // namespace qpass
