// The kernel behind every op that quantizes rows: a row is read once, held in registers, and leaves as q, scale and y.
//
// A `Source` says what rows are made of: at() gives the source of one row, load() its elements as floats; for a norm (kNorm)
// statistics over the row and scale() follow. The row's elements are spread over `kThreads` threads, each of which holds N packs of V neighbours. Rows too
// long for that (kLong) are read again in every pass, from L2.
#pragma once

#include "vectors.cuh"

namespace qpass {

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
// NaN where either is, unlike fmaxf: what went wrong before shows in the scale.
struct Max {
  __device__ float operator()(float a, float b) const {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
  }
};

// Reduces over the threads of a row; every thread gets the result.
template <int kThreads, typename Op>
__device__ __forceinline__ float reduce(float value, Op op) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = op(value, __shfl_xor_sync(~0u, value, step));
  if constexpr (kThreads > 32) {
    __shared__ float partial[kThreads / 32];
    __syncthreads();  // the reduction before may still be read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = partial[0];
#pragma unroll
    for (int i = 1; i < kThreads / 32; ++i) value = op(value, partial[i]);
  }
  return value;
}

// clip(rint(y / scale) + zero), the quotient correctly rounded before rint.
//
// y * inverse is off y / scale by at most 3 half-ulps, less than 3e-5 where the quotient is under 129 and so could come out
// unclipped. Unless it is that close to a half, both round to the same integer; else, and where an inverse overflows and the
// product is no number, the division decides.
__device__ __forceinline__ int8_t quantize(float y, float scale, float inverse, float zero) {
  float q = y * inverse, rounded = rintf(q);
  if (!(fabsf(q - rounded) < 0.4999f)) rounded = rintf(__fdiv_rn(y, scale));
  return int8_t(fminf(fmaxf(rounded + zero, -128.f), 127.f));
}

template <typename Source, int V, int kThreads, int N, bool kLong>
__global__ void __launch_bounds__(kThreads < 128 ? 128 : kThreads)
    quantize_rows(Source all, int64_t rows, int k, qpass_quantized result) {
  using T = typename Source::T;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // all threads of a row together
  const int64_t start = row * k;
  const Source source = all.at(row);
  float v[N][V];

  auto each = [&](auto&& f) {
    const int chunks = kLong ? (k + kThreads * N * V - 1) / (kThreads * N * V) : 1;
    for (int c = 0; c < chunks; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        int column = ((c * N + i) * kThreads + int(threadIdx.x)) * V;
        if (column < k) f(v[i], column);
      }
    }
  };
  auto loaded = [&](float (&x)[V], int column) {
    if constexpr (kLong) source.template load<V>(column, x);
  };

  if constexpr (!kLong) each([&](float (&x)[V], int column) { source.template load<V>(column, x); });
  float mean = 0, inverse_deviation = 1;
  if constexpr (Source::kNorm) {
    if (!source.rms) {
      float sum = 0;
      each([&](float (&x)[V], int column) {
        loaded(x, column);
#pragma unroll
        for (int i = 0; i < V; ++i) sum += x[i];
      });
      mean = reduce<kThreads>(sum, Sum()) / k;
    }
    float squares = 0;
    each([&](float (&x)[V], int column) {
      loaded(x, column);
#pragma unroll
      for (int i = 0; i < V; ++i) squares += (x[i] - mean) * (x[i] - mean);
    });
    // a product instead of the body's division: one more rounding, and half the time of the whole kernel
    inverse_deviation = __fdiv_rn(1.f, sqrtf(reduce<kThreads>(squares, Sum()) / k + source.epsilon));
  }

  auto finished = [&](float (&x)[V], int column, bool first) {
    if constexpr (Source::kNorm) source.template scale<V>(column, mean, inverse_deviation, x);
    if (first && result.y) store<V>(static_cast<T*>(result.y) + start + column, x);
    if (result.smoother) {
      float smoother[V];
      load<V>(result.smoother + column, smoother);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = __fdiv_rn(x[i], smoother[i]);
    }
  };
  float amax = 0;
  each([&](float (&x)[V], int column) {
    loaded(x, column);
    finished(x, column, true);
#pragma unroll
    for (int i = 0; i < V; ++i) amax = Max()(amax, fabsf(x[i]));
  });

  float scale, zero = 0;
  if (result.scale) {
    scale = *result.scale;
    if (result.zero) zero = *result.zero;
  } else {
    scale = __fdiv_rn(reduce<kThreads>(amax, Max()), 127.f);
    if (threadIdx.x == 0) result.token_scale[row] = scale;
  }
  if (scale == 0) scale = INFINITY;
  const float inverse = __fdiv_rn(1.f, scale);
  each([&](float (&x)[V], int column) {
    if constexpr (kLong) {
      loaded(x, column);
      finished(x, column, false);
    }
    Pack<int8_t, V> q;
#pragma unroll
    for (int i = 0; i < V; ++i) q.x[i] = quantize(x[i], scale, inverse, zero);
    *reinterpret_cast<Pack<int8_t, V>*>(result.q + start + column) = q;
  });
}

template <int V, int kThreads, int N, bool kLong = false, typename Source>
cudaError_t launch_rows(const Source& source, int64_t rows, int64_t k, const qpass_quantized& result, cudaStream_t stream) {
  constexpr int kRows = kThreads < 128 ? 128 / kThreads : 1;
  dim3 block(kThreads, kRows);
  quantize_rows<Source, V, kThreads, N, kLong>
      <<<unsigned(ceil_div(rows, kRows)), block, 0, stream>>>(source, rows, int(k), result);
  return cudaGetLastError();
}

// Launches the kernel with the fewest registers that hold a row.
template <typename Source>
cudaError_t quantize_rows_of(const Source& source, int64_t rows, int64_t k, const qpass_quantized& result, cudaStream_t stream) {
  constexpr int V = kWidest<typename Source::T>;
  constexpr int64_t kLongest = INT32_MAX - (1 << 16);  // columns are counted in 32 bits
  if (rows == 0) return cudaSuccess;
  if (k == 0 || k > kLongest) return cudaErrorInvalidValue;
  if (k % V) {
    if (k <= 32 * 4) return launch_rows<1, 32, 4>(source, rows, k, result, stream);
    if (k <= 256 * 8) return launch_rows<1, 256, 8>(source, rows, k, result, stream);
    return launch_rows<1, 1024, 8, true>(source, rows, k, result, stream);
  }
  if (k <= 32 * 4 * V) return launch_rows<V, 32, 4>(source, rows, k, result, stream);
  if (k <= 256 * 1 * V) return launch_rows<V, 256, 1>(source, rows, k, result, stream);
  if (k <= 256 * 2 * V) return launch_rows<V, 256, 2>(source, rows, k, result, stream);
  if (k <= 512 * 2 * V) return launch_rows<V, 512, 2>(source, rows, k, result, stream);
  if (k <= 1024 * 2 * V) return launch_rows<V, 1024, 2>(source, rows, k, result, stream);
  if (k <= 1024 * 4 * V) return launch_rows<V, 1024, 4>(source, rows, k, result, stream);
  return launch_rows<V, 1024, 4, true>(source, rows, k, result, stream);
}

}  // namespace qpass
