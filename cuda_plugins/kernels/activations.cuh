// Activation functions without branches or divisions, by the GPU's approximations of 2^x (to 2^-22.5) and 1 / x (to an ulp).
//
// What is off is off by less than the roundings of the reference's own steps, next to the largest of a row:
// tests/plugins/test_approximations.py evaluates them like here for all float16 and bfloat16.
#pragma once

#include "reduction.cuh"
#include "rounding.cuh"

namespace qpass {

enum Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu, kRelu2, kSigmoid };

__device__ __forceinline__ float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + 2^x): a sigmoid of -x ln 2. An infinite 2^x gives 0.
__device__ __forceinline__ float inverse_of_1_and_exp2(float x) {
  return inverse_approximately(1.f + exp2_approximately(x));
}

constexpr float kLog2E = 1.44269504f;

// x erfc(-x / sqrt(2)) / 2 = max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2, where log2 of the last factor is close to a polynomial
// of |x|: that is off by 9e-9 of |x| erfc(...) at most, and falls to below 2^-150 before 100.
__device__ __forceinline__ float gelu(float x) {
  const float size = fminf(fabsf(x), 100.f);  // infinity * 0 is no number
  float p = -1.90206572e-06f;
  p = fmaf(p, size, 2.80569420e-05f);
  p = fmaf(p, size, -1.31473222e-04f);
  p = fmaf(p, size, -2.72075738e-04f);
  p = fmaf(p, size, 7.24542141e-03f);
  p = fmaf(p, size, -5.26276119e-02f);
  p = fmaf(p, size, -4.59162146e-01f);
  p = fmaf(p, size, -1.15111101e+00f);
  p = fmaf(p, size, -1.f);
  return fmaf(-size, exp2_approximately(p), Max()(x, 0.f));
}

template <int V>
__device__ __forceinline__ void activate(float (&v)[V], int activation) {
  auto each = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = f(v[i]);
  };
  constexpr float kTanh = -2 * 0.79788456f * kLog2E;  // 1/2 + tanh(y) / 2 = 1 / (1 + e^-2y)
  switch (activation) {  // once a pack: the same for all elements, but all at once would take registers
    case kGelu: return each([](float x) { return gelu(x); });
    case kGeluTanh:
      return each([=](float x) { return x * inverse_of_1_and_exp2(x * fmaf(x * x, kTanh * 0.044715f, kTanh)); });
    case kQuickGelu: return each([](float x) { return x * inverse_of_1_and_exp2(x * (-1.702f * kLog2E)); });
    case kRelu: return each([](float x) { return Max()(x, 0.f); });
    case kSilu: return each([](float x) { return x * inverse_of_1_and_exp2(x * -kLog2E); });
    case kRelu2:
      return each([](float x) {
        const float positive = Max()(x, 0.f);
        return positive * positive;
      });
    default: return each([](float x) { return inverse_of_1_and_exp2(x * -kLog2E); });
  }
}

}  // namespace qpass
