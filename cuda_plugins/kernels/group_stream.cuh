// Scales and zero points of a warp's channels as K goes on, for products whose lanes hold channels in fours: four neighbouring groups of
// all its channels come at once, well before they are needed.
//
// They wait in shared memory. Loads into registers would not do: their count of those under way is shared with loads that are waited
// for, and behind all the weights that were asked for before they take microseconds. For the same reason they are few: one copies four
// scales of a channel, where these lie at a multiple of 16 bytes. Eight at once, for whole sectors, were slower: more come ahead of the
// first weights.
#pragma once

#include <cstring>

#include "mma.cuh"

namespace qpass {

// Of kRows channels a lane: its first, the one 8 on, and the same in each next 64. kFours fours of groups are there or on their way; 0
// where there are no groups.
template <int kRows, int kThreads, int kFours, bool kZeros>
class GroupStream {
  static constexpr int kLines = kRows * 8;  // channels of a warp
  // Of a channel's four groups: scales, and of zero points two words, the first of which may begin before them.
  static constexpr int kScaleBytes = 16, kZeroBytes = 8, kZerosAt = kLines * kScaleBytes;
  static constexpr int kSlot = kZerosAt + (kZeros ? kLines * kZeroBytes : 0);

 public:
  static constexpr int kBytes = kFours * kSlot * (kThreads / 32);  // of shared memory

  // scale, and zero where there are zero points: [n, groups]; `channel` is the lane's first. From group `first` to `end`, if that is
  // any, of which the first fours are asked for; zeros behind the last of the weight's.
  __device__ __forceinline__ GroupStream(
      char* room, const float* scale, const int8_t* zero, int n, int groups, int channel, int first, int end)
      : room_(room + threadIdx.x / 32 * (kFours * kSlot)), scale_(scale), zero_(zero), n_(n), groups_(groups), channel_(channel),
        end_(end), by_fours_(groups % 4 == 0 && reinterpret_cast<uintptr_t>(scale) % 16 == 0), next_(first < end ? first & ~3 : end) {
    const int lane = threadIdx.x % 32, own = channel_of(lane / 8) - lane / 4 + lane % 8;  // the channel that this lane asks for alone
    there_ = lane < kLines && own < n;
    from_ = scale + (there_ ? int64_t(own) * groups + next_ : 0);
    if (by_fours_) {
#pragma unroll
      for (int i = 0; i < kFours - 1; ++i) ask(i);
    } else {
#pragma unroll 1
      for (int i = 0; i < kFours - 1; ++i) ask(i);
    }
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
    return *reinterpret_cast<const float*>(scales(slot_, i * 8 + threadIdx.x % 32 / 4) + group % 4 * 4);
  }
  __device__ __forceinline__ int zero(int i, int group) const {
    const int before = channel_of(i) * groups_ & 3;  // of the first word's bytes
    return kZeros && zero_ ? int8_t(zeros(slot_, i * 8 + threadIdx.x % 32 / 4)[before + group % 4]) : 0;
  }

 private:
  __device__ __forceinline__ char* scales(int slot, int line) const { return room_ + slot * kSlot + line * kScaleBytes; }
  __device__ __forceinline__ char* zeros(int slot, int line) const { return room_ + slot * kSlot + kZerosAt + line * kZeroBytes; }

  __device__ __forceinline__ void ask(int slot) {
    if (next_ < end_) {
      if (by_fours_) ask_by_fours(slot);
      else ask_by_words(slot);
    }
    commit_copies();
    next_ += 4;
  }

  // A lane a channel.
  __device__ __forceinline__ void ask_by_fours(int slot) {
    static_assert(kLines <= 32);
    const int lane = threadIdx.x % 32, bytes = there_ && next_ < groups_ ? 16 : 0;
    if (lane < kLines) {
      copy_cached_async(scales(slot, lane), from_, bytes);
      if (kZeros && zero_) copy_word_async(zeros(slot, lane), zero_ + (from_ - scale_), bytes / 4);
    }
    from_ += 4;
  }

  // Four lanes a channel.
  __device__ __forceinline__ void ask_by_words(int slot) {
    const int lane = threadIdx.x % 32, word = lane % 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int line = i * 8 + lane / 4;
      const int64_t at = int64_t(channel_of(i)) * groups_ + next_;
      const bool there = channel_of(i) < n_ && next_ + word < groups_;
      copy_word_async(scales(slot, line) + word * 4, scale_ + at + word, there ? 4 : 0);
      if (kZeros && zero_ && word < 2) {
        const int64_t of = (at & ~int64_t(3)) + word * 4, left = int64_t(n_) * groups_ - of;  // the tensor may end within a word
        copy_word_async(zeros(slot, line) + word * 4, zero_ + of, int(max(min(left, int64_t(4)), int64_t(0))));
      }
    }
  }

  char* const room_;
  const float* const scale_;
  const int8_t* const zero_;
  const int n_, groups_, channel_, end_;
  const bool by_fours_;
  const float* from_;  // where the lane's own channel has the next four
  bool there_;         // whether it has a channel
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
