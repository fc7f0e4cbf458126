// int8 × int8 for few tokens on Hopper: both operands go from memory to the tensor cores without a register between, so that all there
// is to do is to keep memory busy.
#pragma once

#include "gemm.h"
#include "sums_sm90.cuh"

namespace qpass {

struct Int8Product : Streams {
  Finish finish;
  int at_once;  // blocks that the GPU runs
};

template <typename Out, int kTokens, int kWarpgroups, int kTiles>
struct Int8Shape : SumsOf<Out, int32_t, kWarpgroups, kTiles, kTokens, 1> {
  using Sums = SumsOf<Out, int32_t, kWarpgroups, kTiles, kTokens, 1>;
  static constexpr int kThreads = Sums::kConsumers + 64;
  static constexpr int kStageK = 128, kRowBytes = 128, kBoxes = 1, kPlanes = 1, kSideBytes = 0;
  static constexpr bool kStays = false;
  static constexpr int kMostStages = 6, kBytesBeside = kMostStages * int(sizeof(Barrier));
};

// Copies a block's weights into the ring, by one thread; `there` says of which stages they are.
//
// They do not wait for the kernel that makes tokens. Where all blocks begin while that may still run, a stage is asked for when the one
// before is there: all at once would be a queue of microseconds in front of what that kernel reads and writes, and then of the
// tokens.
// Later kOnTheirWay of them are: with more, all take longer.
template <typename S>
__device__ __forceinline__ void copy_weights(const Int8Product& p, const Block<S>& own, Barrier* there) {
  constexpr int kOnTheirWay = 4;
  const Tile<S> tile(p.m, p.n, blockIdx.x);
  prefetch_map(&p.weights);
  if (!p.follows) wait_for_kernel_before();
  const bool by_one = p.follows && int(gridDim.x * gridDim.y) <= p.at_once;
  Turn<S> turn{0, 1}, before;  // at first, slots are free
  for (int i = 0; i < own.share.count; ++i, turn.next()) {
    if (by_one && 0 < i && i < Ring<S>::kStages) wait(&there[i - 1], 0);
    if (i >= kOnTheirWay) wait(&there[before.slot], before.parity), before.next();
    wait(&own.ring.empty[turn.slot], turn.parity);
    expect(&there[turn.slot], Ring<S>::kWeights);
    copy_box(own.ring.weights(turn.slot), &p.weights, own.share.stage(i) * S::kRowBytes, tile.n0, &there[turn.slot]);
  }
}

// Copies its tokens, by another.
template <typename S>
__device__ __forceinline__ void copy_tokens(const Int8Product& p, const Block<S>& own) {
  const Tile<S> tile(p.m, p.n, blockIdx.x);
  prefetch_map(&p.tokens);
  wait_for_kernel_before();
  Turn<S> turn{0, 1};
  for (int i = 0; i < own.share.count; ++i, turn.next()) {
    Barrier* const full = &own.ring.full[turn.slot];
    wait(&own.ring.empty[turn.slot], turn.parity);
    expect(full, Ring<S>::kTokens);
    copy_box(own.ring.tokens(turn.slot), &p.tokens, own.share.stage(i) * S::kRowBytes, tile.m0, full);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) int8_product(const __grid_constant__ Int8Product p) {
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  const Block<S> own(p, start);
  Barrier* const there = reinterpret_cast<Barrier*>(own.ring.beside());  // a stage's weights are
  if (threadIdx.x == S::kThreads - 32) {
    for (int i = 0; i < Ring<S>::kStages; ++i) init(&there[i], 1);
  }
  own.ring.open(S::kConsumers / 32);
  if (own.warp >= S::kConsumers / 32) {
    if (threadIdx.x == S::kConsumers) copy_weights(p, own, there);
    if (threadIdx.x == S::kConsumers + 32) copy_tokens(p, own);
    return;
  }
  Turn<S> turn;
  own.each_piece(p, [&](const Tile<S>& tile, const Pieces<S>&) {
    prefetch_finish(p.finish, p, tile);
    int32_t sums[S::kTiles][S::kTokens / 2] = {};
    for (int i = 0; i < own.share.count; ++i, turn.next()) {
      wait(&own.ring.full[turn.slot], turn.parity);
      wait(&there[turn.slot], turn.parity);
      const uint64_t tokens = matrix_at(own.ring.tokens(turn.slot));
      begin_products();
#pragma unroll
      for (int j = 0; j < S::kTiles * 4; ++j) {
        const int t = j / 4;
        const uint64_t rows = matrix_at(own.ring.weights(turn.slot) + (own.warp / 4 * S::kTiles + t) * 64 * S::kRowBytes);
        WgmmaInt8<S::kTokens>::run(sums[t], rows + j % 4 * kNextInRow, tokens + j % 4 * kNextInRow);
      }
      commit_products();
      wait_products<0>();
      own.ring.free(turn.slot);
    }
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) settle(sums[t]);
    wait_for_kernel_before();
    leave(p.finish, p, own, tile, [&](int t, int j, int c) { return sums[t][j * 4 + c]; });
  });
}

template <typename Out>
cudaError_t int8_sm90(const Gemm& g, const Device& device, cudaStream_t stream) {
  Int8Product p{};
  p.m = int(g.m), p.n = int(g.n), p.k = int(g.k);
  p.follows = g.follows;
  p.at_once = device.multiprocessors;
  p.finish = {g.row_scale, g.col_scale, g.bias, g.d, g.per_row, g.per_column, g.workspace};
  auto share = [&](auto tag) {
    using S = typename decltype(tag)::type;
    return share_of<S>(int8_product<S>, p, device, [&](const Streams& p) { return one_wave(p, 0, device); });
  };
  auto run = [&](auto tag) {
    using S = typename decltype(tag)::type;
    return launch_streaming<S>(int8_product<S>, p, g.b, g.ldb, g.a, g.lda, device, stream);
  };
  auto with = [&](auto tokens) {
    return run_by_share(share, run, Tag<Int8Shape<Out, tokens(), 3, 1>>(), Tag<Int8Shape<Out, tokens(), 2, 2>>());
  };
  if (g.m <= 16) return with(std::integral_constant<int, 16>());
  if (g.m <= 32) return with(std::integral_constant<int, 32>());
  return with(std::integral_constant<int, 64>());
}

}  // namespace qpass
