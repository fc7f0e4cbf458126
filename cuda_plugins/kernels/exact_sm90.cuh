// 17 to 64 tokens of 16 bits beside integer weights on Hopper, in one kernel: integers become floats of the tokens' type, which holds them
// exactly, and a group's sums are multiplied by its scale in float32. Zero points cost little, and so do small groups.
//
// What makes a lane's operands of eight neighbours in few instructions (of nibbles eleven) leaves them in pairs of one and the fourth on.
// So the tokens of a stage change places, once for all channels, by warps that multiply nothing. Scales are copied as weights are: loads
// would wait behind all that was asked for of those, and so would whatever reads shared memory after them.
#pragma once

#include "exact_math_sm90.cuh"
#include "rows_sm90.cuh"
#include "sums_sm90.cuh"

namespace qpass {

struct ExactProduct : Streams {
  Finish finish;
  const void* x;                  // [m, k] of Out
  RowsMap scale_rows, zero_rows;  // of groups
  const int8_t* zero;             // [n, groups], or null
  int groups;                     // of a channel
};

// kGroup: values of K that share a scale, or 0: all of a channel's do, and finish has it. kWide: warpgroups that multiply.
template <typename Out, bool kInt4_, int kGroup_, bool kZeros_, int kTokens, int kWide>
struct ExactShape : SumsOf<Out, float, kWide, 1, kTokens, 1> {
  using Sums = SumsOf<Out, float, kWide, 1, kTokens, 1>;
  static constexpr bool kInt4 = kInt4_, kGrouped = kGroup_ > 0, kZeros = kZeros_, kStays = false;
  static constexpr int kGroup = kGroup_, kMakers = 128, kCopier = Sums::kConsumers + kMakers, kThreads = kCopier + 128;
  static constexpr int kRowBytes = 128, kStageK = exact_stage(kInt4);
  static constexpr int kUnits = kStageK / 32;  // of 32 values, of which a lane has eight
  static constexpr int kWords = kInt4 ? 1 : 2;  // that these are
  static constexpr int kBoxes = kStageK * 2 / kBoxBytes, kPlanes = 1, kMostStages = 4;
  static constexpr int kStagesAhead = 1;  // whose weights do not wait for the tokens: more would delay these
  static constexpr int kGroups = kGrouped ? kStageK / kGroup : 0, kUnitsOfGroup = kGrouped ? kGroup / 32 : kUnits;
  static constexpr int kSums = kTokens / 2;  // that a thread has
  using Scales = RowsOf<Sums::kChannels, kGroups * 4>;
  using Zeros = RowsOf<Sums::kChannels, kGroups>;
  static constexpr int kSideBytes = kGrouped ? Scales::kAll + (kZeros ? Zeros::kAll : 0) : 0;  // zero points behind scales
  static constexpr int kBytesBeside = kMostStages * int(sizeof(Barrier));
};

// A lane's two channels' scales and zero points, group after group.
template <typename S>
class ExactScales {
 public:
  using T = typename S::Out;
  __device__ __forceinline__ ExactScales(const ExactProduct& p, int n0, int line)
      : p_(p), scales_(p.scale_rows, line), zeros_(p.zero_rows, line) {
    if constexpr (!S::kGrouped && S::kZeros) {
#pragma unroll
      for (int h = 0; h < 2; ++h) less[h].set(n0 + line + h * 8 < p.n ? p.zero[n0 + line + h * 8] : 0);
    }
  }

  // To the i-th group of a stage, beside which its rows lie.
  __device__ __forceinline__ void go_to(const char* rows, int stage, int i) {
    if constexpr (S::kGrouped) {
      const bool there = stage * S::kGroups + i < p_.groups;  // else the row is another channel's
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float found = *reinterpret_cast<const float*>(rows + scales_.at(p_.scale_rows, stage, h) + i * 4);
        scale[h] = there ? found : 0.f;
        if (S::kZeros) less[h].set(*reinterpret_cast<const int8_t*>(rows + S::Scales::kAll + zeros_.at(p_.zero_rows, stage, h) + i));
      }
    }
  }

  float scale[2];
  Less<T, S::kInt4, S::kZeros> less[2];

 private:
  const ExactProduct& p_;
  const typename S::Scales scales_;
  const typename S::Zeros zeros_;
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) exact_product(const __grid_constant__ ExactProduct p) {
  using T = typename S::Out;
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  constexpr int kWarps = S::kConsumers / 32, kMakers = S::kMakers / 32;
  const Block<S> own(p, start);
  const Ring<S>& ring = own.ring;
  Barrier* const raw = reinterpret_cast<Barrier*>(ring.beside());  // a stage's tokens are there; `full`: they have changed places, too
  if (threadIdx.x == S::kThreads - 32) {
    for (int i = 0; i < Ring<S>::kStages; ++i) init(&raw[i], 1);
  }
  ring.open(kWarps, 1 + kMakers);
  const Tile<S> tile(0, blockIdx.x * S::kChannels);
  if (own.warp >= kWarps + kMakers) {
    limit_registers<24>();
    if (threadIdx.x != S::kCopier) return;
    copy_raw_stages(p, own, raw, [&](int i, int slot) {
      const int stage = own.share.stage(i);
      expect(&ring.full[slot], Ring<S>::kWeights + S::kSideBytes);
      copy_box(ring.weights(slot), &p.weights, stage * S::kRowBytes, tile.n0, &ring.full[slot]);
      if constexpr (!S::kGrouped) return;
      S::Scales::copy(ring.side(slot), p.scale_rows, stage, tile.n0, &ring.full[slot]);
      if (S::kZeros) S::Zeros::copy(ring.side(slot) + S::Scales::kAll, p.zero_rows, stage, tile.n0, &ring.full[slot]);
    });
    return;
  }
  if (own.warp >= kWarps) {
    limit_registers<40>();
    // all blocks together ask for all tokens, while the kernel ahead ends
    const int64_t step = int64_t(gridDim.x) * gridDim.y * S::kMakers * 128, bytes = int64_t(p.m) * p.k * 2;
    int64_t at = (int64_t(blockIdx.y * gridDim.x + blockIdx.x) * S::kMakers + threadIdx.x - S::kConsumers) * 128;
    for (; at < bytes; at += step) prefetch(static_cast<const char*>(p.x) + at);
    const Places<S> places;
    Turn<S> turn;
    for (int i = 0; i < own.share.count; ++i, turn.next()) {
      wait(&raw[turn.slot], turn.parity);
      places.change(ring.tokens(turn.slot));
      publish_writes();
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive<1>(&ring.full[turn.slot], 0);
    }
    return;
  }
  raise_registers<104>();
  const int line = line_of<S>(own.warp, 0), count = own.share.count;
  prefetch_finish(p.finish, p, tile);
  const Masks<T, S::kInt4> masks;
  ExactScales<S> scales(p, tile.n0, line);
  float sums[S::kSums] = {}, part[S::kSums], scale[2];  // of a group, and what it is multiplied by
  uint32_t a[2][2][4], words[2][S::kWords];
  Turn<S> turn;
  int stage = own.share.first;  // whose operands are made
  auto read = [&](int unit) { read_words<S>(words, ring.weights(turn.slot) + line * S::kRowBytes, unit); };
  auto make = [&](int unit) {
    if (unit % S::kUnitsOfGroup == 0) scales.go_to(ring.side(turn.slot), stage, unit / S::kUnitsOfGroup);
    exact_operands<S, T>(a[unit % 2], words, masks, scales.less);
  };
  auto begin = [&] {  // a stage
    wait(&ring.full[turn.slot], turn.parity);
    read(0);
    make(0);
  };
  if (count) begin();
  for (int i = 0; i < count; ++i) {
    const int done = turn.slot;
    const uint64_t tokens = matrix_at(ring.tokens(done));
#pragma unroll
    for (int unit = 0; unit < S::kUnits; ++unit) {  // while its products are under way, the operands of the next are made
      const bool begins = unit % S::kUnitsOfGroup == 0, ends = (unit + 1) % S::kUnitsOfGroup == 0;
      if (S::kGrouped && begins) scale[0] = scales.scale[0], scale[1] = scales.scale[1];
      if (unit + 1 < S::kUnits) read(unit + 1);
      float(&to)[S::kSums] = S::kGrouped ? part : sums;
      begin_products();
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint64_t with = tokens + unit / 2 * (Ring<S>::kBox >> 4) + (unit % 2 * 2 + j) * kNextInRow;
        Wgmma<T, S::kTokens>::run(to, a[unit % 2][j], with, !S::kGrouped || !begins || j);
      }
      commit_products();
      wait_products<1>();  // what the next operands take the place of
      if (unit + 1 < S::kUnits) {
        make(unit + 1);
      } else if (i + 1 < count) {
        turn.next(), ++stage;
        begin();
      }
      if (!ends) continue;
      wait_products<0>();
      if (!S::kGrouped) continue;
      settle(part);
#pragma unroll
      for (int j = 0; j < S::kSums; ++j) sums[j] = fmaf(part[j], scale[j / 2 % 2], sums[j]);
    }
    ring.free(done);
  }
  settle(sums);
  wait_for_kernel_before();
  leave(p.finish, p, own, tile, [&](int, int j, int c) { return sums[j * 4 + c]; });
}

template <typename S>
cudaError_t launch_exact(ExactProduct p, const MixedGemm& g, const Device& device, cudaStream_t stream) {
  if (cudaError_t e = map_matrix(&p.tokens, g.x, g.m, g.k * 2, g.k * 2, S::kTokens, kBoxBytes)) return e;
  if constexpr (S::kGrouped) {
    if (cudaError_t e = S::Scales::map(&p.scale_rows, g.scale, g.n, p.groups * 4)) return e;
    if (S::kZeros) {
      if (cudaError_t e = S::Zeros::map(&p.zero_rows, g.zero, g.n, p.groups)) return e;
    }
  }
  // Where one scale is a block's, integers take fewer instructions beside 32 tokens or int8: by a long K, what it costs to begin matters
  // less.
  constexpr bool kAlways = S::kZeros || S::kGroups > S::kStageK / 128 || (S::kInt4 && S::kTokens > 32);
  constexpr int kMostStages = kAlways ? 1 << 20 : S::kInt4 ? 16 : 48;
  return launch_streaming<S>(exact_product<S>, p, g.weight, S::kInt4 ? g.k / 2 : g.k, nullptr, 0, device, stream,
      [](const ExactProduct& p) { return p.stages_a_split <= kMostStages; });
}

// cudaErrorNotSupported where it cannot be done, and where integers should be made of the tokens, which is faster.
template <typename Out, bool kInt4, int kGroup, bool kZeros>
cudaError_t exact_by_tokens(const MixedGemm& g, const Device& device, cudaStream_t stream) {
  if (!fits_exact(g)) return cudaErrorNotSupported;
  ExactProduct p{};
  p.m = int(g.m), p.n = int(g.n), p.k = int(g.k), p.x = g.x, p.zero = g.zero;
  p.groups = kGroup ? int(g.k / kGroup) : 0;
  p.follows = true;
  p.finish = {g.row_scale, kGroup ? nullptr : g.scale, g.bias, g.y, true, true, g.workspace};
  // of more tokens a stage takes as long with fewer channels
  if (g.m > 32) return launch_exact<ExactShape<Out, kInt4, kGroup, kZeros, 64, 4>>(p, g, device, stream);
  auto share = [&](auto tag) {
    using S = typename decltype(tag)::type;
    return share_of<S>(exact_product<S>, p, device, [&](const Streams& p) { return one_wave(p, 0, device); });
  };
  auto run = [&](auto tag) { return launch_exact<typename decltype(tag)::type>(p, g, device, stream); };
  return run_by_share(
      share, run, Tag<ExactShape<Out, kInt4, kGroup, kZeros, 32, 3>>(), Tag<ExactShape<Out, kInt4, kGroup, kZeros, 32, 4>>());
}

}  // namespace qpass
