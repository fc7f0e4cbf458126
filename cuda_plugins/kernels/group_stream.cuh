// Scales and zero points of a lane's channels as K goes on, for products whose lanes hold channels in fours: four neighbouring groups of
// a channel come at once, one to each of the four lanes that share it, well before they are needed.
//
// They wait in shared memory, each thread's words by themselves. Loads into registers would not do: their count of those under way is
// shared with loads that are waited for, and behind all the weights that were asked for before they take microseconds.
#pragma once

#include <cstring>

#include "mma.cuh"

namespace qpass {

// Of kRows channels: the lane's first, the one 8 on, and the same in each next 64. kFours fours of groups are there or on their way; 0
// where there are no groups.
template <int kRows, int kThreads, int kFours, bool kZeros>
class GroupStream {
 public:
  static constexpr int kBytes = kFours * kRows * (kZeros ? 2 : 1) * kThreads * 4;  // of shared memory

  // scale, and zero where there are zero points: [n, groups]. From group `first` to `end`, if that is any, of which the first fours
  // are asked for; zeros behind the last of the weight's.
  __device__ __forceinline__ GroupStream(
      char* room, const float* scale, const int8_t* zero, int n, int groups, int channel, int first, int end)
      : room_(room + threadIdx.x * 4), scale_(scale), zero_(zero), n_(n), groups_(groups), channel_(channel), end_(end),
        next_(first < end ? first & ~3 : end) {
#pragma unroll
    for (int i = 0; i < kFours - 1; ++i) ask(i);
  }

  __device__ __forceinline__ int channel_of(int i) const { return channel_ + i / 2 * 64 + i % 2 * 8; }

  // To the next four groups. By all lanes of a warp.
  __device__ __forceinline__ void next() {
    __syncwarp();  // those so far are read no more
    ask(slot_);
    if (++slot_ == kFours) slot_ = 0;
    wait_copies<kFours ? kFours - 1 : 0>();
    __syncwarp();
  }

  // Of channel i and the one of the four that is `group` modulo 4.
  __device__ __forceinline__ float scale(int i, int group) const {
    return *reinterpret_cast<const float*>(word(slot_, i) + (group % 4 - int(threadIdx.x % 4)) * 4);
  }
  // Of channel i and the one of the four that this lane asked for.
  __device__ __forceinline__ float own_scale(int i) const { return *reinterpret_cast<const float*>(word(slot_, i)); }
  __device__ __forceinline__ int own_zero(int i) const {
    return kZeros && zero_ ? int8_t(word(slot_, kRows + i)[at(i, threadIdx.x % 4) % 4]) : 0;
  }

 private:
  __device__ __forceinline__ int64_t at(int i, int group) const { return int64_t(channel_of(i)) * groups_ + group; }
  __device__ __forceinline__ char* word(int slot, int i) const {
    return room_ + (slot * kRows * (kZeros ? 2 : 1) + i) * kThreads * 4;
  }

  __device__ __forceinline__ void ask(int slot) {
    if (next_ < end_) {
      const int group = next_ + threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool there = group < groups_ && channel_of(i) < n_;
        copy_word_async(word(slot, i), scale_ + at(i, group), there ? 4 : 0);
        if (kZeros && zero_) {  // copies are of words, of which the last may end behind the tensor
          const int64_t of = at(i, group) & ~int64_t(3);
          char* const to = word(slot, kRows + i);
          if (there && of + 4 > int64_t(n_) * groups_) to[at(i, group) % 4] = char(zero_[at(i, group)]);
          else copy_word_async(to, zero_ + of, there ? 4 : 0);
        }
      }
    }
    commit_copies();
    next_ += 4;
  }

  char* const room_;
  const float* const scale_;
  const int8_t* const zero_;
  const int n_, groups_, channel_, end_;
  int next_, slot_ = kFours - 1;  // the first group that was not asked for; where those in use are
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

// Fours of groups for so many stages of `groups` each to be on their way beside the one in use.
constexpr int fours_of(int groups, int stages) { return groups ? (groups * stages + 3) / 4 + 1 : 0; }

}  // namespace qpass
