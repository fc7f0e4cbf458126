// What the matrix-multiplying ops share inside the library: one product with scales in its epilogue, by the best kernel there is
// for the GPU and the shape.
#pragma once

#include <algorithm>

#include "device.h"
#include "qpass_kernels.h"

namespace qpass {

// d[m, n] = (sum_k a[m, k] * b[n, k]) * row_scale * col_scale[n] (+ bias[n]); sums in int32 for int8, in float otherwise.
struct Gemm {
  qpass_type in;   // QPASS_INT8, QPASS_HALF or QPASS_BFLOAT16
  qpass_type out;  // QPASS_FLOAT, QPASS_HALF or QPASS_BFLOAT16; for half and bfloat16 inputs the same as `in`
  int64_t m, n, k;
  const void* a;  // [m, k], rows `lda` elements apart: a multiple of 16 bytes
  const void* b;  // [n, k], rows `ldb` elements apart: likewise
  int64_t lda, ldb;
  const float* row_scale;  // [m] with per_row, else [1]; null: 1
  const float* col_scale;  // [n] with per_column, else [1]; null: 1
  bool per_row, per_column;
  const void* bias;  // [n] of type `out`, or null
  void* d;           // [m, n], rows `ldd` elements apart
  int64_t ldd;
  void* workspace;   // gemm_workspace bytes, 256-byte aligned
  qpass_variant variant;  // QPASS_AUTO is QPASS_RULE here: tables are by ops
  bool follows;  // what is read but a and row_scale was there before the kernel ahead in the stream began
};

// cudaErrorNotSupported for a variant that cannot do it.
cudaError_t gemm(const Gemm& g, cudaStream_t stream);
size_t gemm_workspace(const Gemm& g);  // an upper bound for every m up to this one and every variant
cudaError_t gemm_choice(const Gemm& g, qpass_choice* choice);

// Few tokens: weights stream once through the tensor cores. Any m; by the rule it is the best for `least` and fewer. Beyond, it does a
// third (float) or a sixth (int8) of the arithmetic in a time but starts sooner than what it competes with, so that it wins while a
// product is small: that many multiplications more are done while the other gets going.
constexpr int kSkinnyTokens = 64;  // that its largest tile takes
inline int64_t skinny_tokens(int64_t n, int64_t k, double head_start, int64_t least) {
  return std::max<int64_t>(least, int64_t(head_start / (double(n) * double(k) + 1)));
}
constexpr double kHeadStartInt8 = 3.8e8;
cudaError_t skinny_int8(const Gemm& g, cudaStream_t stream);  // int8 inputs
size_t skinny_int8_workspace(const Gemm& g);

// int8 inputs on Hopper, few tokens: K split among blocks. Compiled for Hopper alone, as its other products on streams are.
#ifndef QPASS_STREAMS
#define QPASS_STREAMS QPASS_SM90A
#endif
constexpr int64_t kSplitKTokens = 64;
template <typename Out>
cudaError_t int8_sm90(const Gemm& g, const Device& device, cudaStream_t stream);

// Bytes of the sums of all splits, of four bytes each: an upper bound for every m up to this one and tiles of 256 channels × `tokens`
// or half as many × twice as many, two of which a cluster may have beside each other. Engines keep what they were built with: a library
// of a later version must not need more.
constexpr int64_t kMostStreaming = 132, kMostSplitsOfK = 16;  // blocks that K is split for; splits
constexpr int64_t kMixedTokens = 128;  // by tiles of so many the mixed product's workspace is sized
inline size_t split_bytes(int64_t m, int64_t n, int64_t tokens) {
  auto tiles = [&](int64_t channels, int64_t tokens) { return ceil_div(n, channels * 2) * 2 * ceil_div(m, tokens); };
  const int64_t most = std::max(tiles(256, tokens), tiles(128, tokens * 2));
  return size_t(std::min(kMostSplitsOfK * most, kMostStreaming) * 256 * tokens * 4);
}

// Copies rows of `bytes` bytes (any number) to rows `padded` bytes apart (a multiple of 16), zeros behind.
cudaError_t pad_rows(const void* from, void* to, int64_t rows, int64_t bytes, int64_t padded, cudaStream_t stream);

}  // namespace qpass
