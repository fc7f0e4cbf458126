// Few tokens of 16 bits beside integer weights on Hopper: tokens are integers of two int8 planes (fixed.cuh), beside which weights are
// multiplied as they are, by exact sums. Three instructions make eight int4 operands. Sixteen tokens and fewer are made into integers on
// the way, by warps beside the one that copies, more by a kernel ahead.
//
// Of 32 values of K in order, a lane of the four that share a channel has eight, in one word or two: of int4 the even ones, then the
// odd. Planes lie in the order in which products meet these (prepare.cu).
#pragma once

#include "fixed.cuh"
#include "group_stream.cuh"
#include "mixed.h"
#include "sums_sm90.cuh"

namespace qpass {

struct FixedProduct : Streams {
  Finish finish;
  TensorMap act_scale, act_sum;  // of a stage: one scale a token, and sums of each group
  const void* x;                 // or what they are made of here: [m, k] of Out
  const float* x_scale;          // [k], or null
  const float* scale;            // [n, scales] of groups; else finish has it
  const int8_t* zero;
  int scales;
};

// kGroup: values of K that share a scale, or 0: all of a channel's do. kZeros: whether there are zero points.
// kMade: tokens become integers here.
template <typename Out, bool kInt4_, int kGroup_, bool kZeros_, int kTokens, bool kMade_>
struct FixedShape : SumsOf<Out, float, 4, 1, kTokens, 1> {
  using Sums = SumsOf<Out, float, 4, 1, kTokens, 1>;
  static constexpr bool kInt4 = kInt4_, kGrouped = kGroup_ > 0, kZeros = kZeros_, kMade = kMade_;
  static constexpr int kGroup = kGroup_, kThreads = Sums::kConsumers + 128;
  // A stage is as wide as a box can be: the wider, the sooner it is there.
  static constexpr int kRowBytes = 128, kStageK = kRowBytes * (kInt4 ? 2 : 1);
  static constexpr int kBlocks = kStageK / kBlockK;              // of a stage, each with scales of the tokens
  static constexpr int kSpans = kGroup ? kBlockK / kGroup : 1;   // of a block, each with sums of its own
  static constexpr int kPlanes = 2, kBoxes = kBlocks;
  static constexpr int kSideRow = kTokens * 4, kSumsAt = 512;  // copies go to multiples of 128
  static constexpr int kSideBytes = (kSumsAt + kBlocks * kSpans * kSideRow + 1023) / 1024 * 1024;
  static constexpr int kMakers = kMade ? 3 : 0;  // warps
  static constexpr int kFewRegisters = kMade ? 96 : 32, kManyRegisters = kMade ? 96 : 112;
  // of planes multiplied at the same time: the sums of both take registers
  static constexpr int kTogether = kTokens <= 32 ? 2 : 1;
};

// What a lane's two channels are multiplied by, and their zero points, ready for where in K it is.
template <typename S>
class FixedScales {
 public:
  __device__ __forceinline__ FixedScales(const FixedProduct& p, int channel, int first)
      : stream_(p.scale, S::kZeros ? p.zero : nullptr, p.n, S::kGrouped ? p.scales : 0, channel, first), first_(first) {
    if constexpr (S::kGrouped) {
      take();
    } else if constexpr (S::kZeros) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = stream_.channel_of(h);
        zero[h] = n < p.n ? float(p.zero[n] * kTimes) : 0.f;
      }
    }
  }

  // To a group; they follow one another.
  __device__ __forceinline__ void go_to(int group) {
    if constexpr (S::kGrouped) {
      if (group % 4 == 0 && group != first_) take();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scale[h] = of_group(held_scale_[h], group);
        if (S::kZeros) zero[h] = of_group(held_zero_[h], group);
      }
    }
  }

  float scale[2] = {1.f, 1.f}, zero[2] = {};

 private:
  static constexpr int kTimes = S::kInt4 ? 16 : 1;  // what nibbles are multiplied as

  __device__ __forceinline__ void take() {
    int taken[2];
    stream_.take(held_scale_, taken);
#pragma unroll
    for (int h = 0; h < 2; ++h) held_zero_[h] = float(taken[h] * kTimes);
  }

  GroupStream<2> stream_;
  const int first_;
  float held_scale_[2], held_zero_[2];
};

// A block's weights as operands of its four products. Nibbles stay in the upper half of their byte, sixteen times what they are.
template <typename S>
__device__ __forceinline__ void fixed_operands(uint32_t (&a)[4][4], const char* rows, int block) {
  const int quarter = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int j = i / 2, h = i % 2;
    const char* line = rows + h * 8 * S::kRowBytes;
    if constexpr (S::kInt4) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(line + ((block * 4 + j) ^ row) * 16 + quarter * 4);
      a[j][h] = word << 4 & 0xf0f0f0f0u, a[j][h + 2] = word & 0xf0f0f0f0u;
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(line + ((j * 2 + quarter / 2) ^ row) * 16 + quarter % 2 * 8);
      a[j][h] = words.x, a[j][h + 2] = words.y;
    }
  }
}

// Makes the tokens of every stage, by kMakers warps: sixteen lanes a block of a token. What the next stage is made of is on its way
// while one is made.
template <typename S>
__device__ __forceinline__ void make_tokens(const FixedProduct& p, const Block<S>& own) {
  constexpr int kTeams = S::kMakers * 32 / kFixedLanes, kStep = kTeams / S::kBlocks;  // tokens that are made at once
  constexpr int kRounds = (S::kTokens + kStep - 1) / kStep, kV = kFixedV;
  constexpr int kLanes = S::kGroup && S::kGroup < kBlockK ? S::kGroup / kV : kFixedLanes;  // that share a sum
  static_assert(kTeams % S::kBlocks == 0);
  const int team = (threadIdx.x - S::kConsumers - 32) / kFixedLanes, lane = threadIdx.x % kFixedLanes;
  const int block = team % S::kBlocks, first = team / S::kBlocks, tokens = min(p.m - own.tile.m0, S::kTokens);
  const auto* const x = static_cast<const typename S::Out*>(p.x) + int64_t(own.tile.m0) * p.k;
  using Raw = Bits<typename S::Out, kV>;
  Raw raw[kRounds];
  auto k_of = [&](int i) { return ((own.share.first + i) * S::kBlocks + block) * kBlockK + lane * kV; };
  auto fetch = [&](int i, int round) {
    const int token = first + round * kStep, k = k_of(i);
    raw[round] = i < own.share.count && token < tokens && k < p.k ? read<kV>(x + int64_t(token) * p.k + k) : Raw();
  };
  wait_for_kernel_before();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) fetch(0, r);
  for (int i = 0, slot = 0, parity = 1; i < own.share.count; ++i) {
    float by[kV];
    if (p.x_scale && k_of(i) < p.k) load<kV>(p.x_scale + k_of(i), by);
    if (i >= Ring<S>::kStages) wait(&own.ring.empty[slot], parity);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (r * kStep >= tokens) break;  // for all lanes of a warp
      float value[kV];
      to_floats(raw[r], value);
      fetch(i + 1, r);
      if (p.x_scale && k_of(i) < p.k) {
#pragma unroll
        for (int j = 0; j < kV; ++j) value[j] *= by[j];
      }
      const FixedCodes codes = to_fixed<S::kInt4>(value);
      const int sum = S::kZeros ? sum_of_lanes(codes.sum, kLanes) : 0, token = first + r * kStep;
      if (token >= tokens) continue;
      auto put = [&](int plane, int half, uint32_t four) {  // where products of 32 meet this lane's values
        char* const row = own.ring.tokens(slot) + (plane * S::kBoxes + block) * Ring<S>::kBox + token * kBoxBytes;
        *reinterpret_cast<uint32_t*>(row + ((lane / 4 * 2 + half) ^ token % 8) * 16 + lane % 4 * 4) = four;
      };
      put(0, 0, codes.high.x), put(0, 1, codes.high.y), put(1, 0, codes.low.x), put(1, 1, codes.low.y);
      char* const side = own.ring.side(slot) + token * 4;
      if (lane == 0) *reinterpret_cast<float*>(side + block * S::kSideRow) = codes.scale;
      if (S::kZeros && lane % kLanes == 0) {
        *reinterpret_cast<int*>(side + S::kSumsAt + (block * S::kSpans + lane / kLanes) * S::kSideRow) = sum;
      }
    }
    publish_writes();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive<1>(&own.ring.full[slot], 0);
    if (++slot == Ring<S>::kStages) slot = 0, parity ^= 1;
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) fixed_product(const __grid_constant__ FixedProduct p) {
  constexpr int kSums = S::kTokens / 2, kMmas = 4 / S::kSpans;  // of a group
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  const Block<S> own(p, start, S::kConsumers / 32, 1 + S::kMakers);
  if (own.warp >= S::kConsumers / 32) {
    limit_registers<S::kFewRegisters>();
    if constexpr (S::kMade) {
      if (threadIdx.x == S::kConsumers) copy_weights(p, own.ring, own.tile, own.share);
      else if (own.warp > S::kConsumers / 32) make_tokens(p, own);
    } else if (threadIdx.x == S::kConsumers) {
      const int bytes_beside = S::kBlocks * S::kSideRow * (S::kZeros ? 1 + S::kSpans : 1);
      copy_stages(p, own.ring, own.tile, own.share, bytes_beside, [&](int stage, int slot) {
        const int block = stage * S::kBlocks, x = own.tile.m0 * 4;
        copy_box(own.ring.side(slot), &p.act_scale, x, block, &own.ring.full[slot]);
        if (S::kZeros) copy_box(own.ring.side(slot) + S::kSumsAt, &p.act_sum, x, block * S::kSpans, &own.ring.full[slot]);
      });
    }
    return;
  }
  raise_registers<S::kManyRegisters>();
  prefetch_finish<S>(p.finish, p, own.tile);
  const int line = line_of<S>(own.warp, 0), quarter = threadIdx.x % 4;
  constexpr int kGroups = S::kGrouped ? S::kBlocks * S::kSpans : 0;  // of a stage
  FixedScales<S> scales(p, own.tile.n0 + line, own.share.first * kGroups);
  float sums[kSums] = {};
  int slot = 0, parity = 0;
  for (int i = 0; i < own.share.count; ++i) {
    wait(&own.ring.full[slot], parity);
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      uint32_t a[4][4];
      fixed_operands<S>(a, own.ring.weights(slot) + line * S::kRowBytes, block);
      const uint64_t tokens = matrix_at(own.ring.tokens(slot)) + block * (Ring<S>::kBox >> 4);
#pragma unroll
      for (int span = 0; span < S::kSpans; ++span) {
        scales.go_to(((own.share.first + i) * S::kBlocks + block) * S::kSpans + span);
        // Adds part * times to the sums; what zero points make of the tokens' sums goes with the low plane.
        auto promote = [&](const int32_t (&part)[kSums], float times, bool low) {
          const char* side = own.ring.side(slot) + quarter * 8;
          const char* token_sums = side + S::kSumsAt + (block * S::kSpans + span) * S::kSideRow;
#pragma unroll
          for (int j = 0; j < kSums / 4; ++j) {  // columns of eight tokens, of which the lane has two
            const float2 by = *reinterpret_cast<const float2*>(side + block * S::kSideRow + j * 32);
            float four[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) four[c] = float(part[j * 4 + c]);
            if (S::kZeros && low) {  // integers would overflow where zero points are far from the weights
              const int2 sum = *reinterpret_cast<const int2*>(token_sums + j * 32);
#pragma unroll
              for (int c = 0; c < 4; ++c) four[c] = fmaf(-scales.zero[c / 2], float(c % 2 ? sum.y : sum.x), four[c]);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float scale = S::kGrouped ? scales.scale[h] * times : times;
              sums[j * 4 + h * 2] += scale * by.x * four[h * 2];
              sums[j * 4 + h * 2 + 1] += scale * by.y * four[h * 2 + 1];
            }
          }
        };
#pragma unroll
        for (int first = 0; first < 2; first += S::kTogether) {
          int32_t part[S::kTogether][kSums];
          begin_products();
#pragma unroll
          for (int j = 0; j < kMmas * S::kTogether; ++j) {
            const int mma = span * kMmas + j % kMmas, plane = first + j / kMmas;
            const uint64_t with = tokens + plane * S::kBoxes * (Ring<S>::kBox >> 4) + mma * kNextInRow;
            WgmmaInt8<S::kTokens>::run(part[j / kMmas], a[mma], with, j % kMmas > 0);
          }
          commit_products();
          wait_products<0>();
#pragma unroll
          for (int j = 0; j < S::kTogether; ++j) settle(part[j]);
          if constexpr (S::kTogether == 2) {
#pragma unroll
            for (int j = 0; j < kSums; ++j) part[0][j] = part[0][j] * 256 + part[1][j];
            promote(part[0], 1.f, true);
          } else {
            promote(part[0], first ? 1.f : 256.f, first == 1);
          }
        }
      }
    }
    own.ring.free(slot);
    if (++slot == Ring<S>::kStages) slot = 0, parity ^= 1;
  }
  wait_for_kernel_before();
  leave(p.finish, p, own, [&](int, int j, int c) { return sums[j * 4 + c]; });
}

template <typename Out, bool kInt4, int kGroup, bool kZeros>
cudaError_t fixed_by_tokens(FixedProduct p, const MixedGemm& g, const FixedActivations* x, const Device& device, cudaStream_t stream) {
  auto with = [&](auto tokens, auto made) -> cudaError_t {
    using S = FixedShape<Out, kInt4, kGroup, kZeros, tokens(), made()>;
    static OncePerDevice allowed;
    auto launch = [&](const void* tokens, int64_t bytes) {
      return launch_streaming<S>(fixed_product<S>, p, g.weight, kInt4 ? g.k / 2 : g.k, tokens, bytes, device, allowed, stream);
    };
    if constexpr (made()) {
      p.x = g.x, p.x_scale = g.x_scale;
      return launch(nullptr, 0);
    } else {
      const int64_t blocks = x->padded / kBlockK, row = x->side * 4, spans = S::kBlocks * S::kSpans;
      if (cudaError_t e = map_matrix(&p.act_scale, x->scale, blocks, row, row, S::kBlocks, S::kSideRow, false)) return e;
      if (cudaError_t e = map_matrix(&p.act_sum, x->sum, blocks * S::kSpans, row, row, int(spans), S::kSideRow, false)) return e;
      return launch(x->high, x->padded);
    }
  };
  if (!x) return g.m <= kMadeHere ? with(std::integral_constant<int, 16>(), std::true_type()) : cudaErrorInvalidValue;
  if (g.m <= 32) return with(std::integral_constant<int, 32>(), std::false_type());
  return with(std::integral_constant<int, 64>(), std::false_type());
}

template <typename Out, bool kInt4>
cudaError_t fixed_sm90(const MixedGemm& g, const FixedActivations* x, const Device& device, cudaStream_t stream) {
  FixedProduct p{};
  p.m = int(g.m), p.n = int(g.n), p.k = int(g.k);
  p.scale = g.scale, p.zero = g.zero;
  p.scales = g.group_size ? int(g.k / g.group_size) : 1;
  p.follows = g.follows;
  p.finish = {nullptr, g.group_size ? nullptr : g.scale, g.bias, g.y, true, true, g.workspace};
  auto by_zeros = [&](auto group) {
    return g.zero ? fixed_by_tokens<Out, kInt4, group(), true>(p, g, x, device, stream)
                  : fixed_by_tokens<Out, kInt4, group(), false>(p, g, x, device, stream);
  };
  switch (g.group_size) {
    case 0: return by_zeros(std::integral_constant<int, 0>());
    case 32: return by_zeros(std::integral_constant<int, 32>());
    case 64: return by_zeros(std::integral_constant<int, 64>());
    case 128: return by_zeros(std::integral_constant<int, 128>());
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace qpass
