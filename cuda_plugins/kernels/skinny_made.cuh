// Activations of one to four tokens that become Fixed in the few-token kernel itself: what a kernel ahead of it would do takes less
// than its launch. Every block makes those of its share of K.
#pragma once

#include "skinny_shape.cuh"
#include "vectors.cuh"

namespace qpass {

// Sixteen lanes make a block of kBlockK of a token. Of a stage there are so few that lanes take turns, by stage.
template <typename S>
class Maker {
 public:
  __device__ Maker(const Skinny& p, char* shared, int64_t first) : p_(p), shared_(shared), first_(first) {}

  // Values of the lane's block of a stage, on their way, if it is among those there are and the block has one.
  struct Ahead {
    Bits<half, kFixedV> x;  // or bfloat16
    int job;                // token * kBlocks + block, or beyond those there are
  };

  __device__ __forceinline__ Ahead ask(int stage, int stages) const {
    Ahead ahead{};
    ahead.job = int(threadIdx.x / kFixedLanes - stage * jobs()) & kTeams - 1;
    const int64_t at = k(stage, ahead.job);
    if (stage < stages && ahead.job < jobs() && at < p_.x_k) {
      ahead.x = read<kFixedV>(static_cast<const half*>(p_.x) + ahead.job / kBlocks * p_.x_k + at);
    }
    return ahead;
  }

  __device__ __forceinline__ void put(const Ahead& ahead, int stage, int slot) const {
    if (!__any_sync(~0u, ahead.job < jobs())) return;
    float value[kFixedV];
    if (p_.g.out == QPASS_HALF) {
      to_floats(ahead.x, value);
    } else {
      Bits<bfloat16, kFixedV> bits;
      memcpy(&bits, &ahead.x, sizeof(bits));
      to_floats(bits, value);
    }
    const int64_t at = k(stage, ahead.job);
    if (p_.x_scale && ahead.job < jobs() && at < p_.x_k) {
      float by[kFixedV];
      load<kFixedV>(p_.x_scale + at, by);
#pragma unroll
      for (int i = 0; i < kFixedV; ++i) value[i] *= by[i];
    }
    const FixedCodes codes = to_fixed<S::kInt4>(value);
    constexpr int kLanes = S::kSpanK / kFixedV;
    const int sum = sum_of_lanes(codes.sum, kLanes), lane = threadIdx.x % kFixedLanes;
    if (ahead.job >= jobs()) return;
    const int token = ahead.job / kBlocks, block = ahead.job % kBlocks, byte = block * kBlockK + lane * kFixedV;
    char* const stage_at = shared_ + slot * S::kStageBytes;
    auto plane = [&](int i) {
      return reinterpret_cast<uint2*>(stage_at + S::kWeights + S::act_place(i * S::kTokens * 8 + token, byte / 16) + byte % 16);
    };
    *plane(0) = codes.high, *plane(1) = codes.low;
    char* const side = stage_at + S::kSideAt + token * 4;
    if (lane == 0) *reinterpret_cast<float*>(side + block * S::kSideRow) = codes.scale;
    if (lane % kLanes == 0) *reinterpret_cast<int*>(side + (kBlocks + byte / S::kSpanK) * S::kSideRow) = sum;
  }

 private:
  static constexpr int kBlocks = S::kStageK / kBlockK, kTeams = S::kThreads / kFixedLanes;
  static_assert(kMadeTokens * kBlocks <= kTeams);

  __device__ int jobs() const { return int(p_.g.m) * kBlocks; }
  __device__ int64_t k(int stage, int job) const {
    return (first_ + stage) * S::kStageK + job % kBlocks * kBlockK + threadIdx.x % kFixedLanes * kFixedV;
  }

  const Skinny& p_;
  char* const shared_;
  const int64_t first_;
};

}  // namespace qpass
