// The product of 16-bit activations with integer weights on Hopper: y[m, n] = sum_k x[m, k] * w[n, k], w made of integers on its way to
// the tensor cores.
//
// Channels are the rows of what a warpgroup multiplies, from registers; tokens its columns, from shared memory, as they were stored. So
// the integers are all that is read of the weight, and what they become is nowhere written. One warp copies stages of both, ahead of
// the others. While a product is under way, the operands of the next are made.
#pragma once

#include "group_stream.cuh"
#include "mixed.h"
#include "mixed_operands.cuh"
#include "sums_sm90.cuh"

namespace qpass {

struct Mixed : Streams {
  Finish finish;
  const float* scale;  // [n, scales] of groups; else finish has it
  const int8_t* zero;
  int scales;
};

constexpr int kRun = 32;  // values of K whose operands are made at once: a group has no fewer

// kGroup: values of K that share a scale, or 0: all of a channel's do. kWarpgroups of kTiles * 64 channels each; kTokens tokens; blocks
// that share tokens; kTeams of so many warpgroups, each with a part of K.
template <typename T_, bool kInt4_, int kGroup_, int kWarpgroups, int kTiles, int kTokens, int kCluster, int kTeams = 1>
struct MixedShape : SumsOf<T_, float, kWarpgroups, kTiles, kTokens, kCluster, kTeams> {
  using T = T_;
  using Sums = SumsOf<T_, float, kWarpgroups, kTiles, kTokens, kCluster, kTeams>;
  static constexpr bool kInt4 = kInt4_, kGrouped = kGroup_ > 0;
  static constexpr int kGroup = kGroup_;
  // Registers are handed out by warpgroups: that of the one thread that copies keeps few, which leaves more for the others.
  static constexpr int kThreads = Sums::kConsumers + 128;
  static constexpr int kMultiplying = kWarpgroups * kTeams;
  static constexpr int kFewRegisters = kMultiplying == 4 ? 32 : 24;
  static constexpr int kManyRegisters = kMultiplying == 4 ? 112 : kMultiplying == 3 ? 160 : 240;
  // Of int8 weights beside 256 tokens there is room for two stages of 128, the second of which would not be there in time.
  static constexpr int kStageK = !kInt4 && !kGrouped && kTokens == 256 ? 64 : 128;
  static constexpr int kRowBytes = kInt4 ? kStageK / 2 : kStageK;  // a box is as wide as its swizzle
  static constexpr int kBoxes = kStageK * 2 / kBoxBytes, kPlanes = 1, kSideBytes = 0;
  static constexpr bool kStays = kTeams == 1;
  static constexpr bool kStreamK = kWarpgroups == 2 && kTiles == 1 && kTokens >= 192;  // smaller ones would leave more sums
  static constexpr int kMostStages = 512 / kStageK * kTeams, kStagesAhead = kMostStages;
  static constexpr int kGroups = kGrouped ? kStageK / kGroup : 0;  // of a stage
  using Scales = GroupStream<kTiles * 2, Sums::kConsumers, fours_of(kGroups, kTokens <= 64 ? 2 : 1), true>;
  // In the end they are read no more, and sums leave by way of their places.
  static constexpr bool kByLines = kStays;
  static constexpr int kLines = kByLines ? kLineBytes * Sums::kConsumers / 32 : 0;
  static constexpr int kBytesBeside = Scales::kBytes > kLines ? Scales::kBytes : kLines;
};

// What a lane's channels are multiplied by, ready for where in K it is.
template <typename S>
class MixedScales {
 public:
  using T = typename S::T;
  static constexpr int kRows = S::kTiles * 2;

  __device__ __forceinline__ MixedScales(char* room, const Mixed& p, int channel, int first, int end)
      : stream_(room, p.scale, p.zero, p.n, p.scales, channel, first, end), first_(first), has_zeros_(p.zero) {
    if constexpr (!S::kGrouped) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int n = stream_.channel_of(i);
        set_zero<T, S::kInt4>(now[i], p.zero && n < p.n ? p.zero[n] : 0);
      }
      return;
    }
    if constexpr (std::is_same_v<T, half>) find_powers(p, end);
    take();
  }

  // Makes those ready that value k of a stage and the next of its group are multiplied by. By all lanes, in the order of K.
  __device__ __forceinline__ void go_to(int stage, int k) {
    if constexpr (S::kGrouped) {
      if (k % S::kGroup) return;
      const int group = (stage * S::kStageK + k) / S::kGroup;
      if (k == 0 && group % 4 == 0 && group != first_) take();  // a stage has one, two or four
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        now[i].scale = of_group(held_[i].scale, group), now[i].rest = of_group(held_[i].rest, group);
        if (has_zeros_) now[i].zero = of_group(held_[i].zero, group);
      }
    }
  }
  ChannelScale<T> now[kRows];  // by tiles, of each the row `channel` and the one 8 on

  // What sums of row i are to be multiplied by in the end.
  __device__ __forceinline__ float power(int i) const { return S::kGrouped && std::is_same_v<T, half> ? power_[i] : 1.f; }

 private:
  // float16 has few powers of two: scales are taken as shares of one near the channel's largest, so many times that as the integers
  // leave room for: neither do products overflow nor small shares lose bits. Less zero points, integers are below 256.
  __device__ __forceinline__ void find_powers(const Mixed& p, int end) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int n = stream_.channel_of(i);
      float largest = 0;
      if (n < p.n) {
        for (int g = (first_ & ~3) + threadIdx.x % 4; g < min(end, p.scales); g += 4) {
          largest = fmaxf(largest, fabsf(p.scale[int64_t(n) * p.scales + g]));
        }
      }
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const int exponent = largest > 0 && isfinite(largest) ? max(ilogbf(largest), -100) - (S::kInt4 && !has_zeros_ ? 11 : 7) : 0;
      power_[i] = exp2f(float(exponent)), inverse_[i] = exp2f(float(-exponent));
    }
  }

  __device__ __forceinline__ void take() {
    stream_.next();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float scale = stream_.scale(i, threadIdx.x % 4);
      set_scale<T, S::kInt4>(held_[i], std::is_same_v<T, half> ? scale * inverse_[i] : scale);
      set_zero<T, S::kInt4>(held_[i], stream_.zero(i, threadIdx.x % 4));
    }
  }

  typename S::Scales stream_;
  const int first_;  // group
  const bool has_zeros_;
  ChannelScale<T> held_[kRows];  // this lane's of four groups
  float power_[kRows], inverse_[kRows];
};

// A run of 32 values of K of both a lane's channels of a tile: int4 in one load each, int8 in two.
template <typename S>
struct RawRun {
  static constexpr int kLoads = S::kInt4 ? 1 : 2;

  // `rows`: where the lane's first channel begins.
  __device__ __forceinline__ void read(const char* rows, int run, int tile) {
    const int row = threadIdx.x % 32 / 4, swizzle = S::kRowBytes == 64 ? row / 2 & 3 : row;
#pragma unroll
    for (int i = 0; i < 2 * kLoads; ++i) {
      const char* line = rows + (tile * 64 + i / kLoads * 8) * S::kRowBytes;
      words[i / kLoads][i % kLoads] = *reinterpret_cast<const uint4*>(line + ((run * kLoads + i % kLoads) ^ swizzle) * 16);
    }
  }
  uint4 words[2][kLoads];
};

// The operands of the two products of sixteen values that a run makes. By all lanes of a warp.
template <typename S>
__device__ __forceinline__ void make_operands(
    uint32_t (&a)[2][4], const RawRun<S>& raw, int tile, const MixedScales<S>& scales, bool has_zeros) {
  using T = typename S::T;
  const uint32_t bytes = bytes_of_lane<S::kInt4>(threadIdx.x % 4);
  Pair<T> v[2][4];  // by channel; values 2t, 2t + 8, 2t + 16, 2t + 24
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 q = raw.words[h][0];
    if constexpr (S::kInt4) {
      v[h][0] = integers<T, true>(q.x, 0, bytes), v[h][1] = integers<T, true>(q.y, 0, bytes);
      v[h][2] = integers<T, true>(q.z, 0, bytes), v[h][3] = integers<T, true>(q.w, 0, bytes);
    } else {
      const uint4 next = raw.words[h][1];
      v[h][0] = integers<T, false>(q.x, q.y, bytes), v[h][1] = integers<T, false>(q.z, q.w, bytes);
      v[h][2] = integers<T, false>(next.x, next.y, bytes), v[h][3] = integers<T, false>(next.z, next.w, bytes);
    }
  }
  if (has_zeros) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j / 4][j % 4] = __hsub2(v[j / 4][j % 4], scales.now[tile * 2 + j / 4].zero);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int h = j / 4, i = j % 4;
    const ChannelScale<T>& by = scales.now[tile * 2 + h];
    if constexpr (S::kGrouped) v[h][i] = __hfma2(v[h][i], by.scale, __hmul2(v[h][i], by.rest));
    else if constexpr (S::kInt4) v[h][i] = __hmul2(v[h][i], PairOf<T>::make(1.f, 1 / kSecond<true>));
    a[i / 2][i % 2 * 2 + h] = same_bits<uint32_t>(v[h][i]);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) mixed(const __grid_constant__ Mixed p) {
  using T = typename S::T;
  static_assert(Ring<S>::kStages >= 2 * S::kTeams);  // a team waits for its next stage before it leaves one
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  constexpr int kWarps = S::kTeam / 32;
  const Block<S> own(p, start, kWarps);
  if (own.warp >= S::kConsumers / 32) {
    limit_registers<S::kFewRegisters>();
    if (threadIdx.x == S::kConsumers) copy_stages(p, own, 0, Nothing());
  } else {
    raise_registers<S::kManyRegisters>();
    const int team = own.warp / kWarps, line = line_of<S>(own.warp % kWarps, 0);
    Turn<S> turn{team, 0};
    own.each_piece(p, [&](const Tile<S>& tile, const Pieces<S>& piece) {
      const int first = piece.share.first_of(team), count = piece.share.count_of(team);
      prefetch_finish(p.finish, p, tile);
      MixedScales<S> scales(own.ring.beside(), p, tile.n0 + line, first * S::kGroups, (first + count) * S::kGroups);
      float sums[S::kTiles][S::kTokens / 2] = {};
      constexpr int kParts = S::kStageK / kRun * S::kTiles;  // runs of a stage, and of each the tiles
      RawRun<S> raw;
      uint32_t a[2][2][4];
      auto read = [&](int part) { raw.read(own.ring.weights(turn.slot) + line * S::kRowBytes, part / S::kTiles, part % S::kTiles); };
      auto make = [&](int i, int part) {
        if (part % S::kTiles == 0) scales.go_to(first + i, part / S::kTiles * kRun);
        make_operands<S>(a[part % 2], raw, part % S::kTiles, scales, p.zero != nullptr);
      };
      if (S::kTeams == 1 || count) {
        wait(&own.ring.full[turn.slot], turn.parity);
        read(0);
        make(0, 0);
      }
      for (int i = 0; i < count; ++i) {
        const int done = turn.slot;
        const uint64_t tokens = matrix_at(own.ring.tokens(turn.slot));
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const bool more = part + 1 < kParts;
          if (more) read(part + 1);
          begin_products();
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int sixteen = part / S::kTiles * 2 + j;
            Wgmma<T, S::kTokens>::run(
                sums[part % S::kTiles], a[part % 2][j], tokens + sixteen / 4 * (Ring<S>::kBox >> 4) + sixteen % 4 * kNextInRow);
          }
          commit_products();
          wait_products<1>();  // what the next operands take the place of
          if (more) {
            make(i, part + 1);
          } else if (i + 1 < count) {
            turn.template next<S::kTeams>();
            wait(&own.ring.full[turn.slot], turn.parity);
            read(0);
            make(i + 1, 0);
          }
        }
        wait_products<0>();
        own.ring.free(done);
      }
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) {
        settle(sums[t]);
#pragma unroll
        for (int j = 0; j < S::kTokens / 2; ++j) sums[t][j] *= scales.power(t * 2 + j / 2 % 2);
      }
      wait_for_kernel_before();  // the scales of rows, and whoever reads what is written here
      if (fix_up(p.finish, p, tile, piece, sums)) leave(p.finish, p, own, tile, [&](int t, int j, int c) { return sums[t][j * 4 + c]; });
      turn.next();
    });
  }
  own.ring.close();
}

template <typename S>
cudaError_t launch_mixed(const Mixed& p, const MixedGemm& g, const Device& device, cudaStream_t stream) {
  return launch_streaming<S>(mixed<S>, p, g.weight, g.int4 ? g.k / 2 : g.k, g.x, g.k * 2, device, stream);
}

template <typename T, bool kInt4, int kGroup>
cudaError_t mixed_by_tokens(const Mixed& p, const MixedGemm& g, const Device& device, cudaStream_t stream) {
  constexpr int kPairs = kHasClusters ? 2 : 1;  // blocks that share tokens
  // all warpgroups have the same channels and tokens: where there is little to do, the way through a stage is most of the time
  if (is_small(g, device.multiprocessors)) {
    return launch_mixed<MixedShape<T, kInt4, kGroup, 1, 1, 64, 1, 4>>(p, g, device, stream);
  }
  if (g.m <= 16) return launch_mixed<MixedShape<T, kInt4, kGroup, 4, 1, 16, 1>>(p, g, device, stream);
  if (g.m <= 32) return launch_mixed<MixedShape<T, kInt4, kGroup, 4, 1, 32, 1>>(p, g, device, stream);
  if (g.m <= 64) return launch_mixed<MixedShape<T, kInt4, kGroup, 4, 1, 64, 1>>(p, g, device, stream);
  // Twice as many tokens beside half as many channels: operands that are made once are multiplied twice as often. Other tiles are slower
  // by what they multiply, and faster where these would leave tokens or multiprocessors without work.
  auto fastest = [&](auto largest) {
    auto time = [&](auto tiles, bool stream_k) { return time_of(tiles, mixed<typename decltype(tiles)::S>, p, device, stream_k); };
    auto run = [&](auto tiles, bool stream_k) {
      Mixed with = p;
      with.by_stream_k = stream_k;
      return launch_mixed<typename decltype(tiles)::S>(with, g, device, stream);
    };
    return run_fastest(time, run, largest, Timed<MixedShape<T, kInt4, kGroup, 3, 1, 192, 1>, 171>(),
        Timed<MixedShape<T, kInt4, kGroup, 2, 1, 192, kPairs>, 120>(), Timed<MixedShape<T, kInt4, kGroup, 2, 2, 128, 1>, 181>(),
        Timed<MixedShape<T, kInt4, kGroup, 3, 1, 128, 1>, 125>(), Timed<MixedShape<T, kInt4, kGroup, 2, 1, 128, 1>, 88>());
  };
  constexpr int kStage = 134 * MixedShape<T, kInt4, kGroup, 2, 1, 256, 1>::kStageK / 128;
  const bool rounds = ceil_div(g.n, 128) > 2 * device.multiprocessors;  // all blocks at once copy more of the tokens than L2 gives
  if (g.m <= 256 && !rounds) return fastest(Timed<MixedShape<T, kInt4, kGroup, 2, 1, 256, 1>, kStage>());
  return fastest(Timed<MixedShape<T, kInt4, kGroup, 2, 1, 256, kPairs>, kStage>());
}

template <typename T, bool kInt4>
cudaError_t mixed_sm90(const MixedGemm& g, const Device& device, cudaStream_t stream) {
  Mixed p{};
  p.m = int(g.m), p.n = int(g.n), p.k = int(g.k);
  p.scale = g.scale, p.zero = g.zero;
  p.scales = g.group_size ? int(g.k / g.group_size) : 1;
  p.follows = true;
  p.finish = {g.row_scale, g.group_size ? nullptr : g.scale, g.bias, g.y, true, true, g.workspace};
  switch (g.group_size) {
    case 0: return mixed_by_tokens<T, kInt4, 0>(p, g, device, stream);
    case 32: return mixed_by_tokens<T, kInt4, 32>(p, g, device, stream);
    case 64: return mixed_by_tokens<T, kInt4, 64>(p, g, device, stream);
    case 128: return mixed_by_tokens<T, kInt4, 128>(p, g, device, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace qpass
