// Scales and zero points of a lane's channels as K goes on, for products whose lanes hold channels in fours: four neighbouring groups of
// a channel come at once, one to each of the four lanes that share it, well before they are needed.
#pragma once

#include <cstring>

#include "types.cuh"

namespace qpass {

// kRows channels: the lane's first, the one 8 on, and the same in each next 64.
template <int kRows>
class GroupStream {
 public:
  // scale, and zero where there are zero points: [n, groups]. From group `first` on.
  __device__ __forceinline__ GroupStream(const float* scale, const int8_t* zero, int n, int groups, int channel, int first)
      : scale_(scale), zero_(zero), n_(n), groups_(groups), channel_(channel), next_(first & ~3) {
    fetch(0), fetch(1);
  }

  __device__ __forceinline__ int channel_of(int i) const { return channel_ + i / 2 * 64 + i % 2 * 8; }

  // The next four groups', this lane's of them.
  __device__ __forceinline__ void take(float (&scale)[kRows], int (&zero)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      scale[i] = ahead_scale_[0][i], zero[i] = ahead_zero_[0][i];
      ahead_scale_[0][i] = ahead_scale_[1][i], ahead_zero_[0][i] = ahead_zero_[1][i];
    }
    fetch(1);
  }

 private:
  __device__ __forceinline__ void fetch(int to) {
    const int group = next_ + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool there = group < groups_ && channel_of(i) < n_;
      const int64_t at = int64_t(channel_of(i)) * groups_ + group;
      ahead_scale_[to][i] = there ? scale_[at] : 0.f;
      ahead_zero_[to][i] = there && zero_ ? zero_[at] : 0;
    }
    next_ += 4;
  }

  const float* const scale_;
  const int8_t* const zero_;
  const int n_, groups_, channel_;
  int next_;  // the first group that was not asked for
  float ahead_scale_[2][kRows];
  int ahead_zero_[2][kRows];
};

// What the lane that has group `group` of the four holds.
template <typename V>
__device__ __forceinline__ V of_group(const V& mine, int group) {
  static_assert(sizeof(V) == 4);
  uint32_t bits;
  memcpy(&bits, &mine, 4);
  bits = __shfl_sync(~0u, bits, (threadIdx.x & 28) | group % 4);
  V found;
  memcpy(&found, &bits, 4);
  return found;
}

}  // namespace qpass
