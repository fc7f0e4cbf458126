// Stream-K (Osama et al., 2023, "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU"): where
// tiles are no multiple of the multiprocessors, the stages of those that are left are dealt out evenly, so that none waits for others.
//
// A tile then is of several blocks. The one that has its end stores it; those before it leave their sums in memory and raise flags, each
// warp for the warp that has the same channels. They are added in order, from the end on. Nobody waits for a block behind it, and whoever
// is waited for begins with what is waited for, so that blocks need not all be there at the same time.
#pragma once

#include <atomic>
#include <chrono>

#include "epilogue_sm90.cuh"
#include "streams_sm90.cuh"

namespace qpass {

// Where a block leaves sums: as threads hold them, by columns of eight tokens. The last block leaves none; its place has the flags.
template <typename S>
struct PartialSums {
  __device__ __forceinline__ PartialSums(const Finish& to, int block, int thread)
      : sums(static_cast<uint4*>(to.partial) + int64_t(block) * kPlace + thread),
        flag(reinterpret_cast<Flag*>(static_cast<uint4*>(to.partial) + int64_t(gridDim.x - 1) * kPlace) + block * kWarps + thread / 32) {}
  static constexpr int kWarps = S::kConsumers / 32, kPlace = S::kColumns * S::kConsumers;
  uint4* const sums;  // the thread's four of the first column; those of the next are kConsumers further on
  Flag* const flag;   // the warp's
};

// Whether a block stores a tile of which it has a piece, whose sums then are all there; else they are left. By all consumers, once the
// kernel ahead has ended.
template <typename S>
__device__ __forceinline__ bool fix_up(
    const Finish& to, const Streams& p, const Tile<S>& tile, const Pieces<S>& piece, float (&sums)[S::kTiles][S::kTokens / 2]) {
  if constexpr (S::kStreamK) {
    constexpr int kOfTile = S::kTokens / 8, kAtOnce = 4;  // columns: more on their way at once, and registers do not hold them
    static_assert(S::kColumns % kAtOnce == 0);
    const int thread = opaque(threadIdx.x);
    auto each = [&](int first, auto f) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int column = first + i;
        if (tile.m0 + column % kOfTile * 8 < p.m) f(i, column * S::kConsumers, &sums[column / kOfTile][column % kOfTile * 4]);
      }
    };
    if (piece.leaves()) {
      const PartialSums<S> left(to, blockIdx.x, thread);
#pragma unroll
      for (int column = 0; column < S::kColumns; column += kAtOnce) {
        each(column, [&](int, int at, const float* four) {
          left.sums[at] = same_bits<uint4>(Pack<float, 4>{four[0], four[1], four[2], four[3]});
        });
      }
      raise_flag(left.flag, p.stream_k.launch);
      return false;
    }
    for (int i = 1; piece.begun_by(i); ++i) {
      const PartialSums<S> left(to, int(blockIdx.x) - i * S::kCluster, thread);
      take_flag(left.flag, p.stream_k.launch);
#pragma unroll
      for (int column = 0; column < S::kColumns; column += kAtOnce) {
        uint4 more[kAtOnce];
        each(column, [&](int i, int at, const float*) { more[i] = __ldcg(left.sums + at); });
        each(column, [&](int i, int, float* four) {
          const auto of = same_bits<Pack<float, 4>>(more[i]);
#pragma unroll
          for (int c = 0; c < 4; ++c) four[c] += of.x[c];
        });
      }
    }
  }
  return true;
}

// What no other launch has: memory that flags are in may hold anything but that.
inline uint64_t new_launch() {
  static std::atomic<uint64_t> last{uint64_t(std::chrono::steady_clock::now().time_since_epoch().count()) * 0x9e3779b97f4a7c15u};
  return last.fetch_add(2, std::memory_order_relaxed) | 1;
}

// Divides a product so: whole tiles in rounds, but for the last round and what is left. Workspaces stay as large as they were: no more
// blocks than have a place there.
template <typename S>
Grid divide_by_stream_k(Streams& p, const Device& device) {
  const int64_t tiles = Tile<S>::count(p.m, p.n), stages = ceil_div(p.k, S::kStageK);
  const int64_t places = split_bytes(p.m, p.n, kMixedTokens) / (S::kChannels * S::kTokens * sizeof(float));
  const int64_t clusters = std::min({int64_t(device.multiprocessors), kMostStreaming, places}) / S::kCluster;
  const int64_t blocks = clusters * S::kCluster, whole = blocks ? std::max<int64_t>(tiles / blocks - 1, 0) * blocks : tiles;
  p.tiles = int(tiles), p.splits = 1, p.stages_a_split = int(stages);
  p.stream_k = {int(whole), 0, 0, uint32_t((int64_t(1) << 32) / stages + 1)};
  if (blocks) {
    const int64_t left = (tiles - whole) / S::kCluster * stages;
    p.stream_k.least = int(left / clusters), p.stream_k.more = int(left % clusters);
  }
  return {dim3(unsigned(blocks)), S::kThreads, Ring<S>::kBytes, dim3(S::kCluster)};
}

// Whether that is worth its while: tiles are no multiple of the blocks, which all have some stages. And whether tiles are found as StreamK
// finds them.
inline bool divides_by_stream_k(const Streams& p, const Grid& grid) {
  constexpr int kLeast = 4, kMost = 4000;
  return p.stream_k.least >= kLeast && p.stages_a_split <= kMost && p.tiles % grid.blocks.x;
}

}  // namespace qpass
