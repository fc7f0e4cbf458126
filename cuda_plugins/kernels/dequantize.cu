// Dequantize and DequantizeWeight; and rows copied to where they are aligned.
#include "gemm.h"
#include "vectors.cuh"

namespace qpass {
namespace {

constexpr int kThreads = 256;

// Enough blocks to fill any GPU; each thread takes what is left in strides.
unsigned blocks_for(int64_t items) { return unsigned(std::min<int64_t>(ceil_div(items, kThreads), 132 * 64)); }

__device__ __forceinline__ int64_t first() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t stride() { return int64_t(gridDim.x) * kThreads; }

template <typename T, int V>
__global__ void dequantize(const int8_t* q, const float* scale, bool per_token, T* x, int64_t packs, int64_t packs_a_row) {
  for (int64_t i = first(); i < packs; i += stride()) {
    float by = per_token ? scale[i / packs_a_row] : *scale;
    Pack<int8_t, V> from = reinterpret_cast<const Pack<int8_t, V>*>(q)[i];
    float v[V];
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = float(from.x[j]) * by;
    store<V>(x + i * V, v);
  }
}

// One pack is V elements of a row: V bytes, or V / 2 of int4. A group holds whole packs.
template <typename T, int V, bool kInt4>
__global__ void dequantize_weight(const int8_t* weight, const float* scale, const int8_t* zero, T* w, int64_t packs,
    int64_t packs_a_group) {
  constexpr int kBytes = kInt4 ? V / 2 : V;
  for (int64_t i = first(); i < packs; i += stride()) {
    int64_t group = i / packs_a_group;
    float by = scale[group], minus = zero ? zero[group] : 0.f;
    Pack<int8_t, kBytes> from = reinterpret_cast<const Pack<int8_t, kBytes>*>(weight)[i];
    float v[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      int code = from.x[kInt4 ? j / 2 : j];
      if (kInt4) code = j % 2 ? code >> 4 : int8_t(code << 4) >> 4;
      v[j] = (float(code) - minus) * by;
    }
    store<V>(w + i * V, v);
  }
}

__global__ void pad(const int8_t* from, int8_t* to, int64_t rows, int64_t bytes, int64_t padded) {
  for (int64_t i = first(); i < rows * padded; i += stride()) {
    int64_t row = i / padded, column = i % padded;
    to[i] = column < bytes ? from[row * bytes + column] : 0;
  }
}

}  // namespace

cudaError_t pad_rows(const void* from, void* to, int64_t rows, int64_t bytes, int64_t padded, cudaStream_t stream) {
  if (!rows) return cudaSuccess;
  pad<<<blocks_for(rows * padded), kThreads, 0, stream>>>(
      static_cast<const int8_t*>(from), static_cast<int8_t*>(to), rows, bytes, padded);
  return cudaGetLastError();
}

}  // namespace qpass

int qpass_dequantize(const qpass_dequantize_args* args, cudaStream_t stream) {
  using namespace qpass;
  if (!args->rows || !args->k) return cudaSuccess;
  return with_float_type(args->type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto launch = [&](auto width) {
      constexpr int V = decltype(width)::value;
      int64_t a_row = args->k / V, packs = args->rows * a_row;
      dequantize<T, V><<<blocks_for(packs), kThreads, 0, stream>>>(
          args->q, args->scale, args->per_token != 0, static_cast<T*>(args->x), packs, a_row);
      return cudaGetLastError();
    };
    constexpr int V = kWidest<T>;
    return args->k % V ? launch(std::integral_constant<int, 1>()) : launch(std::integral_constant<int, V>());
  });
}

int qpass_dequantize_weight(const qpass_dequantize_weight_args* args, cudaStream_t stream) {
  using namespace qpass;
  if (!args->rows || !args->k) return cudaSuccess;
  int64_t group = args->group_size ? args->group_size : args->k;
  return with_float_type(args->type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto launch = [&](auto width, auto int4) {
      constexpr int V = decltype(width)::value;
      int64_t packs = args->rows * (args->k / V);
      dequantize_weight<T, V, decltype(int4)::value><<<blocks_for(packs), kThreads, 0, stream>>>(
          args->weight, args->scale, args->zero, static_cast<T*>(args->w), packs, group / V);
      return cudaGetLastError();
    };
    using Widest = std::integral_constant<int, kWidest<T>>;
    bool aligned = args->k % Widest::value == 0;
    if (args->int4) {
      return aligned ? launch(Widest(), std::true_type()) : launch(std::integral_constant<int, 2>(), std::true_type());
    }
    return aligned ? launch(Widest(), std::false_type()) : launch(std::integral_constant<int, 1>(), std::false_type());
  });
}
