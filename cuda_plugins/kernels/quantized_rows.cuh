// The kernel behind every op that quantizes rows: a row is read once, held in registers, and leaves as q, scale and y.
//
// A `Source` says what rows are made of. at() is the source of one row; fetch() reads a pack of V neighbours as they lie in
// memory, values() makes floats of them. For a norm (kNorm) statistics over the row follow, and coefficients() and scale().
// kRegisters are what it takes beside all those, as compiled.
//
// A row is spread over a warp or a block of just so many warps as it fills, N packs a thread. Where there are more rows than
// the GPU holds at once, blocks stay and take one row after another; with registers to spare the next is asked for before one
// is written. Rows too long for registers (kLong) are read again in every pass, from L2.
#pragma once

#include "launch.cuh"
#include "reduction.cuh"
#include "rounding.cuh"

namespace qpass {

// Reduces what a thread has.
template <int N, typename Op>
__device__ __forceinline__ float over(const float (&parts)[N], Op op) {
  float whole = parts[0];
#pragma unroll
  for (int i = 1; i < N; ++i) whole = op(whole, parts[i]);
  return whole;
}

template <int V>
__device__ __forceinline__ void centre(float (&v)[V], float mean) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] -= mean;
}

// 1 / sqrt(x) to an ulp: the GPU's approximation and a step of Newton's.
__device__ __forceinline__ float inverse_root(float x) {
  const float y = rsqrtf(x);
  const float better = fmaf(fmaf(-x * y, y, 1.f), 0.5f * y, y);
  return y == 0 || y == INFINITY ? y : better;
}

// How a kernel is laid out: N packs of V neighbours a thread; the threads of a row, at most; how many blocks of those a
// multiprocessor is to hold, which bounds their registers.
template <int width, int packs, int threads, int blocks>
struct Layout {
  static constexpr int V = width, N = packs, kThreads = threads, kBlocks = blocks;
  static constexpr bool kWarp = threads == 32;
  static constexpr int kRows = kWarp ? 4 : 1;  // of a block

  // Whether there are registers for this much of every pack beside its floats and what all else takes.
  static constexpr bool holds(size_t bytes, int others) {
    return N * V + int(N * bytes / 4) + others <= 65536 / (kThreads * kRows * kBlocks);
  }
};

template <typename Source, typename Layout, bool kLong, bool kSmooth>
__global__ void __launch_bounds__(Layout::kThreads * Layout::kRows, Layout::kBlocks)
    quantize_rows(Source all, int64_t rows, int k, qpass_quantized result) {
  using T = typename Source::T;
  constexpr int V = Layout::V, N = Layout::N;
  constexpr int kParts = N < 4 ? N : 4;  // of a thread's sum: one would be a long chain
  using Raw = typename Source::template Raw<V>;
  using Coefficients = typename Source::template Coefficients<V>;
  constexpr int kOthers = Source::kRegisters + (kSmooth ? 2 * V : 0);
  constexpr bool kEarly = !kLong && Layout::holds(sizeof(Coefficients), kOthers);  // with x, not when they are needed
  constexpr bool kAhead = Layout::holds(sizeof(Coefficients) + sizeof(Raw), kOthers);  // before the row before is written
  __shared__ __align__(16) typename Reduction<Layout::kWarp>::Partial partial;
  Reduction<Layout::kWarp> reduce(partial);
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  let_next_kernel_start();
  wait_for_kernel_before();
  if (row >= rows) return;  // all threads of a row together

  // A warp's packs are neighbours: a thread's lie a constant apart. Beyond the row zeros are computed with, and left out of
  // what is reduced or stored: a branch around every pack would keep the compiler from mixing them.
  const int chunk = int(blockDim.x) * N * V;
  const int first = ((int(threadIdx.x) & ~31) * N + int(threadIdx.x) % 32) * V;
  auto packs = [&](auto&& f, int begin = 0) {  // f(pack, its column, whether that is within the row)
#pragma unroll
    for (int i = 0; i < N; ++i) f(i, begin + first + i * 32 * V, begin + first + i * 32 * V < k);
  };
  Raw raw[N];
  float v[N][V];
  auto fetch = [&](const Source& source, int begin = 0) {
    packs([&](int i, int column, bool within) { raw[i] = within ? source.template fetch<V>(column) : Raw(); }, begin);
  };

  if (kAhead && !kLong) fetch(all.at(row));
  if (!kLong) packs([&](int, int column, bool within) {
    if constexpr (Source::kNorm) if (within) all.prefetch(column);
    if (kSmooth && within) prefetch(result.smoother + column);
  });
  [[maybe_unused]] const float share = __frcp_rn(float(k));
  float scale = 0, zero = 0;
  if (result.scale) {
    scale = *result.scale;
    if (result.zero) zero = *result.zero;
  }
  for (; row < rows; row += step) {
    const Source source = all.at(row);
    const int64_t start = row * k;
    if (!kAhead && !kLong) fetch(source);
    [[maybe_unused]] Coefficients coefficients[N];
    if constexpr (Source::kNorm && kEarly) packs([&](int i, int column, bool within) {
      coefficients[i] = within ? source.template coefficients<V>(column) : Coefficients();
    });
    if (!kLong) source.values(raw, v);
    auto each = [&](auto&& f) {
      if constexpr (kLong) {
        for (int begin = 0; begin < k; begin += chunk) {
          fetch(source, begin);
          source.values(raw, v);
          packs(f, begin);
        }
      } else {
        packs(f);
      }
    };

    [[maybe_unused]] float mean = 0, inverse_deviation = 1;
    if constexpr (Source::kNorm) {
      if (Source::kHasSum && source.sum) each([&](int i, int column, bool within) {
        if (within) store<V>(source.sum + column, v[i]);
      });
      if (!source.rms) {
        float sums[kParts] = {};
        each([&](int i, int, bool) {
#pragma unroll
          for (int j = 0; j < V; ++j) sums[i % kParts] += v[i][j];
        });
        mean = reduce(over(sums, Sum()), Sum()) * share;
      }
      float squares[kParts] = {};
      each([&](int i, int, bool within) {
        if (!source.rms) centre(v[i], mean);
        float& part = squares[i % kParts];
        const float before = part;
#pragma unroll
        for (int j = 0; j < V; ++j) part += v[i][j] * v[i][j];
        if (!within) part = before;
      });
      // a product instead of the body's division: one more rounding, and half the time of the whole kernel
      inverse_deviation = inverse_root(reduce(over(squares, Sum()), Sum()) * share + source.epsilon);
    }

    auto finish = [&](int i, int column, bool within) {
      if constexpr (Source::kNorm) {
        if (kLong && !source.rms) centre(v[i], mean);
        if (!kEarly) coefficients[i] = within ? source.template coefficients<V>(column) : Coefficients();
        source.scale(column, within, coefficients[i], inverse_deviation, v[i]);
      }
    };
    auto smooth = [&](int i, int column, bool within) {
      if (!kSmooth || !within) return;
      float smoother[V];
      load<V>(result.smoother + column, smoother);
#pragma unroll
      for (int j = 0; j < V; ++j) v[i][j] = __fdiv_rn(v[i][j], smoother[j]);
    };
    float most[kParts] = {};
    each([&](int i, int column, bool within) {
      finish(i, column, within);
      if (Source::kHasY && result.y && within) store<V>(static_cast<T*>(result.y) + start + column, v[i]);
      smooth(i, column, within);
      if (result.scale) return;
      float& part = most[i % kParts];
      const float before = part;
#pragma unroll
      for (int j = 0; j < V; ++j) part = Max()(part, fabsf(v[i][j]));
      if (!within) part = before;
    });
    if (!result.scale) {
      scale = scale_of(reduce(over(most, Max()), Max()));
      if (threadIdx.x == 0) result.token_scale[row] = scale;
    }
    const Rounding rounding(scale, zero);
    if (kAhead && !kLong && row + step < rows) fetch(all.at(row + step));
    auto write = [&](auto how) {
      each([&](int i, int column, bool within) {
        if constexpr (kLong) {
          finish(i, column, within);
          smooth(i, column, within);
        }
        rounding.template round<how()>(v[i]);
        if (within) store_bytes<V>(result.q + start + column, v[i]);
      });
    };
    if (rounding.factor != 1) write(std::integral_constant<Rounding::How, Rounding::kFactored>());
    else if (result.scale) write(std::integral_constant<Rounding::How, Rounding::kClipped>());
    else write(std::integral_constant<Rounding::How, Rounding::kUnclipped>());
  }
}

template <typename Layout, bool kLong, typename Source>
cudaError_t launch_rows(const Source& source, int64_t rows, int64_t k, const qpass_quantized& result, cudaStream_t stream) {
  const auto kernel =
      result.smoother ? quantize_rows<Source, Layout, kLong, true> : quantize_rows<Source, Layout, kLong, false>;
  constexpr int kRows = Layout::kRows;
  const int threads = kLong || Layout::kWarp ? Layout::kThreads : int(ceil_div(k, 32 * Layout::N * Layout::V)) * 32;
  int64_t blocks = ceil_div(rows, kRows);
  Device device;
  if (cudaError_t error = current_device(&device)) return error;
  if (blocks > device.multiprocessors) {
    int resident = 0;
    cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads * kRows, 0);
    if (error) return error;
    const int64_t at_once = int64_t(resident > 1 ? resident : 1) * device.multiprocessors;
    blocks = ceil_div(blocks, ceil_div(blocks, at_once));  // each takes as many rows as the others, or one less
  }
  return launch({unsigned(blocks), dim3(threads, kRows)}, device, stream, kernel, source, rows, int(k), result);
}

// Launches the kernel that holds a row with the fewest idle threads.
template <typename Source>
cudaError_t quantize_rows_of(const Source& source, int64_t rows, int64_t k, const qpass_quantized& result, cudaStream_t stream) {
  constexpr int V = kWidest<typename Source::T>;
  constexpr int64_t kLongest = INT32_MAX - (1 << 16);  // columns are counted in 32 bits
  if (rows == 0) return cudaSuccess;
  if (k == 0 || k > kLongest) return cudaErrorInvalidValue;
  auto with = [&](auto layout, auto is_long) {
    return launch_rows<decltype(layout), is_long()>(source, rows, k, result, stream);
  };
  constexpr std::false_type held;
  constexpr std::true_type read_again;
  if (k % V) {
    if (k <= 32 * 4) return with(Layout<1, 4, 32, 5>(), held);
    if (k <= 512 * 8) return with(Layout<1, 8, 512, 1>(), held);
    return with(Layout<1, 8, 512, 1>(), read_again);
  }
  const int64_t packs = k / V;
  if (packs <= 32 * 1) return with(Layout<V, 1, 32, 5>(), held);
  if (packs <= 32 * 2) return with(Layout<V, 2, 32, 5>(), held);
  if (packs <= 32 * 3) return with(Layout<V, 3, 32, 5>(), held);
  if (packs <= 32 * 4) return with(Layout<V, 4, 32, 5>(), held);
  if (packs <= 384 * 4) return with(Layout<V, 4, 384, 2>(), held);
  if (packs <= 512 * 8) return with(Layout<V, 8, 512, 1>(), held);
  return with(Layout<V, 4, 512, 1>(), read_again);
}

}  // namespace qpass
