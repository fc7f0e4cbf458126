// The kernel behind norms and every op that quantizes rows: a row is read once, held in registers, and leaves as q, scale and y,
// or a norm's as y alone.
//
// A `Source` says what rows are made of. at() is the source of one row; operand() is where its kOperands tensors lie, and values()
// makes floats of a pack of V neighbours of each. For a norm (kNorm) statistics over the row follow, without a mean where it is of
// root mean squares (kRms), and gamma and beta. kRegisters are what it takes beside packs, as compiled.
//
// A row is spread over a warp or a block of just so many warps as it fills, N packs a thread. Where there are more rows than
// the GPU holds at once, blocks stay and take one row after another; while one is worked on the next is on its way to shared
// memory (kStaged), where each thread finds what it asked for itself; and gamma and beta, once. Rows too long for registers
// (kLong) are read again in every pass, from L2.
#pragma once

#include "launch.cuh"
#include "mma.cuh"
#include "reduction.cuh"
#include "rounding.cuh"

namespace qpass {

// A pack of every operand.
template <typename Source, int V>
struct Operands {
  Bits<typename Source::T, V> of[Source::kOperands];
};

template <int V>
__device__ __forceinline__ void centre(float (&v)[V], float mean) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] -= mean;
}

// How a kernel is laid out: N packs of V neighbours a thread; the threads of a row, at most; how many blocks of those a
// multiprocessor is to hold, which bounds their registers; whether there are so few rows that none is taken after another, and
// whether there are registers for divisors by a smoother, made once for all rows.
enum Kind { kMany, kFewRows, kDividing };
template <int width, int packs, int threads, int blocks, Kind kind = kMany>
struct Layout {
  static constexpr int V = width, N = packs, kThreads = threads, kBlocks = blocks;
  static constexpr bool kWarp = threads == 32, kFew = kind == kFewRows, kDivisors = kind == kDividing;
  static constexpr int kRows = kWarp ? 4 : 1;  // of a block

  // Whether there are registers for this much of every pack beside its floats and what all else takes.
  static constexpr bool holds(size_t bytes, int others) {
    return N * V + int(N * bytes / 4) + others <= 65536 / (kThreads * kRows * kBlocks);
  }
};

// Packs of shared memory for every pack of a thread: a row's ahead, and where it has many, gamma's and beta's; 0 where registers
// are to hold them, or that would be too many.
template <typename Source, typename Layout, bool kLong>
constexpr int staged_packs() {
  constexpr int kPacks = Source::kOperands + (Source::kNorm && Layout::N > 4 ? 2 : 0), kMost = 64 << 10;
  constexpr bool kFits = !Layout::kFew && Layout::kThreads * Layout::kRows * Layout::N * kPacks * 16 <= kMost;
  return !kLong && kFits && sizeof(Bits<typename Source::T, Layout::V>) == 16 ? kPacks : 0;
}

// kWhole: a row fills its threads' packs, so that nothing is beyond it.
template <typename Source, typename Layout, bool kLong, bool kSmooth, bool kWhole>
__global__ void __launch_bounds__(Layout::kThreads * Layout::kRows, Layout::kBlocks)
    quantize_rows(Source all, int64_t rows, int k, qpass_quantized result) {
  using T = typename Source::T;
  using Raw = Operands<Source, Layout::V>;
  constexpr int V = Layout::V, N = Layout::N;
  constexpr int kParts = N < 4 ? N : 4;  // of a thread's sum: one would be a long chain
  constexpr int kOthers = Source::kRegisters + (kSmooth ? 2 * V : 0);
  constexpr int kStaged = staged_packs<Source, Layout, kLong>();
  constexpr bool kStagedGamma = kStaged > Source::kOperands;
  constexpr bool kHolds = !kLong && !kStagedGamma;
  constexpr bool kGamma = kHolds && Layout::holds(sizeof(Bits<T, V>), kOthers);  // with x, not when it is needed
  constexpr bool kBeta = kHolds && Layout::holds(2 * sizeof(Bits<T, V>), kOthers);
  constexpr bool kDivisors = kSmooth && Layout::kDivisors && !kLong;
  extern __shared__ __align__(16) char staging[];
  __shared__ __align__(16) typename Reduction<Layout::kWarp>::Partial partial;
  Reduction<Layout::kWarp> reduce(partial);
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;

  // A warp's packs are neighbours: a thread's lie a constant apart. Beyond the row zeros are computed with, and left out of
  // what is reduced or stored: a branch around every pack would keep the compiler from mixing them.
  const int chunk = int(blockDim.x) * N * V;
  const int first_of_warp = (int(threadIdx.x) & ~31) * N * V;
  const int first = first_of_warp + int(threadIdx.x) % 32 * V;
  auto packs = [&](auto&& f, int begin = 0) {  // f(pack, its column, whether that is within the row)
#pragma unroll
    for (int i = 0; i < N; ++i) f(i, begin + first + i * 32 * V, kWhole || begin + first + i * 32 * V < k);
  };

  let_next_kernel_start();
  if (row >= rows) return;  // all threads of a row together
  // The first row is on its way while the kernel ahead ends. What all rows need is asked for once: thousands of times, it would be
  // a queue at the same lines.
  packs([&](int, int column, bool within) {
    if (!within) return;
#pragma unroll
    for (int o = 0; o < Source::kOperands; ++o) prefetch(all.at(row).operand(o) + column);
    if (row) return;
    if constexpr (Source::kNorm) {
      prefetch(all.gamma + column);
      if (all.beta) prefetch(all.beta + column);
    }
    if (kSmooth) prefetch(result.smoother + column);
  });
  wait_for_kernel_before();

  Raw raw[N];
  float v[N][V];
  auto fetch = [&](const Source& source, int begin = 0) {
    packs([&](int i, int column, bool within) {
#pragma unroll
      for (int o = 0; o < Source::kOperands; ++o)
        raw[i].of[o] = within ? read_once<V>(source.operand(o) + column) : Bits<T, V>();
    }, begin);
  };
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  Bits<T, V>* const own = reinterpret_cast<Bits<T, V>*>(staging) + (thread & ~31) * N * kStaged + thread % 32;
  auto staged = [&](int i, int of) { return own + (i * kStaged + of) * 32; };
  auto stage = [&](const Source& source) {
#pragma unroll
    for (int o = 0; o < Source::kOperands; ++o) {
      const T* from = source.operand(o) + first;  // one address for all packs
      packs([&](int i, int, bool within) { if (within) copy_async(staged(i, o), from + i * 32 * V, 16); });
    }
    commit_copies();
  };

  if constexpr (kStagedGamma) packs([&](int i, int column, bool within) {
    if (!within) return;
    copy_async(staged(i, Source::kOperands), all.gamma + column, 16);
    if (all.beta) copy_async(staged(i, Source::kOperands + 1), all.beta + column, 16);
  });
  if (kStaged) stage(all.at(row));
  [[maybe_unused]] Divisor<Source::kExact> by[kDivisors ? N : 1][V];
  if constexpr (kDivisors) packs([&](int i, int column, bool within) {
    float smoother[V];
    if (within) load<V>(result.smoother + column, smoother);
#pragma unroll
    for (int j = 0; j < V; ++j) by[i][j] = Divisor<Source::kExact>(within ? smoother[j] : 1.f);
  });
  if constexpr (Source::kNorm) if constexpr (!Source::kRms)
    reduce.count(k / chunk * 32 * N * V + min(max(k % chunk - first_of_warp, 0), 32 * N * V));
  float scale = result.scale ? *result.scale : 0;
  for (; row < rows; row += step) {
    const Source source = all.at(row);
    const int64_t start = row * k;
    if (!kStaged && !kLong) fetch(source);
    [[maybe_unused]] Bits<T, V> gamma[N], beta[N];
    if constexpr (Source::kNorm) packs([&](int i, int column, bool within) {
      if constexpr (kGamma) gamma[i] = within ? read<V>(source.gamma + column) : Bits<T, V>();
      if constexpr (kBeta) beta[i] = within && source.beta ? read<V>(source.beta + column) : Bits<T, V>();
    });
    auto to_values = [&] {
#pragma unroll
      for (int i = 0; i < N; ++i) source.values(raw[i], v[i]);
    };
    if constexpr (kStaged) {
      wait_copies<0>();
      packs([&](int i, int, bool within) {
        Raw one;
#pragma unroll
        for (int o = 0; o < Source::kOperands; ++o) one.of[o] = within ? *staged(i, o) : Bits<T, V>();
        source.values(one, v[i]);
      });
      if (row + step < rows) stage(all.at(row + step));
    } else if (!kLong) {
      to_values();
    }
    auto each = [&](auto&& f) {  // f(the first column of a chunk that v holds)
      if constexpr (kLong) {
        for (int begin = 0; begin < k; begin += chunk) {
          fetch(source, begin);
          to_values();
          f(begin);
        }
      } else {
        f(0);
      }
    };

    // Statistics are about the mean of each warp's own columns, of which those of the row follow by one exchange between warps. Where
    // all threads have as many, they are about each thread's at first: squares do not wait for its warp.
    [[maybe_unused]] float pivot = 0, inverse_deviation = 1, shift = 0;
    if constexpr (Source::kNorm) {
      if (Source::kHasSum && source.sum) each([&](int begin) {
        packs([&](int i, int column, bool within) { if (within) store<V>(source.sum + column, v[i]); }, begin);
      });
      float mean = 0;
      if constexpr (!Source::kRms) {
        float sums[kParts] = {};
        each([&](int begin) {
          packs([&](int i, int, bool) {
#pragma unroll
            for (int j = 0; j < V; ++j) sums[i % kParts] += v[i][j];
          }, begin);
        });
        const float sum = over(sums, Sum());
        mean = reduce.mean_of_warp(sum, source.share);
        pivot = kWhole ? sum * (1.f / (N * V)) : mean;
      }
      float squares[kParts] = {};
      each([&](int begin) {
        if constexpr (!Source::kRms) packs([&](int i, int, bool) { centre(v[i], pivot); }, begin);
        packs([&](int i, int, bool within) {
          float& part = squares[i % kParts];
          const float before = part;
#pragma unroll
          for (int j = 0; j < V; ++j) part += v[i][j] * v[i][j];
          if (!within) part = before;
        }, begin);
      });
      float total = over(squares, Sum());
      if constexpr (Source::kRms) {
        total = reduce(total, Sum());
      } else {
        if (kWhole) total = fmaf((pivot - mean) * float(N * V), pivot - mean, total);
        reduce.moments(mean, total, source.share);
      }
      // a product instead of the body's division: one more rounding, and half the time of the whole kernel
      inverse_deviation = inverse_root(total * source.share + source.epsilon);
      shift = (pivot - mean) * inverse_deviation;
    }

    auto finish = [&](int begin) {
      if constexpr (Source::kNorm) {
        if (kLong && !Source::kRms) packs([&](int i, int, bool) { centre(v[i], pivot); }, begin);
        packs([&](int i, int column, bool within) {
          if constexpr (kStagedGamma) gamma[i] = within ? *staged(i, Source::kOperands) : Bits<T, V>();
          else if constexpr (!kGamma) gamma[i] = within ? read<V>(source.gamma + column) : Bits<T, V>();
          float factor[V];
          to_floats(gamma[i], factor);
#pragma unroll
          for (int j = 0; j < V; ++j) v[i][j] = fmaf(v[i][j], inverse_deviation, shift) * factor[j];
        }, begin);
        if (source.beta) packs([&](int i, int column, bool within) {
          if constexpr (kStagedGamma) beta[i] = within ? *staged(i, Source::kOperands + 1) : Bits<T, V>();
          else if constexpr (!kBeta) beta[i] = within ? read<V>(source.beta + column) : Bits<T, V>();
          float plus[V];
          to_floats(beta[i], plus);
#pragma unroll
          for (int j = 0; j < V; ++j) v[i][j] = __fadd_rn(v[i][j], plus[j]);
        }, begin);
      }
    };
    auto smooth = [&](int begin) {
      if constexpr (kDivisors) packs([&](int i, int, bool) {
#pragma unroll
        for (int j = 0; j < V; ++j) v[i][j] = by[i][j].quotient(v[i][j]);
      });
      else if (kSmooth) packs([&](int i, int column, bool within) {
        if (!within) return;
        float smoother[V];
        load<V>(result.smoother + column, smoother);
        divide<Source::kExact>(v[i], smoother);
      }, begin);
    };
    float most[kParts] = {};
    each([&](int begin) {
      finish(begin);
      if (Source::kHasY && result.y) packs([&](int i, int column, bool within) {
        if (within) store<V>(static_cast<T*>(result.y) + start + column, v[i]);
      }, begin);
      smooth(begin);
      if (!result.scale) packs([&](int i, int, bool within) {
        float& part = most[i % kParts];
        const float before = part;
#pragma unroll
        for (int j = 0; j < V; ++j) part = Max()(part, fabsf(v[i][j]));
        if (!within) part = before;
      }, begin);
    });
    if constexpr (kDivisors && Source::kExact) {
      float largest = over(most, Max());
      if (result.scale) packs([&](int i, int, bool) {
#pragma unroll
        for (int j = 0; j < V; ++j) largest = Max()(largest, fabsf(v[i][j]));
      });
      if (!Divisor<true>::holds(largest) || (result.scale && !Divisor<true>::holds(fabsf(scale)))) {  // rarely: by divisions, then
        fetch(source);
        to_values();
        most[0] = 0;
        packs([&](int i, int column, bool within) {
          if (!within) return;
          float smoother[V];
          load<V>(result.smoother + column, smoother);
          divide<true>(v[i], smoother);
#pragma unroll
          for (int j = 0; j < V; ++j) most[0] = Max()(most[0], fabsf(v[i][j]));
        });
#pragma unroll
        for (int i = 1; i < kParts; ++i) most[i] = 0;
      }
    }
    if (Source::kNorm && !result.q) continue;
    if (!result.scale) {
      scale = scale_of(reduce(over(most, Max()), Max()));
      if (threadIdx.x == 0) result.token_scale[row] = scale;
    }
    const Rounding rounding(scale, result.zero ? float(*result.zero) : 0.f);
    auto write = [&](auto how) {
      each([&](int begin) {
        if constexpr (kLong) {
          finish(begin);
          smooth(begin);
        }
        packs([&](int i, int column, bool within) {
          rounding.template round<how(), !Source::kNorm>(v[i]);
          if (within) store_bytes<V>(result.q + start + column, v[i]);
        }, begin);
      });
    };
    if (rounding.factor != 1) write(std::integral_constant<Rounding::How, Rounding::kFactored>());
    else if (result.scale) write(std::integral_constant<Rounding::How, Rounding::kClipped>());
    else write(std::integral_constant<Rounding::How, Rounding::kUnclipped>());
  }
}

template <typename Layout, bool kLong, bool kSmooth, typename Source>
cudaError_t launch_rows(const Source& source, int64_t rows, int64_t k, const qpass_quantized& result, cudaStream_t stream) {
  constexpr int kRows = Layout::kRows;
  const int threads = kLong || Layout::kWarp ? Layout::kThreads : int(ceil_div(k, 32 * Layout::N * Layout::V)) * 32;
  auto kernel = quantize_rows<Source, Layout, kLong, kSmooth, false>;
  const bool whole = k == int64_t(threads) * Layout::N * Layout::V;
  if constexpr (!kLong && (!kSmooth || Layout::kDivisors) && Layout::V > 1) {
    if (whole) kernel = quantize_rows<Source, Layout, kLong, kSmooth, true>;
  }
  constexpr int kBytes = Layout::N * staged_packs<Source, Layout, kLong>() * 16;  // of a thread
  const int shared = threads * kRows * kBytes;
  int64_t blocks = ceil_div(rows, kRows);
  Device device;
  if (cudaError_t error = current_device(&device)) return error;
  constexpr int kMost = Layout::kThreads * kRows * kBytes, kWithoutAsking = 47 << 10;  // beside what is declared in the kernel
  if constexpr (kMost > kWithoutAsking) {
    static OncePerDevice allowed[2];  // either kernel
    auto allow = [&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost); };
    if (cudaError_t error = allowed[whole](device, allow)) return error;
  }
  if (blocks > device.multiprocessors) {
    static thread_local struct {
      decltype(kernel) of;
      int device = -1, threads, shared, resident;
    } last;  // asked of the same rows as before it takes longer than the launch
    if (last.of != kernel || last.device != device.id || last.threads != threads || last.shared != shared) {
      int resident = 0;
      cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads * kRows, shared);
      if (error) return error;
      last = {kernel, device.id, threads, shared, resident > 1 ? resident : 1};
    }
    const int64_t at_once = int64_t(last.resident) * device.multiprocessors;
    blocks = blocks < at_once ? blocks : at_once;  // full multiprocessors, also where some blocks then take a row less
  }
  return launch({unsigned(blocks), dim3(threads, kRows), shared}, device, stream, kernel, source, rows, int(k), result);
}

// Launches the kernel that holds a row with the fewest idle threads.
template <bool kSmooth, typename Source>
cudaError_t launch_fitting(const Source& source, int64_t rows, int64_t k, const qpass_quantized& result, cudaStream_t stream) {
  constexpr int V = kWidest<typename Source::T>;
  constexpr int kMost = Source::kNorm || kSmooth ? 384 : 512;  // threads of which two blocks have registers enough
  constexpr int64_t kFew = 64;                                 // fewer than a GPU for servers has multiprocessors
  auto with = [&](auto layout, auto is_long) {
    return launch_rows<decltype(layout), is_long(), kSmooth>(source, rows, k, result, stream);
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
  if (rows <= kFew && packs <= 512 * 2) return with(Layout<V, 2, 512, 1, kFewRows>(), held);
  if constexpr (Source::kFewWarps && !kSmooth) {
    if (packs <= 128 * 8 && packs % (32 * 8) == 0) return with(Layout<V, 8, 128, 4>(), held);
  }
  if constexpr (!Source::kNorm && kSmooth && sizeof(typename Source::T) == 2) {
    if (packs <= 256 * 2) return with(Layout<V, 2, 256, 3, kDividing>(), held);
    if (packs <= 256 * 4) return with(Layout<V, 4, 256, 2, kDividing>(), held);
    if (packs <= 512 * 4) return with(Layout<V, 4, 512, 1, kDividing>(), held);
  } else {
    if (packs <= kMost * 4) return with(Layout<V, 4, kMost, 2>(), held);
  }
  if (packs <= 512 * 8) return with(Layout<V, 8, 512, 1>(), held);
  return with(Layout<V, 4, 512, 1>(), read_again);
}

template <typename Source>
cudaError_t quantize_rows_of(const Source& source, int64_t rows, int64_t k, const qpass_quantized& result, cudaStream_t stream) {
  constexpr int64_t kLongest = INT32_MAX - (1 << 16);  // columns are counted in 32 bits
  if (rows == 0) return cudaSuccess;
  if (k == 0 || k > kLongest) return cudaErrorInvalidValue;
  return result.smoother ? launch_fitting<true>(source, rows, k, result, stream)
                         : launch_fitting<false>(source, rows, k, result, stream);
}

}  // namespace qpass
