// What products of tokens of two int8 planes (fixed.cuh) with integer weights are made of on Hopper: weights are multiplied as they are, by
// exact sums. Three instructions make eight int4 operands.
//
// Of 32 values of K in order, a lane of the four that share a channel has eight, in one word or two: of int4 the even ones, then the
// odd. Planes lie in the order in which products meet these.
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
template <bool kInt4_, int kGroup_, bool kZeros_, int kTokens>
struct FixedOf {
  static constexpr bool kInt4 = kInt4_, kGrouped = kGroup_ > 0, kZeros = kZeros_, kStays = false;
  static constexpr int kGroup = kGroup_;
  // A stage is as wide as a box can be: the wider, the sooner it is there.
  static constexpr int kRowBytes = 128, kStageK = kRowBytes * (kInt4 ? 2 : 1);
  static constexpr int kBlocks = kStageK / kBlockK;              // of a stage, each with scales of the tokens
  static constexpr int kSpans = kGroup ? kBlockK / kGroup : 1;   // of a block, each with sums of its own
  static constexpr int kGroups = kGrouped ? kBlocks * kSpans : 0;  // of a stage
  // The planes, one below the other, are multiplied as if they were one of twice as many tokens, as far as there are registers for the
  // sums of both: few columns take as long as more.
  static constexpr int kPlanes = 2;
  static constexpr bool kStacked = kTokens <= 32;
  static constexpr int kSums = kTokens / 2, kParts = kStacked ? 2 * kSums : kSums;  // that a thread has, and of a product
};

// What a lane's two channels are multiplied by, and their zero points, ready for where in K it is.
//
// S::Scales is the stream that they come of, `room` its shared memory; of the groups from `first` to `end`.
template <typename S>
class FixedScales {
 public:
  __device__ __forceinline__ FixedScales(char* room, const FixedProduct& p, int channel, int first, int end)
      : stream_(room, p.scale, S::kZeros ? p.zero : nullptr, p.n, p.scales, channel, first, end), first_(first) {
    if constexpr (!S::kGrouped && S::kZeros) {
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
      if (group % 4 == 0 || group == first_) take();
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

  typename S::Scales stream_;
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

// A block's integers as tokens have them in shared memory: planes from `matrix` on, scales [tokens] and sums [spans, tokens].
struct FixedBlock {
  uint64_t matrix;
  const float* scale;
  const float* sum;  // of integers of 16 bits, which are exact
};

// Adds what a block of K gives to the sums: `rows` is where the lane's first channel begins, `group` the block's first. By a warpgroup,
// which keeps `part` for the products.
template <typename S>
__device__ __forceinline__ void add_block(float (&sums)[S::kSums], int32_t (&part)[S::kParts], const char* rows, int block,
    const FixedBlock& x, FixedScales<S>& scales, int group) {
  constexpr int kSums = S::kSums, kTokens = kSums * 2, kMmas = 4 / S::kSpans;  // of a group
  const int quarter = threadIdx.x % 4;
  uint32_t a[4][4];
  fixed_operands<S>(a, rows, block);
#pragma unroll
  for (int span = 0; span < S::kSpans; ++span) {
    scales.go_to(group + span);
    auto promote = [&](const auto& of) {  // adds them to the sums
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j) {  // columns of eight tokens, of which the lane has two
        const float2 by = *reinterpret_cast<const float2*>(x.scale + quarter * 2 + j * 8);
        float four[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) four[c] = float(of[j * 4 + c]);
        if (S::kZeros) {  // integers would overflow where zero points are far from the weights
          const float2 sum = *reinterpret_cast<const float2*>(x.sum + span * kTokens + quarter * 2 + j * 8);
#pragma unroll
          for (int c = 0; c < 4; ++c) four[c] = fmaf(-scales.zero[c / 2], c % 2 ? sum.y : sum.x, four[c]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sums[j * 4 + h * 2] += scales.scale[h] * by.x * four[h * 2];
          sums[j * 4 + h * 2 + 1] += scales.scale[h] * by.y * four[h * 2 + 1];
        }
      }
    };
    auto multiply = [&](uint64_t with, int adds) {  // to what there is, or to nothing
#pragma unroll
      for (int j = 0; j < kMmas; ++j) settle(a[span * kMmas + j]);
      if (adds) settle(part);
      begin_products();
#pragma unroll
      for (int j = 0; j < kMmas; ++j) {
        WgmmaInt8<S::kParts * 2>::run(part, a[span * kMmas + j], with + (span * kMmas + j) * kNextInRow, j > 0 || adds);
      }
      commit_products();
      wait_products<0>();
      settle(part);
    };
    if constexpr (S::kStacked) {
      multiply(x.matrix, 0);
      int32_t both[kSums];
#pragma unroll
      for (int j = 0; j < kSums; ++j) both[j] = part[j] * 256 + part[kSums + j];
      promote(both);
    } else {
      multiply(x.matrix, 0);
#pragma unroll
      for (int j = 0; j < kSums; ++j) part[j] *= 256;
      multiply(x.matrix + (kTokens * kBoxBytes >> 4), 1);
      promote(part);
    }
  }
}

}  // namespace qpass
