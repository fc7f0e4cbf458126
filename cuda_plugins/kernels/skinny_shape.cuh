// The few-token kernel's tiles: what of the operands lies where in shared memory, and how it gets there.
#pragma once

#include "fixed.cuh"
#include "gemm.h"
#include "mma.cuh"

namespace qpass {

struct Skinny {
  Gemm g;              // a: activations, b: the weight; k counts values, ldb bytes
  int64_t plane;       // elements from one plane of the activations to the next
  const float* scale;  // grouped: [n, scales]; else unused
  const int8_t* zero;  // grouped: [n, scales], else [n]; or null
  int64_t scales;      // a row
  int group_shift;     // log2 of the group size
  bool follows;        // the activations come of the kernel before, and nothing else that is read here does
  const float* act_scale;    // of Fixed activations: [blocks of kBlockK, side], what their integers are multiplied by
  const int32_t* act_sum;    // and [spans, side], the sums of the integers
  int64_t side;              // m, rounded up to 4
  const void* x;             // or what they are made of here, where few read it: [m, x_k] of g.out, rows 16-byte aligned
  const float* x_scale;      // [x_k], or null
  int64_t x_k;
  void* partial;       // [splits, m, n] sums, with more than one split
  int splits;
  int64_t stages_a_split;
};

constexpr int kMultiprocessor = 227 << 10;  // shared memory of Hopper's, of which a block takes 1 KB more than it asks for
constexpr int kMostOfBlock = 99 << 10;      // shared memory that a block may have on every GPU from Ampere on

// Act: of the activations. kSpanK: values of K that share a sum: a group's, or kBlockK. kTokens, kTiles: mma tiles of tokens a
// block, of output channels a warp. kMade: at most kMadeTokens tokens become Fixed here.
constexpr int kMadeTokens = 4;
template <typename Act_, bool kInt4_, int kSpanK_, bool kGrouped_, int kPlanes_, int kTokens_, int kTiles_, bool kMade_ = false>
struct SkinnyShape {
  using Act = Act_;
  static constexpr bool kInt4 = kInt4_, kGrouped = kGrouped_, kFixed = std::is_same_v<Act, Fixed>;
  static constexpr bool kMade = kMade_;
  static constexpr int kSpanK = kSpanK_, kPlanes = kPlanes_, kTokens = kTokens_, kTiles = kTiles_;
  using Multiplied = std::conditional_t<kFixed, int8_t, Act>;                                      // by the tensor cores
  using Accumulator = std::conditional_t<kFixed, float, typename Mma<Multiplied>::Accumulator>;    // of all of K
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr bool kByUnit = kGrouped || kPlanes > 1;  // a unit has a sum of its own
  static constexpr int kRows = kWarps * 16 * kTiles;
  // of a weight's row a lane takes at once: of a group no more than is there for each of four
  static constexpr int kRun = kSpanK * (kInt4 ? 1 : 2) / 8 < 16 ? kSpanK * (kInt4 ? 1 : 2) / 8 : 16;
  // of a weight's row, a stage: less where tokens take much, but never less than a group
  static constexpr int kRowBytes = kTokens >= 4 && (kInt4 || (sizeof(Act) == 2 && !kGrouped)) ? 64 : 128;
  static constexpr int kStageK = kRowBytes * (kInt4 ? 2 : 1);
  static_assert(!(kGrouped || kFixed) || kStageK % kBlockK == 0);
  static constexpr int kActBytes = kStageK * sizeof(Act);            // of a token, a stage
  static constexpr int kUnits = kRowBytes / (4 * kRun);
  static constexpr int kUnitK = kStageK / kUnits;
  static constexpr int kSpans = kStageK / kSpanK;
  static constexpr int kRunActs = kUnitK / 4 * sizeof(Act);          // bytes of a token that go with a lane's run
  static constexpr int kChunks = kRunActs / 16;
  static constexpr int kWeights = kRows * kRowBytes;                 // bytes a stage
  static constexpr int kSideRow = kTokens * 8 * 4;                   // of a scale or a sum of each token
  static constexpr int kSideRows = kFixed ? kStageK / kBlockK + kSpans : 0;
  static constexpr int kSideAt = kWeights + kPlanes * kTokens * 8 * kActBytes;
  static constexpr int kStageBytes = kSideAt + kSideRows * kSideRow;
  // a multiprocessor: more tiles take more registers, and so do small groups, whose scales are many
  static constexpr int kHolding = kTokens == 1 ? 4 : kTokens < 8 && kRun > 4 && (kInt4 || !kGrouped) ? 3 : 2;
  static constexpr int kShare = kMultiprocessor / (kHolding > 3 ? 3 : kHolding) - 1024;
  static constexpr int kShared = kShare < kMostOfBlock ? kShare : kMostOfBlock;
  static constexpr int kStages = kShared / kStageBytes < 4 ? kShared / kStageBytes : 4;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kFitting = kMultiprocessor / (kBytes + 1024);
  static constexpr int kBlocks = kFitting < kHolding ? kFitting : kHolding;
  static_assert(kStages >= 2);

  // Where the chunks of a row lie in shared memory: those that lanes of one phase of a load read fall on different banks.
  static __device__ __forceinline__ int weight_place(int row, int chunk) {
    constexpr int kTogether = 128 / kRowBytes;  // rows that cover all banks as they are
    return row * kRowBytes + (chunk ^ (row / kTogether % (32 / kRun / kTogether) * (kRun / 4))) * 16;
  }
  static __device__ __forceinline__ int act_place(int token, int chunk) {
    int odd = token & 1;
    if (kRunActs == 8) return token * kActBytes + (chunk ^ (token & 3) << 1) * 16;
    int flip = kChunks == 1 ? odd << 2 : kChunks == 2 ? odd : (chunk >> 3 & 1) ^ odd << 1;
    return token * kActBytes + (chunk ^ flip) * 16;
  }
};

// The copies of one thread: in every stage the same 16-byte chunk of every kStep-th row of the weight and of the activations.
// These rows lie at fixed distances in shared memory too, since the places of chunks repeat after fewer rows.
template <typename S>
class Fetcher {
 public:
  __device__ Fetcher(const Skinny& p, char* shared, int64_t n0, int64_t m0, int64_t first)
      : weight_stride_(kWeightStep * p.g.ldb),
        token_stride_(kTokenStep * p.g.lda * int64_t(sizeof(typename S::Act))),
        plane_stride_(p.plane * int64_t(sizeof(typename S::Act))) {
    const int row = threadIdx.x / kWeightChunks, chunk = threadIdx.x % kWeightChunks;
    weight_ = static_cast<const char*>(p.g.b) + (n0 + row) * p.g.ldb + first * S::kRowBytes + chunk * 16;
    weight_bytes_ = int((S::kInt4 ? p.g.k / 2 : p.g.k) - first * S::kRowBytes) - chunk * 16;
    rows_ = int(min(p.g.n - n0, int64_t(S::kRows))) - row;
    weight_to_ = shared + S::weight_place(row, chunk);
    const int token = threadIdx.x / kTokenChunks, piece = threadIdx.x % kTokenChunks;
    tokens_ = token < S::kTokens * 8 ? int(min(p.g.m - m0, int64_t(S::kTokens * 8))) - token : kNone;
    act_ = static_cast<const char*>(p.g.a) + (m0 + token) * p.g.lda * int64_t(sizeof(typename S::Act)) +
           first * S::kActBytes + piece * 16;
    act_bytes_ = int((p.g.k - first * S::kStageK) * int64_t(sizeof(typename S::Act))) - piece * 16;
    act_to_ = shared + S::kWeights + S::act_place(token, piece);
    if constexpr (S::kFixed && !S::kMade) {
      constexpr int kPieces = S::kSideRow / 16, kScales = S::kStageK / kBlockK;  // rows of scales come before those of sums
      static_assert(S::kSideRows * kPieces <= S::kThreads);
      const int line = threadIdx.x / kPieces, column = threadIdx.x % kPieces * 4;
      const bool scales = line < kScales;
      const int64_t at = scales ? first * kScales + line : first * S::kSpans + line - kScales;
      const int64_t rows = ceil_div(p.g.k, int64_t(scales ? kBlockK : S::kSpanK));
      side_step_ = (scales ? kScales : S::kSpans) * p.side * 4;
      side_ = (scales ? reinterpret_cast<const char*>(p.act_scale) : reinterpret_cast<const char*>(p.act_sum)) +
              (at * p.side + m0 + column) * 4;
      side_bytes_ = int(max(min(p.g.m - m0 - column, int64_t(4)), int64_t(0))) * 4;
      side_rows_ = line < S::kSideRows ? int(rows - at) : kNone;
      side_rows_step_ = scales ? kScales : S::kSpans;
      side_to_ = shared + S::kSideAt + threadIdx.x * 16;
    }
  }

  // Copies the next stage's weights to a slot.
  __device__ __forceinline__ void fetch_weights(int slot) {
    const int offset = slot * S::kStageBytes;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      bool there = i * kWeightStep < rows_ && weight_bytes_ > 0;
      copy_async(weight_to_ + offset + i * kWeightStep * S::kRowBytes, weight_ + i * weight_stride_, there ? 16 : 0);
    }
    weight_ += S::kRowBytes, weight_bytes_ -= S::kRowBytes;
  }

  // And its activations.
  __device__ __forceinline__ void fetch_tokens(int slot) {
    const int offset = slot * S::kStageBytes;
#pragma unroll
    for (int i = 0; i < S::kPlanes * kTokenCopies; ++i) {
      const int plane = i / kTokenCopies, copy = i % kTokenCopies;
      if (kTokenStep > S::kTokens * 8 && tokens_ == kNone) continue;  // more threads than chunks
      bool there = copy * kTokenStep < tokens_ && act_bytes_ > 0;
      int line = plane * S::kTokens * 8 + copy * kTokenStep;
      copy_async(act_to_ + offset + line * S::kActBytes, act_ + plane * plane_stride_ + copy * token_stride_, there ? 16 : 0);
    }
    act_ += S::kActBytes, act_bytes_ -= S::kActBytes;
    if constexpr (S::kFixed) {
      if (side_rows_ == kNone) return;
      copy_async(side_to_ + offset, side_, side_rows_ > 0 ? side_bytes_ : 0);
      side_ += side_step_, side_rows_ = max(side_rows_ - side_rows_step_, 0);
    }
  }

 private:
  static constexpr int kWeightChunks = S::kRowBytes / 16, kTokenChunks = S::kActBytes / 16;
  static constexpr int kWeightStep = S::kThreads / kWeightChunks, kTokenStep = S::kThreads / kTokenChunks;
  static constexpr int kWeightCopies = S::kRows / kWeightStep;
  static constexpr int kTokenCopies = S::kTokens * 8 > kTokenStep ? S::kTokens * 8 / kTokenStep : 1;
  static constexpr int kNone = -(1 << 30);  // of tokens_: the thread copies none
  static_assert(kWeightStep % 8 == 0 && kTokenStep % 2 == 0);
  static_assert(kWeightCopies * kWeightStep == S::kRows);

  const int64_t weight_stride_, token_stride_, plane_stride_;
  const char *weight_, *act_;
  char *weight_to_, *act_to_;
  int weight_bytes_, act_bytes_;  // left of the row from here
  int rows_, tokens_;             // left of the matrix from this thread's first
  const char* side_;  // the 16 bytes of a row of scales or of sums that this thread copies
  char* side_to_;
  int64_t side_step_;
  int side_bytes_, side_rows_, side_rows_step_;
};

}  // namespace qpass
