// Few tokens of 16 bits beside integer weights on Hopper: tokens are integers of two int8 planes (fixed.cuh), beside which weights are
// multiplied as they are, by exact sums. Three instructions make eight int4 operands.
//
// Of 32 values of K in order, a lane of the four that share a channel has eight, in one word or two: of int4 the even ones, then the
// odd. Planes lie in the order in which products meet these (prepare.cu).
#pragma once

#include "mixed.h"
#include "streams_sm90.cuh"

namespace qpass {

struct FixedProduct : Streams {
  Finish finish;
  TensorMap act_scale, act_sum;  // of a stage: one scale a token, and sums of each group
  const float* scale;            // [n, scales] of groups; else finish has it
  const int8_t* zero;
  int scales;
};

// kGroup: values of K that share a scale, or 0: all of a channel's do. kZeros: whether there are zero points.
template <typename Out_, bool kInt4_, int kGroup_, bool kZeros_, int kTokens_>
struct FixedShape {
  using Out = Out_;
  using Sum = float;
  static constexpr bool kInt4 = kInt4_, kGrouped = kGroup_ > 0, kZeros = kZeros_;
  static constexpr int kGroup = kGroup_, kTokens = kTokens_, kTiles = 1, kCluster = 1, kChannels = 256;
  static constexpr int kConsumers = 512, kThreads = kConsumers + 128;
  static constexpr int kStageK = 128, kRowBytes = kInt4 ? 64 : 128;
  static constexpr int kSpans = kGroup ? kStageK / kGroup : 1;  // of a stage, each with sums of its own
  static constexpr bool kPlanes = true;
  static constexpr int kBoxes = 2;
  static constexpr int kSideRow = kTokens * 4, kSumsAt = 256;  // copies go to multiples of 128
  static constexpr int kSideBytes = (kSumsAt + kSpans * kSideRow + 1023) / 1024 * 1024;
  static constexpr int kColumns = kTokens / 8;
  // of planes multiplied at the same time: the sums of both take registers
  static constexpr int kTogether = kTokens <= 32 ? 2 : 1;
};

// Scales and zero points of a lane's two channels, four neighbouring groups by the four lanes that share them, the next four on their
// way.
template <typename S>
class FixedScales {
 public:
  __device__ __forceinline__ FixedScales(const FixedProduct& p, int channel, int first)
      : p_(p), channel_(channel), group_(S::kGrouped ? first * S::kSpans & ~3 : 0) {
    fetch();
    take();
  }

  // Before group `group`, which follows the one before.
  __device__ __forceinline__ void go_to(int group, bool first) {
    if (S::kGrouped && !first && group % 4 == 0) take();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int lane = S::kGrouped ? (threadIdx.x & 28) | group % 4 : threadIdx.x % 32;
      scale[h] = S::kGrouped ? __shfl_sync(~0u, held_scale_[h], lane) : 1.f;
      if (S::kZeros) zero[h] = S::kGrouped ? __shfl_sync(~0u, held_zero_[h], lane) : held_zero_[h];
    }
  }

  float scale[2];
  int zero[2] = {};

 private:
  __device__ __forceinline__ void fetch() {
    const int group = S::kGrouped ? group_ + threadIdx.x % 4 : 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = channel_ + h * 8;
      const bool there = n < p_.n && group < p_.scales;
      const int64_t at = int64_t(n) * p_.scales + group;
      next_scale_[h] = S::kGrouped && there ? p_.scale[at] : 0.f;
      next_zero_[h] = S::kZeros && there ? p_.zero[at] : 0;
    }
    group_ += 4;
  }
  __device__ __forceinline__ void take() {
#pragma unroll
    for (int h = 0; h < 2; ++h) held_scale_[h] = next_scale_[h], held_zero_[h] = next_zero_[h] * (S::kInt4 ? 16 : 1);
    if (S::kGrouped) fetch();
  }

  const FixedProduct& p_;
  const int channel_;
  int group_;
  float held_scale_[2], next_scale_[2];
  int held_zero_[2], next_zero_[2];
};

// A stage's weights as operands of its four products. Nibbles stay in the upper half of their byte, sixteen times what they are.
template <typename S>
__device__ __forceinline__ void fixed_operands(uint32_t (&a)[4][4], const char* rows) {
  const int quarter = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int j = i / 2, h = i % 2;
    const char* line = rows + h * 8 * S::kRowBytes;
    if constexpr (S::kInt4) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(line + (j ^ (row / 2 & 3)) * 16 + quarter * 4);
      a[j][h] = word << 4 & 0xf0f0f0f0u, a[j][h + 2] = word & 0xf0f0f0f0u;
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(line + ((j * 2 + quarter / 2) ^ row) * 16 + quarter % 2 * 8);
      a[j][h] = words.x, a[j][h + 2] = words.y;
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) fixed_product(const __grid_constant__ FixedProduct p) {
  constexpr int kSums = S::kTokens / 2, kMmas = 4 / S::kSpans;  // of a group
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  const Ring<S> ring(start);
  ring.open(S::kConsumers / 32);
  const Tile<S> tile(p.m, p.n, blockIdx.x);
  const Share<S> share(p);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp >= S::kConsumers / 32) {
    limit_registers<32>();
    if (threadIdx.x == S::kConsumers) {
      copy_stages(p, ring, tile, share, S::kSideRow * (S::kZeros ? 1 + S::kSpans : 1), [&](int stage, int slot) {
        copy_box(ring.side(slot), &p.act_scale, tile.m0 * 4, stage, &ring.full[slot]);
        if (S::kZeros) copy_box(ring.side(slot) + S::kSumsAt, &p.act_sum, tile.m0 * 4, stage * S::kSpans, &ring.full[slot]);
      });
    }
    return;
  }
  raise_registers<112>();
  const int line = line_of<S>(warp, 0), quarter = threadIdx.x % 4;
  FixedScales<S> scales(p, tile.n0 + line, share.first);
  float sums[kSums] = {};
  int slot = 0, parity = 0;
  for (int i = 0; i < share.count; ++i) {
    wait(&ring.full[slot], parity);
    uint32_t a[4][4];
    fixed_operands<S>(a, ring.weights(slot) + line * S::kRowBytes);
    const uint64_t tokens = matrix_at(ring.tokens(slot));
#pragma unroll
    for (int span = 0; span < S::kSpans; ++span) {
      scales.go_to((share.first + i) * S::kSpans + span, i == 0);
      // Adds part * times to the sums; what zero points make of the tokens' sums goes with the low plane.
      auto promote = [&](int32_t (&part)[kSums], float times, bool low) {
        const char* side = ring.side(slot) + quarter * 8;
#pragma unroll
        for (int j = 0; j < kSums / 4; ++j) {  // columns of eight tokens, of which the lane has two
          const float2 by = *reinterpret_cast<const float2*>(side + j * 32);
          if (S::kZeros && low) {
            const int2 sum = *reinterpret_cast<const int2*>(side + S::kSumsAt + span * S::kSideRow + j * 32);
#pragma unroll
            for (int h = 0; h < 2; ++h) part[j * 4 + h * 2] -= scales.zero[h] * sum.x, part[j * 4 + h * 2 + 1] -= scales.zero[h] * sum.y;
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float scale = S::kGrouped ? scales.scale[h] * times : times;
            sums[j * 4 + h * 2] += scale * by.x * float(part[j * 4 + h * 2]);
            sums[j * 4 + h * 2 + 1] += scale * by.y * float(part[j * 4 + h * 2 + 1]);
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
          const uint64_t with = tokens + plane * (Ring<S>::kBox >> 4) + mma * kNextInRow;
          WgmmaInt8<S::kTokens>::run(part[j / kMmas], a[mma], with, j % kMmas > 0);
        }
        commit_products();
        wait_products<0>();
        if constexpr (S::kTogether == 2) {
#pragma unroll
          for (int j = 0; j < kSums; ++j) part[0][j] = part[0][j] * 256 + part[1][j];
          promote(part[0], 1.f, true);
        } else {
          promote(part[0], first ? 1.f : 256.f, first == 1);
        }
      }
    }
    ring.free(slot);
    if (++slot == Ring<S>::kStages) slot = 0, parity ^= 1;
  }
  wait_for_kernel_before();
  leave<S>(p.finish, p, tile, warp, 0, [&](int j, int c) { return sums[j * 4 + c]; });
}

template <typename Out, bool kInt4, int kGroup, bool kZeros>
cudaError_t fixed_by_tokens(FixedProduct p, const MixedGemm& g, const FixedActivations& x, const Device& device, cudaStream_t stream) {
  auto with = [&](auto tokens) -> cudaError_t {
    using S = FixedShape<Out, kInt4, kGroup, kZeros, tokens()>;
    static OncePerDevice allowed;
    const int64_t stages = ceil_div(p.k, S::kStageK), row = x.side * 4;
    if (cudaError_t e = map_matrix(&p.act_scale, x.scale, stages, row, row, 1, S::kSideRow, false)) return e;
    if (cudaError_t e = map_matrix(&p.act_sum, x.sum, stages * S::kSpans, row, row, S::kSpans, S::kSideRow, false)) return e;
    return launch_streaming<S>(
        fixed_product<S>, p, g.weight, kInt4 ? g.k / 2 : g.k, x.high, x.padded, device, allowed, stream);
  };
  if (g.m <= 16) return with(std::integral_constant<int, 16>());
  if (g.m <= 32) return with(std::integral_constant<int, 32>());
  return with(std::integral_constant<int, 64>());
}

template <typename Out, bool kInt4>
cudaError_t fixed_sm90(const MixedGemm& g, const FixedActivations& x, const Device& device, cudaStream_t stream) {
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
