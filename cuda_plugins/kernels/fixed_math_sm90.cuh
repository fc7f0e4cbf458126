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

constexpr int64_t kAdding = 600;  // up to 16 tokens' splits: see share_of

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
  static constexpr bool kAhead = kTokens <= 16;  // there are registers for two groups' products, and operands of two blocks
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
      if (group % 4 == 0 || group == first_) {
        stream_.next();
#pragma unroll
        for (int h = 0; h < 2; ++h) held_zero_[h] = float(stream_.zero(h, threadIdx.x % 4) * kTimes);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scale[h] = stream_.scale(h, group);
        if (S::kZeros) zero[h] = of_group(held_zero_[h], group);
      }
    }
  }

  float scale[2] = {1.f, 1.f}, zero[2] = {};

 private:
  static constexpr int kTimes = S::kInt4 ? 16 : 1;  // what nibbles are multiplied as

  typename S::Scales stream_;
  const int first_;
  float held_zero_[2];  // this lane's of four groups
};

// A block's weights as operands of its four products. Nibbles stay in the upper half of their byte, sixteen times what they are.
template <typename S>
__device__ __forceinline__ void fixed_operands(uint32_t (&a)[4][4], const char* rows, int block) {
  const int quarter = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
  const auto first = address_in_shared(rows) + row * 16 + quarter * 4;  // rows are at multiples of 128: chunks are found by their bits
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int j = i / 2, h = i % 2;
    if constexpr (S::kInt4) {
      const uint32_t word = word_in_shared((first ^ (block * 4 + j) * 16) + h * 8 * S::kRowBytes);
      a[j][h] = word << 4 & 0xf0f0f0f0u, a[j][h + 2] = word & 0xf0f0f0f0u;
    } else {
      const char* line = rows + h * 8 * S::kRowBytes;
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

// Where products meet them: eight values of a token, which lane i of kFixedLanes has, if the token is `there`. By all lanes of a warp;
// `matrix`, `scale` and `sum` are the block's.
template <typename S>
__device__ __forceinline__ void put_fixed(const FixedCodes& codes, bool there, int token, char* matrix, float* scale, float* sum) {
  constexpr int kLanes = S::kGroup && S::kGroup < kBlockK ? S::kGroup / kFixedV : kFixedLanes;  // that share a sum
  const int lane = threadIdx.x % kFixedLanes;
  const int sum_of_span = S::kZeros ? sum_of_lanes(codes.sum, kLanes) : 0;
  if (!there) return;
  auto store = [&](int plane, int half, uint32_t four) {
    char* const row = matrix + (plane * S::kTokens + token) * kBoxBytes;
    *reinterpret_cast<uint32_t*>(row + ((lane / 4 * 2 + half) ^ token % 8) * 16 + lane % 4 * 4) = four;
  };
  store(0, 0, codes.high.x), store(0, 1, codes.high.y), store(1, 0, codes.low.x), store(1, 1, codes.low.y);
  if (lane == 0) scale[token] = codes.scale;
  if (S::kZeros && lane % kLanes == 0) sum[lane / kLanes * S::kTokens + token] = float(sum_of_span);
}

// Asks for the products of a group of a block: of both planes at once, or where they are multiplied one by one, of the high one and
// then, beside what that gave, of the low one.
template <typename S>
__device__ __forceinline__ void multiply(int32_t (&part)[S::kParts], uint32_t (&a)[4][4], uint64_t matrix, int span, int plane = 0) {
  constexpr int kMmas = 4 / S::kSpans;
  const uint64_t with = matrix + plane * (S::kSums * 2 * kBoxBytes >> 4);
#pragma unroll
  for (int j = 0; j < kMmas; ++j) settle(a[span * kMmas + j]);
  if (plane) settle(part);
  begin_products();
#pragma unroll
  for (int j = 0; j < kMmas; ++j) {
    WgmmaInt8<S::kParts * 2>::run(part, a[span * kMmas + j], with + (span * kMmas + j) * kNextInRow, j > 0 || plane);
  }
  commit_products();
}

// Adds products of a group, of both planes, to the sums: where there are registers, by way of `within`, the sums of a block, whose groups
// share the tokens' scales.
template <typename S>
__device__ __forceinline__ void add_products_of(float (&sums)[S::kSums], float (&within)[S::kSums], const int32_t (&of)[S::kSums],
    const FixedBlock& x, int span, const FixedScales<S>& scales) {
  constexpr int kTokens = S::kSums * 2;
  const int quarter = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < S::kSums / 4; ++j) {  // columns of eight tokens, of which the lane has two
    float four[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) four[c] = float(of[j * 4 + c]);
    if (S::kZeros) {  // integers would overflow where zero points are far from the weights
      const float2 sum = *reinterpret_cast<const float2*>(x.sum + span * kTokens + quarter * 2 + j * 8);
#pragma unroll
      for (int c = 0; c < 4; ++c) four[c] = fmaf(-scales.zero[c / 2], c % 2 ? sum.y : sum.x, four[c]);
    }
    const float2 by = *reinterpret_cast<const float2*>(x.scale + quarter * 2 + j * 8);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = j * 4 + c;
      const float scale = scales.scale[c / 2], of_token = c % 2 ? by.y : by.x;
      if constexpr (S::kSpans == 1 || !S::kStacked) {
        sums[i] += scale * of_token * four[c];
      } else {
        within[i] = span ? fmaf(scale, four[c], within[i]) : scale * four[c];
        if (span + 1 == S::kSpans) sums[i] = fmaf(of_token, within[i], sums[i]);
      }
    }
  }
}

// Adds up a team's `count` stages, whose groups begin with `group`. `block_at(turn, i, block)` is a block of the tokens of stage i.
// Of few tokens, a group's products are under way while operands of the next are made and sums of the one before brought to float.
template <typename S, typename BlockAt>
__device__ __forceinline__ void add_stages(float (&sums)[S::kSums], const Ring<S>& ring, Turn<S> turn, int line, int count, int group,
    FixedScales<S>& scales, BlockAt block_at) {
  constexpr int kSteps = S::kBlocks * S::kSpans, kAtOnce = S::kAhead ? 2 : 1;
  uint32_t a[kAtOnce][4][4];
  int32_t part[kAtOnce][S::kParts];
  float within[S::kSums];
  for (int i = 0; i < count; ++i, turn.template next<S::kTeams>()) {
    wait(&ring.full[turn.slot], turn.parity);
    FixedBlock blocks[S::kBlocks];
    auto ask = [&](int step) {
      const int block = step / S::kSpans, span = step % S::kSpans;
      if (span == 0) {
        fixed_operands<S>(a[block % kAtOnce], ring.weights(turn.slot) + line * S::kRowBytes, block);
        blocks[block] = block_at(turn, i, block);
      }
      multiply<S>(part[step % kAtOnce], a[block % kAtOnce], blocks[block].matrix, span);
    };
    auto finish = [&](int step) {
      const FixedBlock& x = blocks[step / S::kSpans];
      int32_t(&of)[S::kParts] = part[step % kAtOnce];
      settle(of);
      scales.go_to(group++);
      int32_t both[S::kSums];
      if constexpr (S::kStacked) {
#pragma unroll
        for (int j = 0; j < S::kSums; ++j) both[j] = of[j] * 256 + of[S::kSums + j];
      } else {
#pragma unroll
        for (int j = 0; j < S::kSums; ++j) of[j] *= 256;
        multiply<S>(of, a[step / S::kSpans % kAtOnce], x.matrix, step % S::kSpans, 1);
        wait_products<0>();
        settle(of);
#pragma unroll
        for (int j = 0; j < S::kSums; ++j) both[j] = of[j];
      }
      add_products_of<S>(sums, within, both, x, step % S::kSpans, scales);
    };
#pragma unroll
    for (int step = 0; step < kSteps + kAtOnce - 1; ++step) {
      if (step < kSteps) ask(step);
      if (step < kAtOnce - 1) continue;
      if (step < kSteps) wait_products<kAtOnce - 1>();
      else wait_products<0>();
      finish(step - kAtOnce + 1);
    }
    ring.free(turn.slot);
  }
}

}  // namespace qpass
