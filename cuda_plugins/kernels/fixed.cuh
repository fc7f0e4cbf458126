// Activations as integers of 16 bits, 256 * high + low, times a scale that kBlockK neighbours of a token share. High and low are
// planes of int8, so that int4 and int8 weights are multiplied as they are, by exact integer sums. Two instructions make eight int4
// operands, where 16-bit floats would take thirteen.
#pragma once

#include "reduction.cuh"
#include "rounding.cuh"

namespace qpass {

constexpr int kBlockK = 128;
constexpr int kFixedV = 8, kFixedLanes = kBlockK / kFixedV;  // values a lane has, neighbours; lanes that share a block

// As a type of activations.
struct Fixed {
  int8_t code;
};

struct FixedCodes {
  uint2 high, low;  // of eight values: beside int4 weights in the order 0, 2, 4, 6, 1, 3, 5, 7, that of a word's low and high nibbles
  float scale;      // of the block
  int sum;          // of the eight integers
};

struct FixedScale {
  float inverse;  // what values are multiplied by to be integers
  float scale;    // and integers, in the end; no number where a value is none, or infinite
};

// Of a block whose largest value is this.
template <bool kInt4>
__device__ __forceinline__ FixedScale fixed_scale(float largest) {
  constexpr float kLargest = 127 * 256 + 127, kLeast = 1e-33f;  // below kLeast, the reciprocal would be infinite
  const bool counts = largest > kLeast && isfinite(largest);
  const float scale = largest * (1 / kLargest);
  const float inverse = inverse_approximately(scale);  // an ulp off, or two: what is kLargest at most is int8 still
  // int4 weights are multiplied as sixteen times what they are
  return {counts ? inverse : 0.f, isfinite(largest) ? counts ? scale * (kInt4 ? 1 / 16.f : 1.f) : 0.f : NAN};
}

template <bool kInt4>
__device__ __forceinline__ FixedCodes fixed_codes(const float (&value)[kFixedV], const FixedScale& by) {
  // in the last bits of this, integers count: 128 more, so that their upper byte is rounded, and the lower 128 off
  constexpr float kPower = 3 << 22;
  uint32_t code[kFixedV];
  FixedCodes codes{};
#pragma unroll
  for (int i = 0; i < kFixedV; ++i) {
    code[i] = __float_as_uint(fmaf(value[i], by.inverse, kPower + 128));
    codes.sum += int(code[i] - (__float_as_uint(kPower) + 128));
  }
  uint32_t high[2], low[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    auto of = [&](int j) { return code[kInt4 ? j * 2 + i : i * 4 + j]; };
    const uint32_t first = __byte_perm(of(0), of(1), 0x5410), second = __byte_perm(of(2), of(3), 0x5410);
    low[i] = __byte_perm(first, second, 0x6420) ^ 0x80808080u, high[i] = __byte_perm(first, second, 0x7531);
  }
  codes.high = {high[0], high[1]}, codes.low = {low[0], low[1]};
  codes.scale = by.scale;
  return codes;
}

// By all lanes of a warp together, kFixedLanes of which share a block.
template <bool kInt4>
__device__ __forceinline__ FixedCodes to_fixed(const float (&value)[kFixedV]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kFixedV; ++i) largest = Max()(largest, fabsf(value[i]));
#pragma unroll
  for (int step = kFixedLanes / 2; step; step /= 2) largest = Max()(largest, __shfl_xor_sync(~0u, largest, step));
  return fixed_codes<kInt4>(value, fixed_scale<kInt4>(largest));
}

// What `lanes` neighbouring lanes have, a power of two, in each of them.
__device__ __forceinline__ int sum_of_lanes(int value, int lanes) {
  for (int step = 1; step < lanes; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

}  // namespace qpass
