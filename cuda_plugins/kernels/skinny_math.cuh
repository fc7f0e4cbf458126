// What a warp of the few-token kernel multiplies in a stage.
#pragma once

#include "skinny_shape.cuh"
#include "vectors.cuh"
#include "weight_codes.cuh"

namespace qpass {

// Where a thread stands: its lane holds the rows `row` and `row` + 8 of an mma tile of channels, and of every run of K, which four
// lanes share, the part `quarter`.
struct Place {
  __device__ Place() : warp(threadIdx.x / 32), lane(threadIdx.x % 32), row(lane / 4), quarter(lane % 4) {}
  int warp, lane, row, quarter;
};

// Scales and zero points of a stage: of each row every lane holds those of spans `quarter`, `quarter` + 4, …; they are handed
// round.
template <typename S>
struct Held {
  static constexpr int kHeld = S::kSpans > 4 ? S::kSpans / 4 : 1;
  float scale[kHeld][S::kTiles][2];
  int zero[kHeld][S::kTiles][2];
};

template <typename T, int kCount>
__device__ __forceinline__ T handed(const T (&held)[kCount][2], int tile, int h, int span, const Place& at) {
  return __shfl_sync(~0u, held[tile][h], (at.lane & ~3) | span % 4);
}

// A lane's run of a unit, of both its rows of a tile.
template <typename S>
__device__ __forceinline__ void load_runs(
    const char* weights, const Place& at, int tile, int unit, uint32_t (&words)[2][S::kRun / 4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int byte = unit * 4 * S::kRun + at.quarter * S::kRun;
    const int line = (at.warp * S::kTiles + tile) * 16 + h * 8 + at.row;
    const char* from = weights + S::weight_place(line, byte / 16) + byte % 16;
    *reinterpret_cast<Pack<uint32_t, S::kRun / 4>*>(words[h]) = *reinterpret_cast<const Pack<uint32_t, S::kRun / 4>*>(from);
  }
}

// Weights as operands of the activations' type: int8, or bfloat16.
template <typename S, typename Accumulator>
__device__ __forceinline__ void multiply(const Skinny& p, const char* weights, const Place& at, const Held<S>& held,
    const int (&row_zero)[S::kTiles][2], Accumulator (&acc)[S::kTiles][S::kTokens][4]) {
  using Act = typename S::Act;
  constexpr int kChunkWords = S::kRun / S::kChunks / 4;  // of the weight that go with a chunk
  const char* acts = weights + S::kWeights;
#pragma unroll
  for (int unit = 0; unit < S::kUnits; ++unit) {
    const int span = unit * S::kUnitK / S::kSpanK;
    Accumulator part[S::kTiles][S::kTokens][4] = {};
    auto& sums = S::kByUnit ? part : acc;
    uint32_t words[S::kTiles][2][S::kRun / 4];
    Offset<Act, S::kInt4> offset[S::kTiles][2];
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) {
      load_runs<S>(weights, at, tile, unit, words[tile]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int zero = row_zero[tile][h];
        if (S::kGrouped && p.zero) zero = handed(held.zero[span / 4], tile, h, span, at);
        offset[tile][h].set(zero);
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      uint32_t a[S::kTiles][2][4];  // of each mma of the two that a chunk makes
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t codes[4];
          weight_codes<Act, S::kInt4>(words[tile][h] + chunk * kChunkWords, codes, offset[tile][h]);
          a[tile][0][h] = codes[0], a[tile][0][h + 2] = codes[1];
          a[tile][1][h] = codes[2], a[tile][1][h + 2] = codes[3];
        }
      }
#pragma unroll
      for (int j = 0; j < S::kPlanes * S::kTokens; ++j) {
        const int from = (unit * 4 + at.quarter) * S::kChunks + chunk;
        const uint4 b = *reinterpret_cast<const uint4*>(acts + S::act_place(j * 8 + at.row, from));
#pragma unroll
        for (int tile = 0; tile < S::kTiles; ++tile) {
          auto& sum = sums[tile][j % S::kTokens];
          Mma<Act>::run(sum, a[tile][0], b.x, b.y);
          Mma<Act>::run(sum, a[tile][1], b.z, b.w);
        }
      }
    }
    if constexpr (S::kByUnit) {
#pragma unroll
      for (int j = 0; j < S::kTiles * 2; ++j) {
        const int tile = j / 2, h = j % 2;
        const float scale = S::kGrouped ? handed(held.scale[span / 4], tile, h, span, at) : 1.f;
#pragma unroll
        for (int token = 0; token < S::kTokens; ++token) {
          acc[tile][token][h * 2] += scale * part[tile][token][h * 2];
          acc[tile][token][h * 2 + 1] += scale * part[tile][token][h * 2 + 1];
        }
      }
    }
  }
}

// Weights as they are, beside Fixed activations. An mma takes 32 values of K: eight nibbles of each of the four lanes, those of
// the low halves of bytes first, or eight bytes; the activations lie in this order. Nibbles stay in the upper half of their byte,
// which makes them sixteen times what they are.
template <typename S>
__device__ __forceinline__ void multiply_fixed(const Skinny& p, const char* weights, const Place& at, const Held<S>& held,
    const int (&row_zero)[S::kTiles][2], float (&acc)[S::kTiles][S::kTokens][4]) {
  constexpr int kUnits = S::kSpanK / S::kUnitK, kMmas = S::kUnitK / 32, kWords = S::kRun / 4;  // of a span; of a unit
  constexpr int kTogether = kMmas > 1 ? 2 : 1;                                                 // mmas a load of activations
  const char* acts = weights + S::kWeights;
  const char* side = weights + S::kSideAt;
#pragma unroll
  for (int span = 0; span < S::kSpans; ++span) {
    uint32_t a[S::kTiles][kUnits * kMmas][4];
#pragma unroll
    for (int i = 0; i < S::kTiles * kUnits; ++i) {
      const int tile = i / kUnits, unit = i % kUnits;
      uint32_t words[2][kWords];
      load_runs<S>(weights, at, tile, span * kUnits + unit, words);
#pragma unroll
      for (int j = 0; j < kMmas * 2; ++j) {
        const int h = j % 2, mma = j / 2;
        uint32_t(&to)[4] = a[tile][unit * kMmas + mma];
        if constexpr (S::kInt4) {
          to[h] = words[h][mma] << 4 & 0xf0f0f0f0u, to[h + 2] = words[h][mma] & 0xf0f0f0f0u;
        } else {
          to[h] = words[h][mma * 2], to[h + 2] = words[h][mma * 2 + 1];
        }
      }
    }
    // Apart, the planes' sums do not wait for one another; with many tokens there are others to do meanwhile, and no registers.
    constexpr bool kApart = S::kTiles * S::kTokens <= 2;
    constexpr int kSteps = kUnits * kMmas / kTogether;
    int parts[kApart ? 2 : 1][S::kTiles][S::kTokens][4] = {};
    auto& part = parts[0];  // of the high plane: at most 2^7 * 2^7 * 128 before it is shifted
#pragma unroll
    for (int step = 0; step < kSteps * 2; ++step) {
      const int plane = kApart ? step % 2 : step / kSteps, i = kApart ? step / 2 : step % kSteps;
      if (!kApart && step == kSteps) {
#pragma unroll
        for (int j = 0; j < S::kTiles * S::kTokens * 4; ++j) part[j / (S::kTokens * 4)][j / 4 % S::kTokens][j % 4] *= 256;
      }
      const int unit = i * kTogether / kMmas, mma = i * kTogether % kMmas;
      const int byte = ((span * kUnits + unit) * 4 + at.quarter) * S::kRunActs + mma * 8;
#pragma unroll
      for (int token = 0; token < S::kTokens; ++token) {
        const char* from = acts + S::act_place((plane * S::kTokens + token) * 8 + at.row, byte / 16) + byte % 16;
        uint32_t b[kTogether * 2];
        *reinterpret_cast<Pack<uint32_t, kTogether * 2>*>(b) = *reinterpret_cast<const Pack<uint32_t, kTogether * 2>*>(from);
#pragma unroll
        for (int j = 0; j < S::kTiles * kTogether; ++j) {
          const int tile = j / kTogether, with = j % kTogether;
          auto& sum = parts[kApart ? plane : 0][tile][token];
          Mma<int8_t>::run(sum, a[tile][unit * kMmas + mma + with], b[with * 2], b[with * 2 + 1]);
        }
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int j = 0; j < S::kTiles * S::kTokens * 4; ++j) {
        const int tile = j / (S::kTokens * 4), token = j / 4 % S::kTokens, c = j % 4;
        part[tile][token][c] = part[tile][token][c] * 256 + parts[1][tile][token][c];
      }
    }
    const char* scales = side + span * S::kSpanK / kBlockK * S::kSideRow;
    const char* sums = side + (S::kStageK / kBlockK + span) * S::kSideRow;
    float scale[S::kTiles][2], zero[S::kTiles][2] = {};
#pragma unroll
    for (int j = 0; j < S::kTiles * 2; ++j) {
      const int tile = j / 2, h = j % 2;
      scale[tile][h] = S::kGrouped ? handed(held.scale[span / 4], tile, h, span, at) : 1.f;
      if (!p.zero) continue;
      const int code = S::kGrouped ? handed(held.zero[span / 4], tile, h, span, at) : row_zero[tile][h];
      zero[tile][h] = float(S::kInt4 ? code * 16 : code);
    }
#pragma unroll
    for (int token = 0; token < S::kTokens; ++token) {
      const int column = (token * 8 + at.quarter * 2) * 4;  // and the next
      const float2 by = *reinterpret_cast<const float2*>(scales + column);
      float value[S::kTiles][4];
#pragma unroll
      for (int j = 0; j < S::kTiles * 4; ++j) value[j / 4][j % 4] = float(part[j / 4][token][j % 4]);
      if (p.zero) {  // integers would overflow where zero points are far from the weights
        const int2 sum = *reinterpret_cast<const int2*>(sums + column);
#pragma unroll
        for (int j = 0; j < S::kTiles * 4; ++j) {
          float& v = value[j / 4][j % 4];
          v = fmaf(-zero[j / 4][j % 4 / 2], float(j % 2 ? sum.y : sum.x), v);
        }
      }
#pragma unroll
      for (int j = 0; j < S::kTiles * 4; ++j) {
        const int tile = j / 4, c = j % 4;
        acc[tile][token][c] += scale[tile][c / 2] * (c % 2 ? by.y : by.x) * value[tile][c];
      }
    }
  }
}

}  // namespace qpass
