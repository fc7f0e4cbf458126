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

constexpr int kMostThreads = 512;  // of a block

// Reduces over a warp, or over the block by one barrier: two sets of partial results take turns, and who writes to one again
// has passed a barrier that all reach after they have read it.
template <bool kWarp>
class Reduction {
 public:
  using Partial = float[2][kMostThreads / 32];

  __device__ explicit Reduction(Partial& shared) : partial(shared) {
    if constexpr (!kWarp) {  // read four at a time
      const int warp = threadIdx.x % (kMostThreads / 32);
      if (threadIdx.x < 2 * (kMostThreads / 32) && warp >= int(blockDim.x) / 32)
        partial[threadIdx.x / (kMostThreads / 32)][warp] = 0;
    }
  }

  template <typename Op>
  __device__ float operator()(float value, Op op) {
    value = op.over_warp(value);
    if constexpr (!kWarp) {
      if (threadIdx.x % 32 == 0) partial[turn][threadIdx.x / 32] = value;
      __syncthreads();
      value = 0;
#pragma unroll 1
      for (int warp = 0; warp < int(blockDim.x) / 32; warp += 4) {
        float4 four = *reinterpret_cast<const float4*>(&partial[turn][warp]);
        value = op(value, op(op(four.x, four.y), op(four.z, four.w)));
      }
      turn ^= 1;
    }
    return value;
  }

 private:
  Partial& partial;
  int turn = 0;
};

}  // namespace qpass
