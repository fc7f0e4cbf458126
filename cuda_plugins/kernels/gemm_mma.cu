// The matrix product on mma.sync, for every shape and architecture: what CUTLASS's alignment rules leave out comes here.
//
// A block computes 128 × 128 of d, a warp 64 × 32 of it. Tiles of a and b, 64 bytes of K at a time, go through three stages of
// shared memory. What lies outside of a and b is read as zeros.
#include "gemm_kernels.h"
#include "mma.cuh"

namespace qpass {
namespace {

constexpr int kTile = 128;
constexpr int kRowBytes = 64;  // of K, a stage
constexpr int kChunks = kRowBytes / 16;
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kGroup = 8;  // tiles of m that go through the same tiles of n together, so that these stay in L2

struct Stage {
  alignas(16) char a[kTile * kRowBytes];
  char b[kTile * kRowBytes];
};

// Where a 16-byte chunk of a row lies: eight rows of one chunk fall on all banks.
__device__ __forceinline__ int place(int row, int chunk) { return row * kRowBytes + (chunk ^ (row >> 1 & 3)) * 16; }

__device__ __forceinline__ void copy_tile(
    char* to, const char* from, int64_t first, int64_t rows, int64_t row_bytes, int64_t k_bytes, int64_t at) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    int row = i / kChunks, chunk = i % kChunks;
    int64_t byte = at + chunk * 16, left = first + row < rows ? k_bytes - byte : 0;
    int bytes = int(left < 0 ? 0 : left > 16 ? 16 : left);
    copy_async(to + place(row, chunk), bytes ? from + (first + row) * row_bytes + byte : from, bytes);
  }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) multiply(Gemm g, int64_t tiles_m, int64_t tiles_n) {
  using Accumulator = typename Mma<In>::Accumulator;
  __shared__ Stage stages[kStages];
  const int64_t group = blockIdx.x / (kGroup * tiles_n), in_group = blockIdx.x % (kGroup * tiles_n);
  const int64_t height = min(int64_t(kGroup), tiles_m - group * kGroup);
  const int64_t m0 = (group * kGroup + in_group % height) * kTile, n0 = in_group / height * kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;
  const int64_t k_bytes = g.k * int64_t(sizeof(In));
  const int64_t steps = ceil_div(k_bytes, kRowBytes);

  auto fetch = [&](int64_t step) {
    if (step < steps) {
      Stage& stage = stages[step % kStages];
      copy_tile(stage.a, static_cast<const char*>(g.a), m0, g.m, g.lda * sizeof(In), k_bytes, step * kRowBytes);
      copy_tile(stage.b, static_cast<const char*>(g.b), n0, g.n, g.ldb * sizeof(In), k_bytes, step * kRowBytes);
    }
    commit_copies();
  };

  Accumulator acc[4][4][4] = {};
  for (int s = 0; s < kStages - 1; ++s) fetch(s);
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the stage is complete, and everyone is done with the one that is filled next
    fetch(step + kStages - 1);
    const Stage& stage = stages[step % kStages];
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_matrices(a[i], stage.a + place(warp_m + i * 16 + lane % 16, half_row * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int row = warp_n + j * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b[j], stage.b + place(row, half_row * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) Mma<In>::run(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t m = m0 + warp_m + i * 16 + h * 8 + lane / 4;
      if (m >= g.m) continue;
      float row_scale = g.row_scale ? g.row_scale[g.per_row ? m : 0] : 1.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          int64_t n = n0 + warp_n + j * 8 + lane % 4 * 2 + c;
          if (n >= g.n) continue;
          float y = float(acc[i][j][h * 2 + c]) * row_scale * (g.col_scale ? g.col_scale[g.per_column ? n : 0] : 1.f);
          if (g.bias) y += to_float(static_cast<const Out*>(g.bias)[n]);
          static_cast<Out*>(g.d)[m * g.ldd + n] = from_float<Out>(y);
        }
      }
    }
  }
}

template <typename In, typename Out>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  int64_t tiles_m = ceil_div(g.m, kTile), tiles_n = ceil_div(g.n, kTile);
  multiply<In, Out><<<unsigned(tiles_m * tiles_n), kThreads, 0, stream>>>(g, tiles_m, tiles_n);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gemm_mma(const Gemm& g, cudaStream_t stream) {
  if (g.in == QPASS_HALF) return launch<half, half>(g, stream);
  if (g.in == QPASS_BFLOAT16) return launch<bfloat16, bfloat16>(g, stream);
  return with_float_type(g.out, [&](auto tag) { return launch<int8_t, typename decltype(tag)::type>(g, stream); });
}

}  // namespace qpass
