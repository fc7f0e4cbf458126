// The matrix product for few tokens: y[m, n] = sum_k x[m, k] * w[n, k], where all the time goes into reading w once.
//
// Weights are operand A of mma.sync, 16 output channels a tile, and tokens operand B, 8 a tile; so one token costs no more
// than eight. Rows of w stay as they are stored: the order of K within an mma is free as long as both operands agree on it, so
// of 4 * kRun neighbouring bytes of a row (a unit) each of the four lanes that share the row takes a run of kRun, and the
// same K of each token. A unit never spans two groups, whose partial sums are multiplied by their scales in float32. Activations of
// 16 bits come as Fixed, beside which weights are multiplied as integers. float32 activations come as three bfloat16 planes that
// add up to them, beside which integers become bfloat16 exactly, and units are summed by float32 additions: tensor cores cut off
// bits of long sums that float32 results would miss.
//
// Where n is small, K is split, too, among blocks, whose sums a second kernel adds up, in the same order every time. (Clusters that
// add up their sums in shared memory save that kernel, but not all multiprocessors take clusters: on an H200 124 of 132 hold one of
// four blocks, and what is left over for a second wave takes as long as the first.)
#pragma once

#include <algorithm>

#include "gemm.h"
#include "launch.cuh"
#include "skinny_made.cuh"
#include "skinny_math.cuh"

namespace qpass {

constexpr int kBigGpu = 132;       // multiprocessors
constexpr int kMostBlocks = 1056;  // that K is split for
constexpr int kMostSplits = 32;
constexpr int kAddingThreads = 256;

__device__ __forceinline__ void store_as(qpass_type type, void* y, int64_t i, float value) {
  if (type == QPASS_HALF) static_cast<half*>(y)[i] = from_float<half>(value);
  else if (type == QPASS_BFLOAT16) static_cast<bfloat16*>(y)[i] = from_float<bfloat16>(value);
  else static_cast<float*>(y)[i] = value;
}

__device__ __forceinline__ float load_as(qpass_type type, const void* x, int64_t i) {
  if (type == QPASS_HALF) return to_float(static_cast<const half*>(x)[i]);
  if (type == QPASS_BFLOAT16) return to_float(static_cast<const bfloat16*>(x)[i]);
  return static_cast<const float*>(x)[i];
}

// Scales and bias, once all of K is summed.
__device__ __forceinline__ void finish(const Gemm& g, int64_t m, int64_t n, float sum) {
  if (g.row_scale) sum *= g.row_scale[g.per_row ? m : 0];
  if (g.col_scale) sum *= g.col_scale[g.per_column ? n : 0];
  if (g.bias) sum += load_as(g.out, g.bias, n);
  store_as(g.out, g.d, m * g.ldd + n, sum);
}

// What is read in pieces while weights stream, or at the end, is on its way to the L2 cache from the start.
template <typename S>
__device__ __forceinline__ void prefetch_scales(const Skinny& p, int64_t n0, int64_t first, int count) {
  constexpr int kSharing = S::kThreads / S::kRows, kSector = 32;
  const int64_t n = n0 + threadIdx.x / kSharing;
  if (n >= p.g.n) return;
  if (threadIdx.x % kSharing == 0 && p.g.col_scale && p.g.per_column) prefetch(p.g.col_scale + n);
  if (threadIdx.x % kSharing == 0 && p.g.bias) prefetch(static_cast<const char*>(p.g.bias) + n * (p.g.out == QPASS_FLOAT ? 4 : 2));
  if constexpr (S::kGrouped) {
    const int64_t begin = n * p.scales + (first * S::kStageK >> p.group_shift);
    const int64_t end = min(begin + (int64_t(count) * S::kStageK >> p.group_shift), (n + 1) * p.scales);
    for (int64_t i = begin + threadIdx.x % kSharing * (kSector / 4); i < end; i += kSharing * (kSector / 4)) prefetch(p.scale + i);
    if (!p.zero) return;
    for (int64_t i = begin + threadIdx.x % kSharing * kSector; i < end; i += kSharing * kSector) prefetch(p.zero + i);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) skinny(Skinny p, int64_t blocks_n) {
  using Accumulator = typename S::Accumulator;
  extern __shared__ __align__(128) char shared[];
  let_next_kernel_start();
  if (!p.follows) wait_for_kernel_before();
  const int64_t n0 = blockIdx.x % blocks_n * S::kRows, m0 = blockIdx.x / blocks_n * (S::kTokens * 8);
  const int64_t all = ceil_div(p.g.k, S::kStageK), first = blockIdx.z * p.stages_a_split;
  const int count = int(min(p.stages_a_split, all - first));
  const Place at;
  auto channel = [&](int tile, int h) { return n0 + (at.warp * S::kTiles + tile) * 16 + h * 8 + at.row; };

  constexpr int kHeld = Held<S>::kHeld;
  int64_t scale_at[kHeld][S::kTiles][2];
  int scales_left[kHeld][S::kTiles][2];  // stages whose span is within K and whose channel within N
  if constexpr (S::kGrouped) {
#pragma unroll
    for (int i = 0; i < kHeld * S::kTiles * 2; ++i) {
      int u = i / (S::kTiles * 2), tile = i / 2 % S::kTiles, h = i % 2, span = at.quarter + u * 4;
      int64_t k = first * S::kStageK + span * S::kSpanK;
      scale_at[u][tile][h] = channel(tile, h) * p.scales + (k >> p.group_shift);
      bool there = span < S::kSpans && channel(tile, h) < p.g.n && k < p.g.k;
      scales_left[u][tile][h] = there ? int((p.g.k - k + S::kStageK - 1) / S::kStageK) : 0;
    }
  }
  const int scales_a_stage = S::kStageK >> p.group_shift;
  auto fetch_scales = [&] {
    Held<S> held = {};
    if constexpr (S::kGrouped) {
#pragma unroll
      for (int i = 0; i < kHeld * S::kTiles * 2; ++i) {
        int u = i / (S::kTiles * 2), tile = i / 2 % S::kTiles, h = i % 2;
        if (scales_left[u][tile][h]-- > 0) {
          held.scale[u][tile][h] = p.scale[scale_at[u][tile][h]];
          if (p.zero) held.zero[u][tile][h] = p.zero[scale_at[u][tile][h]];
        }
        scale_at[u][tile][h] += scales_a_stage;
      }
    }
    return held;
  };
  int row_zero[S::kTiles][2] = {};
  if (!S::kGrouped && p.zero) {
#pragma unroll
    for (int i = 0; i < S::kTiles * 2; ++i) {
      if (channel(i / 2, i % 2) < p.g.n) row_zero[i / 2][i % 2] = p.zero[channel(i / 2, i % 2)];
    }
  }

  Fetcher<S> fetcher(p, shared, n0, m0, first);
  if (p.follows) {  // the weights are there before what is multiplied by them
    for (int i = 0; i < S::kStages - 1 && i < count; ++i) fetcher.fetch_weights(i);
    prefetch_scales<S>(p, n0, first, count);
    wait_for_kernel_before();
  }
  const Maker<S> maker(p, shared, first);
  typename Maker<S>::Ahead ahead[S::kStages - 1];
  if constexpr (S::kMade) {
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) ahead[i] = maker.ask(i, count);
  }
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < count) {
      if (!p.follows) fetcher.fetch_weights(i);
      if constexpr (S::kMade) maker.put(ahead[i], i, i);
      else fetcher.fetch_tokens(i);
    }
    commit_copies();
  }
  if (!p.follows) prefetch_scales<S>(p, n0, first, count);
  if constexpr (S::kMade) ahead[0] = maker.ask(S::kStages - 1, count);
  int slot = S::kStages - 1;  // that is filled next
  auto fetch = [&](int i) {
    if (i < count) {
      fetcher.fetch_weights(slot);
      if constexpr (S::kMade) maker.put(ahead[0], i, slot);
      else fetcher.fetch_tokens(slot);
    }
    if constexpr (S::kMade) ahead[0] = maker.ask(i + 1, count);
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
    commit_copies();
  };
  Accumulator acc[S::kTiles][S::kTokens][4] = {};
  Held<S> held = fetch_scales();
  for (int i = 0; i < count; ++i) {
    wait_copies<S::kStages - 2>();
    __syncthreads();  // the stage is complete, and everyone is done with the one that is filled next
    const char* weights = shared + (slot + 1 == S::kStages ? 0 : slot + 1) * S::kStageBytes;  // the oldest
    fetch(i + S::kStages - 1);
    const Held<S> next = fetch_scales();
    if constexpr (S::kFixed) multiply_fixed<S>(p, weights, at, held, row_zero, acc);
    else multiply<S>(p, weights, at, held, row_zero, acc);
    held = next;
  }

#pragma unroll
  for (int j = 0; j < S::kTiles * S::kTokens * 4; ++j) {
    const int tile = j / (S::kTokens * 4), token = j / 4 % S::kTokens, c = j % 4;
    const int64_t n = n0 + (at.warp * S::kTiles + tile) * 16 + c / 2 * 8 + at.row, m = m0 + token * 8 + at.quarter * 2 + c % 2;
    if (n >= p.g.n || m >= p.g.m) continue;
    if (p.splits == 1) finish(p.g, m, n, float(acc[tile][token][c]));
    else static_cast<Accumulator*>(p.partial)[(blockIdx.z * p.g.m + m) * p.g.n + n] = acc[tile][token][c];
  }
}

// The sums of the splits, always in the same order. What several splits have is asked for at once.
template <typename Accumulator>
__global__ void __launch_bounds__(kAddingThreads) add_splits(Skinny p) {
  let_next_kernel_start();
  const int64_t n = int64_t(blockIdx.x) * kAddingThreads + threadIdx.x, m = blockIdx.y;
  wait_for_kernel_before();
  if (n >= p.g.n) return;
  const Accumulator* partial = static_cast<const Accumulator*>(p.partial) + m * p.g.n + n;
  constexpr int kAtOnce = 8;
  Accumulator sum = 0;
  for (int first = 0; first < p.splits; first += kAtOnce) {
    Accumulator parts[kAtOnce];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      parts[s] = first + s < p.splits ? partial[(first + s) * p.g.m * p.g.n] : 0;
    }
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) sum += parts[s];
  }
  finish(p.g, m, n, float(sum));
}

// An upper bound of the bytes that `splits` can ask for, for every m up to this one.
inline size_t partial_bytes(int64_t m, int64_t n) {
  // with more than one split there are at most kMostBlocks blocks, each of at most 128 × 64 sums
  int64_t most = int64_t(kMostBlocks) * 128 * 64 * 4;
  return size_t(std::min(most, kMostSplits * m * n * 4));
}

// Into how many parts K is split at most: a part of fewer stages costs more to sum than it saves.
template <typename S>
int64_t most_splits(const Skinny& p) {
  int64_t stages = ceil_div(p.g.k, S::kStageK);
  return std::min<int64_t>(stages / (p.g.m > kSkinnyTokens ? 6 : 2), kMostSplits);
}

template <typename S>
cudaError_t launch_skinny(Skinny p, cudaStream_t stream) {
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  const int64_t blocks = ceil_div(p.g.n, S::kRows) * ceil_div(p.g.m, S::kTokens * 8);
  const int64_t stages = ceil_div(p.g.k, S::kStageK);
  // as many as run at the same time
  int64_t splits = std::min<int64_t>(device.multiprocessors * S::kBlocks, kMostBlocks) / blocks;
  splits = std::max<int64_t>(std::min(splits, most_splits<S>(p)), 1);
  p.stages_a_split = ceil_div(stages, splits);
  p.splits = int(ceil_div(stages, p.stages_a_split));

  static OncePerDevice allowed;
  auto allow = [] { return cudaFuncSetAttribute(skinny<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes); };
  if (cudaError_t e = allowed(device, allow)) return e;
  const Grid grid{dim3(unsigned(blocks), 1, unsigned(p.splits)), S::kThreads, S::kBytes};
  if (cudaError_t e = launch(grid, device, stream, skinny<S>, p, ceil_div(p.g.n, S::kRows))) return e;
  if (p.splits == 1) return cudaSuccess;
  // tokens are few enough for y: with more than one split there are at most kMostBlocks blocks
  const Grid adding{dim3(unsigned(ceil_div(p.g.n, kAddingThreads)), unsigned(p.g.m)), kAddingThreads};
  return launch(adding, device, stream, add_splits<typename S::Accumulator>, p);
}

// Whether tiles of this size make a block for each multiprocessor of a big GPU.
template <typename S>
bool fills(const Skinny& p) {
  int64_t blocks = ceil_div(p.g.n, S::kRows) * ceil_div(p.g.m, S::kTokens * 8);
  return blocks * std::max<int64_t>(most_splits<S>(p), 1) >= kBigGpu;
}

// The tiles of tokens and channels by how many tokens there are; beyond `kSkinnyTokens` the largest that fill the GPU.
template <typename Act, bool kInt4, int kSpanK, bool kGrouped, int kPlanes>
cudaError_t skinny_by_tokens(const Skinny& p, cudaStream_t stream) {
  if constexpr (std::is_same_v<Act, Fixed>) {
    if (p.x) return launch_skinny<SkinnyShape<Act, kInt4, kSpanK, kGrouped, kPlanes, 1, 1, true>>(p, stream);
  }
  if (p.g.m <= 8) return launch_skinny<SkinnyShape<Act, kInt4, kSpanK, kGrouped, kPlanes, 1, 1>>(p, stream);
  if constexpr (std::is_same_v<Act, bfloat16>) {
    return launch_skinny<SkinnyShape<Act, kInt4, kSpanK, kGrouped, kPlanes, 2, 1>>(p, stream);
  } else {
    // two tiles of channels a warp: they share what is read of the activations, which else takes longer than the products
    using Sixteen = SkinnyShape<Act, kInt4, kSpanK, kGrouped, kPlanes, 2, 2>;
    using ThirtyTwo = SkinnyShape<Act, kInt4, kSpanK, kGrouped, kPlanes, 4, 2>;
    constexpr bool kSmallGroups = kGrouped && kSpanK < 128;  // their scales leave no registers for two
    using SixtyFour = SkinnyShape<Act, kInt4, kSpanK, kGrouped, kPlanes, 8, kSmallGroups ? 1 : 2>;
    if (p.g.m <= 16) return launch_skinny<Sixteen>(p, stream);
    const bool beyond = p.g.m > kSkinnyTokens;
    if (beyond && !fills<SixtyFour>(p) && !fills<ThirtyTwo>(p)) return launch_skinny<Sixteen>(p, stream);
    if (p.g.m <= 32 || (beyond && !fills<SixtyFour>(p))) return launch_skinny<ThirtyTwo>(p, stream);
    return launch_skinny<SixtyFour>(p, stream);
  }
}

}  // namespace qpass
