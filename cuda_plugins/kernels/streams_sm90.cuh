// Products on Hopper whose operands stream through shared memory, a stage of K at a time: who has which tile, how stages get there, and
// how sums leave. Channels are rows of what is multiplied, tokens columns. Where tiles are fewer than multiprocessors, K is split among
// blocks, whose sums a second kernel adds up, in the same order every time.
//
// A shape S says: kChannels × kTokens of a tile; kCluster blocks that share what they copy of the tokens; of a stage, kRowBytes of a
// weight's row, which is its box; kBoxes boxes of kBoxBytes of a token's, neighbours in its row, of kPlanes matrices one below the
// other; kSideBytes for what else a stage needs.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "hopper.cuh"
#include "launch.cuh"
#include "vectors.cuh"

namespace qpass {

struct Streams {
  TensorMap weights, tokens;
  int m, n, k;
  int splits, stages_a_split;
  bool follows;  // the tokens come of the kernel before, and nothing else that is read here does
};

constexpr int kBoxBytes = 128;  // of a token's row: what products read, swizzled

// Bytes of a block's shared memory, and where in it what lies. The ring begins at a multiple of 1024, for which there is room.
template <typename S>
struct Ring {
  static constexpr int kWeights = S::kChannels * S::kRowBytes, kBox = S::kTokens * kBoxBytes;
  static constexpr int kTokens = S::kPlanes * S::kBoxes * kBox, kStage = kWeights + kTokens + S::kSideBytes;
  // More than are needed for memory to be busy would delay what else is read: scales, or the tokens of the first stage.
  static constexpr int kMost = (227 << 10) - 1024 - 512, kFitting = kMost / kStage, kStages = kFitting < 4 ? kFitting : 4;
  static constexpr int kBytes = kStages * kStage + 1024 + kStages * 2 * int(sizeof(Barrier));
  static_assert(kStages >= 2 && S::kChannels <= 256 && S::kTokens / S::kCluster % 8 == 0);
  static_assert(kStage % 1024 == 0 && S::kSideBytes % 1024 == 0);

  __device__ __forceinline__ explicit Ring(char* start)
      : stages(start + (-address_in_shared(start) & 1023)), full(reinterpret_cast<Barrier*>(stages + kStages * kStage)),
        empty(full + kStages) {}
  __device__ __forceinline__ char* weights(int slot) const { return stages + slot * kStage; }
  __device__ __forceinline__ char* tokens(int slot) const { return weights(slot) + kWeights; }
  __device__ __forceinline__ char* side(int slot) const { return tokens(slot) + kTokens; }

  // By all threads of a block. `readers` arrive at a slot of each block that fills it once they are done with it.
  __device__ __forceinline__ void open(int readers) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) init(&full[i], 1), init(&empty[i], S::kCluster * readers);
      publish_barriers();
    }
    if constexpr (S::kCluster > 1) cluster_barrier();
    else __syncthreads();
  }
  // By all threads: nobody leaves while another block may write or arrive here.
  __device__ __forceinline__ void close() const {
    if constexpr (S::kCluster > 1) {
      __syncwarp();
      cluster_barrier();
    }
  }
  // By a warp that has read what is in a slot.
  __device__ __forceinline__ void free(int slot) const {
    __syncwarp();
    const unsigned lane = threadIdx.x % 32;
    if (lane < S::kCluster) arrive<S::kCluster>(&empty[slot], lane);
  }

  char* const stages;
  Barrier *const full, *const empty;
};

// Whose sums a product's threads have: kWarpgroups of kTiles_ * 64 channels each, all of a tile's tokens. What adds them up knows no
// more of a shape.
template <typename Out_, typename Sum_, int kWarpgroups, int kTiles_, int kTokens_, int kCluster_>
struct SumsOf {
  using Out = Out_;
  using Sum = Sum_;
  static constexpr int kTiles = kTiles_, kTokens = kTokens_, kCluster = kCluster_;
  static constexpr int kConsumers = kWarpgroups * 128, kChannels = kWarpgroups * kTiles * 64;
  static constexpr int kColumns = kTiles * kTokens / 8;  // of eight tokens that a warp has sums of
};

// Which tile a block has. Those of a few tiles of tokens follow one another, so that what they share is still in the L2 cache.
template <typename S>
struct Tile {
  static int64_t count(int64_t m, int64_t n) {
    return ceil_div(ceil_div(n, S::kChannels), S::kCluster) * S::kCluster * ceil_div(m, S::kTokens);
  }
  __device__ __forceinline__ Tile(int m, int n, int64_t block) {
    constexpr int kTogether = 8;
    const int64_t clusters_n = ceil_div(ceil_div(n, S::kChannels), S::kCluster), tiles_m = ceil_div(m, S::kTokens);
    const int64_t cluster = block / S::kCluster, group = cluster / (kTogether * clusters_n);
    const int64_t within = cluster % (kTogether * clusters_n), size = min(tiles_m - group * kTogether, int64_t(kTogether));
    m0 = int(group * kTogether + within % size) * S::kTokens;
    n0 = int(within / size * S::kCluster + block % S::kCluster) * S::kChannels;
  }
  int m0, n0;
};

// The stages that a block multiplies.
template <typename S>
struct Share {
  __device__ __forceinline__ explicit Share(const Streams& p)
      : first(blockIdx.y * p.stages_a_split), count(min(p.stages_a_split, int(ceil_div(p.k, S::kStageK)) - first)) {}
  int first, count;
};

// What every product begins with: its ring, opened for warps that read, and what of the product is the block's. By all threads.
template <typename S>
struct Block {
  __device__ __forceinline__ Block(const Streams& p, char* start, int readers)
      : ring(start), tile(p.m, p.n, blockIdx.x), share(p), warp(__shfl_sync(~0u, threadIdx.x / 32, 0)) {
    ring.open(readers);
  }
  const Ring<S> ring;
  const Tile<S> tile;
  const Share<S> share;
  const int warp;  // so that the compiler sees that lanes have the same
};

// Copies stages of both operands into the ring, by one thread. With the tokens of a stage goes what `beside(stage, slot)` copies, so
// many bytes.
template <typename S, typename Beside>
__device__ __forceinline__ void copy_stages(
    const Streams& p, const Ring<S>& ring, const Tile<S>& tile, const Share<S>& share, int bytes_beside, Beside beside) {
  const int rank = S::kCluster > 1 ? int(block_of_cluster()) : 0;
  prefetch_map(&p.weights), prefetch_map(&p.tokens);
  auto weights = [&](int i, int slot) {
    expect(&ring.full[slot], Ring<S>::kWeights + Ring<S>::kTokens + bytes_beside);
    copy_box(ring.weights(slot), &p.weights, (share.first + i) * S::kRowBytes, tile.n0, &ring.full[slot]);
  };
  auto tokens = [&](int i, int slot) {
    constexpr int kRows = S::kTokens / S::kCluster;
#pragma unroll
    for (int box = 0; box < S::kPlanes * S::kBoxes; ++box) {
      char* to = ring.tokens(slot) + box * Ring<S>::kBox + rank * kRows * kBoxBytes;
      const int x = ((share.first + i) * S::kBoxes + box % S::kBoxes) * kBoxBytes;
      const int y = tile.m0 + rank * kRows + box / S::kBoxes * p.m;
      if constexpr (S::kCluster == 1) copy_box(to, &p.tokens, x, y, &ring.full[slot]);
      else copy_box_to_all<S::kCluster>(to, &p.tokens, x, y, &ring.full[slot]);
    }
    beside(share.first + i, slot);
  };
  const int ahead = min(share.count, Ring<S>::kStages);
  if (p.follows) {
    for (int i = 0; i < ahead; ++i) weights(i, i);
  }
  wait_for_kernel_before();
  for (int i = 0; i < ahead; ++i) {
    if (!p.follows) weights(i, i);
    tokens(i, i);
  }
  for (int i = ahead, slot = 0, parity = 0; i < share.count; ++i) {
    wait(&ring.empty[slot], parity);
    weights(i, slot);
    tokens(i, slot);
    if (++slot == Ring<S>::kStages) slot = 0, parity ^= 1;
  }
}

// What sums are multiplied by in the end, and where they go: y [m, n] of Out.
struct Finish {
  const float* row_scale;  // of tokens: [m] with per_row, else [1]; null: 1
  const float* col_scale;  // of channels: likewise
  const void* bias;        // [n] of Out, or null
  void* y;
  bool per_row, per_column;
  void* partial;  // with more than one split, sums as lanes hold them: [splits, tiles, columns of eight tokens, threads, 4]
};

// Of a lane's channels `channel` and channel + 8.
template <typename Out>
class Epilogue {
 public:
  __device__ __forceinline__ Epilogue(const Finish& to, int m, int n, int channel) : to_(to), m_(m), n_(n), channel_(channel) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool there = channel + h * 8 < n;
      scale_[h] = to.col_scale && there ? to.col_scale[to.per_column ? channel + h * 8 : 0] : 1.f;
      bias_[h] = to.bias && there ? to_float(static_cast<const Out*>(to.bias)[channel + h * 8]) : 0.f;
    }
  }

  // Eight tokens' sums, as products leave them. By all lanes of a warp.
  __device__ __forceinline__ void put(const float (&sums)[4], int token) const {
    const int quarter = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
    float by[2] = {1.f, 1.f};
    if (to_.row_scale) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (token + quarter * 2 + i < m_) by[i] = to_.row_scale[to_.per_row ? token + quarter * 2 + i : 0];
      }
    }
    Out* const y = static_cast<Out*>(to_.y);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float value[2] = {sums[h * 2] * by[0] * scale_[h] + bias_[h], sums[h * 2 + 1] * by[1] * scale_[h] + bias_[h]};
      if constexpr (sizeof(Out) == 4) {
        const int n = channel_ + h * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int m = token + quarter * 2 + i;
          if (m < m_ && n < n_) y[int64_t(m) * n_ + n] = value[i];
        }
      } else {
        const uint32_t pair = transposed(to_bits<Out>(value).x[0]);  // now two channels of one token
        const int m = token + row, n = channel_ - row + h * 8 + quarter * 2;
        if (m < m_ && n < n_) {
          uint16_t* const at = reinterpret_cast<uint16_t*>(y + int64_t(m) * n_ + n);
          if (n_ % 2 == 0) {
            *reinterpret_cast<uint32_t*>(at) = pair;
          } else {
            at[0] = uint16_t(pair);
            if (n + 1 < n_) at[1] = uint16_t(pair >> 16);
          }
        }
      }
    }
  }

 private:
  const Finish& to_;
  const int m_, n_, channel_;
  float scale_[2], bias_[2];
};

// Where a thread's sums of eight tokens are kept until those of all splits are there; `column` counts eight tokens, by tiles of rows.
template <typename S>
__device__ __forceinline__ int64_t partial_at(int split, int64_t tiles, int64_t tile, int column) {
  return (((split * tiles + tile) * S::kColumns + column) * S::kConsumers + threadIdx.x) * 4;
}

// The first of a lane's channels among its tile's, of its warpgroup's part `t`.
template <typename S>
__device__ __forceinline__ int line_of(int warp, int t) {
  return warp / 4 * (S::kTiles * 64) + t * 64 + warp % 4 * 16 + threadIdx.x % 32 / 4;
}

// The sums of the splits, a block for eight tokens of a tile.
template <typename S>
__global__ void __launch_bounds__(S::kConsumers) add_up(const Finish to, int m, int n, int splits) {
  using Sum = typename S::Sum;
  let_next_kernel_start();
  const Tile<S> tile(m, n, blockIdx.y);
  const int t = blockIdx.x / (S::kTokens / 8), token = tile.m0 + blockIdx.x % (S::kTokens / 8) * 8;
  if (token >= m) return;
  wait_for_kernel_before();
  const Epilogue<typename S::Out> epilogue(to, m, n, tile.n0 + line_of<S>(threadIdx.x / 32, t));
  constexpr int kAtOnce = 4;
  Sum sums[4] = {};
  for (int from = 0; from < splits; from += kAtOnce) {
    Pack<Sum, 4> parts[kAtOnce];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      parts[s] = {};
      if (from + s < splits) {
        const Sum* at = static_cast<const Sum*>(to.partial) + partial_at<S>(from + s, gridDim.y, blockIdx.y, blockIdx.x);
        parts[s] = *reinterpret_cast<const Pack<Sum, 4>*>(at);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce * 4; ++j) sums[j % 4] += parts[j / 4].x[j % 4];
  }
  epilogue.put({float(sums[0]), float(sums[1]), float(sums[2]), float(sums[3])}, token);
}

// Stores a thread's sums of part t of its warpgroup's channels, all tokens, or leaves them for add_up. By all lanes of a warp.
template <typename S, typename Value>
__device__ __forceinline__ void leave(const Finish& to, const Streams& p, const Tile<S>& tile, int warp, int t, Value value) {
  using Sum = typename S::Sum;
  const Epilogue<typename S::Out> epilogue(to, p.m, p.n, tile.n0 + line_of<S>(warp, t));
#pragma unroll
  for (int j = 0; j < S::kTokens / 8; ++j) {
    if (tile.m0 + j * 8 >= p.m) break;
    if (p.splits == 1) {
      epilogue.put({float(value(j, 0)), float(value(j, 1)), float(value(j, 2)), float(value(j, 3))}, tile.m0 + j * 8);
    } else {
      const int64_t at = partial_at<S>(blockIdx.y, gridDim.x, blockIdx.x, t * (S::kTokens / 8) + j);
      *reinterpret_cast<Pack<Sum, 4>*>(static_cast<Sum*>(to.partial) + at) = {{value(j, 0), value(j, 1), value(j, 2), value(j, 3)}};
    }
  }
}

// A stage's tokens and nothing else.
struct Nothing {
  __device__ __forceinline__ void operator()(int, int) const {}
};

// Maps and splits. A part of fewer than two stages costs more to sum than it saves.
template <typename S>
cudaError_t set_up(Streams& p, const void* weights, int64_t weight_bytes, const void* tokens, int64_t token_bytes, const Device& device) {
  if (cudaError_t e = map_matrix(&p.weights, weights, p.n, weight_bytes, weight_bytes, S::kChannels, S::kRowBytes)) return e;
  if (cudaError_t e = map_matrix(&p.tokens, tokens, p.m * S::kPlanes, token_bytes, token_bytes, S::kTokens / S::kCluster, kBoxBytes)) return e;
  const int64_t stages = ceil_div(p.k, S::kStageK), at_once = std::min<int64_t>(device.multiprocessors, kMostStreaming);
  const int64_t splits = std::min({at_once / Tile<S>::count(p.m, p.n), stages / 2, kMostSplitsOfK});
  p.stages_a_split = int(ceil_div(stages, std::max<int64_t>(splits, 1)));
  p.splits = int(ceil_div(stages, p.stages_a_split));
  return cudaSuccess;
}

// Launches a product whose kernel takes `p`, which has everything but maps and splits, and adds up what it left.
template <typename S, typename Parameters>
cudaError_t launch_streaming(void (*kernel)(Parameters), Parameters p, const void* weights, int64_t weight_bytes, const void* tokens,
    int64_t token_bytes, const Device& device, OncePerDevice& allowed, cudaStream_t stream) {
  if (cudaError_t e = set_up<S>(p, weights, weight_bytes, tokens, token_bytes, device)) return e;
  auto allow = [&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Ring<S>::kBytes); };
  if (cudaError_t e = allowed(device, allow)) return e;
  const unsigned tiles = unsigned(Tile<S>::count(p.m, p.n));
  if (cudaError_t e = launch({dim3(tiles, unsigned(p.splits)), S::kThreads, Ring<S>::kBytes}, device, stream, kernel, p)) return e;
  if (p.splits == 1) return cudaSuccess;
  const Grid adding{dim3(S::kColumns, tiles), S::kConsumers};
  return launch(adding, device, stream, add_up<typename S::Sums>, p.finish, p.m, p.n, p.splits);
}

}  // namespace qpass
