// Products of 16-bit activations with integer weights on Hopper, for any number of tokens.
#pragma once

#include "qpass_kernels.h"
#include "types.cuh"

namespace qpass {

// y[m, n] = (sum_k x[m, k] * (weight[n, k] - zero) * scale) * row_scale[m] (+ bias[n]); x and y of one type, half or bfloat16.
// What is read of it but x and row_scale is there before the kernel ahead of it in the stream begins.
struct MixedGemm {
  qpass_type type;
  bool int4;
  int64_t m, n, k;
  const void* x;             // [m, k]
  const int8_t* weight;      // [n, k] or [n, k / 2]
  int group_size;            // 0: one scale a row
  const float* scale;
  const int8_t* zero;        // or null
  const float* row_scale;    // or null
  const float* x_scale;      // [k], or null; of fixed_gemm alone
  const void* bias;          // or null
  void* y;
  void* workspace;           // mixed_workspace bytes
};

// Whether it can be done: rows are copied from multiples of 16 bytes on, and counted in 32 bits.
bool fits_mixed(const MixedGemm& g);
// Whether K is short and every tile of 64 by 64 has a multiprocessor.
bool is_small(const MixedGemm& g, int multiprocessors);
cudaError_t mixed_gemm(const MixedGemm& g, cudaStream_t stream);
size_t mixed_workspace(int64_t m, int64_t n);  // an upper bound for every m up to this one

// Whether the product that makes floats of integers as they are, beside 17 to 64 tokens (exact_sm90.cuh), can do it. It copies what each
// channel has of scales and zero points as it copies weights, from multiples of 16 bytes on.
bool fits_exact(const MixedGemm& g);
constexpr int exact_stage(bool int4) { return int4 ? 256 : 128; }  // values of K that it has at a time
// Of n channels with `stride` bytes each, of which `unit` go with a stage: how many neighbours are copied as one row, 0 where none can be.
int rows_together(int64_t n, int64_t stride, int unit);

// 16-bit activations as Fixed (fixed.cuh). Beside int4 weights the eight values that four bytes of a weight meet come in the order 0, 2,
// 4, 6, 1, 3, 5, 7, and scales are a sixteenth. With `by_lanes`, the two halves of eight lie where a lane's are in a product of 32,
// and sums are floats.
struct FixedActivations {
  int8_t* high;  // [m, padded]; the low plane follows
  int64_t padded;
  float* scale;  // [blocks of kBlockK, side]
  int32_t* sum;  // [spans, side]
  int64_t side;
  int span;      // 32, 64 or 128
  bool by_lanes;
};

// The same of few tokens, which x is. Where it is null, they are made of g.x, times x_scale where there is one, on the way:
// cudaErrorNotSupported where that would be slower, or there is no room. Of more than 16 tokens there may be a row_scale.
cudaError_t fixed_gemm(const MixedGemm& g, const FixedActivations* x, cudaStream_t stream);

// By the type of the activations and the width of weights: each takes a while to compile.
template <typename T, bool kInt4>
cudaError_t mixed_sm90(const MixedGemm& g, const Device& device, cudaStream_t stream);
template <typename T, bool kInt4>
cudaError_t fixed_sm90(const MixedGemm& g, const FixedActivations* x, const Device& device, cudaStream_t stream);

}  // namespace qpass
