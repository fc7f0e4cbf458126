// CUTLASS's names for the element types.
#pragma once

#include <cutlass/numeric_types.h>

#include "types.cuh"

namespace qpass {

template <typename T>
struct CutlassType {
  using type = T;
};
template <>
struct CutlassType<half> {
  using type = cutlass::half_t;
};
template <>
struct CutlassType<bfloat16> {
  using type = cutlass::bfloat16_t;
};

}  // namespace qpass
