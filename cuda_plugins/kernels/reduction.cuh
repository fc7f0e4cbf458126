// Sums and maxima over the threads of a row.
#pragma once

#include "types.cuh"

namespace qpass {

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
  __device__ float over_warp(float value) const {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
  }
};

// Of numbers that are not negative. NaN where one is, unlike fmaxf: what went wrong before shows in the scale.
struct Max {
  __device__ float operator()(float a, float b) const {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
  }
  // Without a sign, floats are ordered like their bits, NaN above infinity.
  __device__ float over_warp(float value) const {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(value)));
  }
};

// Reduces what a thread has.
template <int N, typename Op>
__device__ __forceinline__ float over(const float (&parts)[N], Op op) {
  float whole = parts[0];
#pragma unroll
  for (int i = 1; i < N; ++i) whole = op(whole, parts[i]);
  return whole;
}

constexpr int kMostThreads = 512;  // of a block

// Reduces over a warp, or over the block by one barrier: two sets of partial results take turns, and who writes to one again
// has passed a barrier that all reach after they have read it.
template <bool kWarp>
class Reduction {
 public:
  struct Partial {
    float turns[2][2][kMostThreads / 32], counts[kMostThreads / 32], inverses[kMostThreads / 32];
  };

  __device__ explicit Reduction(Partial& shared) : partial(shared) {
    if constexpr (!kWarp) {  // read four at a time
      const int warp = threadIdx.x;
      if (warp < kMostThreads / 32 && warp >= int(blockDim.x) / 32) {
#pragma unroll
        for (int i = 0; i < 4; ++i) partial.turns[i / 2][i % 2][warp] = 0;
        partial.counts[warp] = 0;
      }
    }
  }

  // How many numbers this warp has of those that moments are of. Kept in shared memory: registers are short.
  __device__ void count(int numbers) {
    if constexpr (!kWarp) {
      if (threadIdx.x % 32 == 0) {
        partial.counts[threadIdx.x / 32] = float(numbers);
        partial.inverses[threadIdx.x / 32] = __frcp_rn(float(numbers));
      }
      __syncwarp();
    }
  }

  // From a thread's part of their sum. Of the row's numbers each is a `share`.
  __device__ float mean_of_warp(float sum, float share) const {
    sum = Sum().over_warp(sum);
    if constexpr (kWarp) return sum * share;
    else return sum * partial.inverses[threadIdx.x / 32];
  }

  template <typename Op>
  __device__ float operator()(float value, Op op) {
    value = op.over_warp(value);
    if constexpr (!kWarp) {
      if (threadIdx.x % 32 == 0) partial.turns[turn][0][threadIdx.x / 32] = value;
      __syncthreads();
      value = 0;
      each_four([&](int warp) {
        float4 four = four_of(partial.turns[turn][0], warp);
        value = op(value, op(op(four.x, four.y), op(four.z, four.w)));
      });
      turn ^= 1;
    }
    return value;
  }

  // From the mean of a warp's numbers, and a thread's part of the sum of their squared distances from it: both over the row.
  __device__ void moments(float& mean, float& squares, float share) {
    squares = Sum().over_warp(squares);
    if constexpr (!kWarp) {
      if (threadIdx.x % 32 == 0) {
        partial.turns[turn][0][threadIdx.x / 32] = mean;
        partial.turns[turn][1][threadIdx.x / 32] = squares;
      }
      __syncthreads();
      float sum = 0, between = 0;
      each_four([&](int warp) {
        const float4 means = four_of(partial.turns[turn][0], warp), counts = four_of(partial.counts, warp);
        sum += (means.x * counts.x + means.y * counts.y) + (means.z * counts.z + means.w * counts.w);
      });
      mean = sum * share;
      each_four([&](int warp) {
        const float4 means = four_of(partial.turns[turn][0], warp), sums = four_of(partial.turns[turn][1], warp);
        const float4 counts = four_of(partial.counts, warp);
        auto about = [&](float other, float n) { return (other - mean) * (other - mean) * n; };
        between += (sums.x + about(means.x, counts.x)) + (sums.y + about(means.y, counts.y));
        between += (sums.z + about(means.z, counts.z)) + (sums.w + about(means.w, counts.w));
      });
      squares = between;
      turn ^= 1;
    }
  }

 private:
  template <typename F>
  __device__ void each_four(F&& f) const {
#pragma unroll 1
    for (int warp = 0; warp < int(blockDim.x) / 32; warp += 4) f(warp);
  }
  static __device__ float4 four_of(const float* of_warps, int warp) {
    return *reinterpret_cast<const float4*>(of_warps + warp);
  }

  Partial& partial;
  int turn = 0;
};

}  // namespace qpass
