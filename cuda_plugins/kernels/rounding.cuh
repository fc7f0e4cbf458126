// From floats to int8: clip(rint(y / scale) + zero, -128, 127), the quotient correctly rounded before rint, without a division
// per element.
#pragma once

#include "vectors.cuh"

namespace qpass {

// What a row's elements are rounded by.
//
// y / scale is the product with the inverse, which is held as a float and what that is off by: before its last rounding the sum
// is within 2^-22 ulp of the quotient, so that rint of it could differ from rint of the rounded quotient only where the
// quotient is that close to the middle between a half and a float beside it. There are some 3000 pairs of mantissas with
// |y / scale| < 256 of which that is true, and none of them differs (tests/plugins/test_approximations.py goes through them).
//
// This takes a normal inverse; what underflows of the rest of it is below 2^-50 of the quotient. Scales beyond 2^-100..2^100 are
// brought there, and y with them, by a power of two: what that rounds or makes infinite is far below a half or beyond what is
// clipped. A scale of zero or infinity is what every y is zero beside.
//
// A scale that was taken from the row itself leaves nothing to clip, but where it is subnormal and so off by up to a half. A
// static scale clips y, not the integer: beyond 127.25 (or -128.25) scales, less the zero point, is 127 (-128) anyway.
struct Rounding {
  float inverse, off, factor = 1, zero, low, high;

  __device__ Rounding(float given, float zero_point) : zero(zero_point) {
    float scale = given;
    const float size = fabsf(given);
    if (!(size >= 0x1p-100f && size <= 0x1p100f)) {
      const bool none = size == 0 || size == INFINITY;
      factor = none ? 0 : size < 1 ? 0x1p120f : 0x1p-100f;
      scale = none ? 1 : given * factor;
    }
    inverse = __frcp_rn(scale);
    const float rest = __fmaf_rn(-inverse, scale, 1.f);
    off = __fmul_rn(__fmaf_rn(rest, rest, rest), inverse);  // without the square one of the 3000 would differ
    const float least = (-128.25f - zero) * scale, most = (127.25f - zero) * scale;
    low = fminf(least, most);  // a scale may be negative
    high = fmaxf(least, most);
  }

  // Of the quotient, or of the product with the inverse: as good where y itself is off by as much, an ulp or two.
  //
  // The low byte of what is left in v's bits is the integer: added to 1.5 * 2^23, whose last bit counts ones, the quotient is
  // rounded to an integer, ties to even; what is added after that is exact.
  enum How { kUnclipped, kClipped, kFactored };  // the last two clip
  template <How how, bool kQuotient, int V>
  __device__ void round(float (&v)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float near = how == kFactored ? v[i] * factor : v[i];
      const float y = how == kUnclipped ? near : fminf(fmaxf(near, low), high);
      v[i] = kQuotient ? __fadd_rn(__fmaf_rn(y, inverse, __fmul_rn(y, off)), 0x1.8p23f) : __fmaf_rn(y, inverse, 0x1.8p23f);
    }
    if (how != kUnclipped && zero != 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = __fadd_rn(v[i], zero);
    }
  }
};

// 1 / x to an ulp.
__device__ __forceinline__ float inverse_approximately(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x) to an ulp: the GPU's approximation and a step of Newton's.
__device__ __forceinline__ float inverse_root(float x) {
  const float y = rsqrtf(x);
  const float better = fmaf(fmaf(-x * y, y, 1.f), 0.5f * y, y);
  return y == 0 || y == INFINITY ? y : better;
}

// v / by: correctly rounded where kExact; else to 2^-22 of it (the same tests), without the branch that the GPU's division has
// for every element.
template <bool kExact, int V>
__device__ __forceinline__ void divide(float (&v)[V], const float (&by)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = kExact ? __fdiv_rn(v[i], by[i]) : v[i] * inverse_approximately(by[i]);
}

// Divides by the same number many times: correctly rounded where kExact, else to 2^-22 of the quotient.
template <bool kExact>
struct Divisor {
  float inverse;
  Divisor() = default;
  __device__ explicit Divisor(float by) { inverse = inverse_approximately(by); }
  __device__ __forceinline__ float quotient(float y) const { return y * inverse; }
};

// Of a y with 11 bits at most: the product with the inverse is off by 1.5 ulp, what its remainder adds leaves 2^-23 ulp before the last
// rounding, and of the quotients that are so close to the middle of two floats none is rounded wrongly (the same tests). That is so
// while nothing underflows: quotients beside which `holds` says no of the largest are to be made by a division, and those by a
// divisor of which it does are no numbers.
template <>
struct Divisor<true> {
  float by, inverse;
  Divisor() = default;
  __device__ explicit Divisor(float divisor) {
    by = divisor;
    inverse = holds(fabsf(by)) ? __frcp_rn(by) : NAN;
  }
  __device__ __forceinline__ float quotient(float y) const {
    const float near = __fmul_rn(y, inverse);
    return __fmaf_rn(__fmaf_rn(-near, by, y), inverse, near);
  }
  static __device__ __forceinline__ bool holds(float size) { return size >= 0x1p-30f && size <= 0x1p30f; }
};

// amax / 127, correctly rounded: for every mantissa the correction makes it that (the same tests), where the remainder is
// normal.
__device__ __forceinline__ float scale_of(float amax) {
  const float q = __fmul_rn(amax, 1 / 127.f);
  if (!(amax >= 0x1p-100f && amax <= 0x1p126f)) return __fdiv_rn(amax, 127.f);
  return __fmaf_rn(__fmaf_rn(-q, 127.f, amax), 1 / 127.f, q);
}

// Stores the low bytes.
template <int V>
__device__ __forceinline__ void store_bytes(int8_t* to, const float (&v)[V]) {
  if constexpr (V % 4 == 0) {
    Pack<uint32_t, V / 4> words;
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      uint32_t low = __byte_perm(__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]), 0x0040);
      uint32_t high = __byte_perm(__float_as_uint(v[4 * i + 2]), __float_as_uint(v[4 * i + 3]), 0x0040);
      words.x[i] = __byte_perm(low, high, 0x5410);
    }
    *reinterpret_cast<Pack<uint32_t, V / 4>*>(to) = words;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = int8_t(__float_as_uint(v[i]));
  }
}

}  // namespace qpass
