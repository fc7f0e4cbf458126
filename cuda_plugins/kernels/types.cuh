// Element types: conversions to and from float, the choice of a template by qpass_type, and what a launch returned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"
#include "qpass_kernels.h"

namespace qpass {

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ half from_float<half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <typename T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) for the T of `type`; cudaErrorInvalidValue for another type.
template <typename F>
cudaError_t with_float_type(qpass_type type, F&& f) {
  switch (type) {
    case QPASS_FLOAT: return f(Tag<float>{});
    case QPASS_HALF: return f(Tag<half>{});
    case QPASS_BFLOAT16: return f(Tag<bfloat16>{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace qpass
