// Activations and weights as the matmul kernels want them.
#include "launch.cuh"
#include "weight_only.h"

namespace qpass {
namespace {

constexpr int kThreads = 256, kThreadsOfRow = 1024;
// Of a block for which there is room beside one of a product on streams, which leaves 4096 registers: so that this begins meanwhile.
constexpr int kThreadsBeside = 128;

// The largest value of all threads of a block.
__device__ __forceinline__ float largest_of_block(float value) {
  __shared__ float partial[kThreadsOfRow / 32];
  for (int step = 16; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < int(blockDim.x) / 32; ++i) value = fmaxf(value, partial[i]);
  return value;
}

// One block a row, V neighbours a thread: rows are few, and who makes more of one is waited for.
template <typename T, int V>
__global__ void __launch_bounds__(kThreadsOfRow) prepare(const T* x, const float* scale, void* to, int64_t k, int64_t padded,
    int64_t plane, float* row_scale) {
  const T* row = x + blockIdx.x * k;
  const int64_t step = int64_t(blockDim.x) * V;
  for (int64_t i = threadIdx.x * V; i < k; i += step) {  // before the next kernel asks for its weights
    prefetch(row + i);
    if (scale && blockIdx.x == 0) prefetch(scale + i);
  }
  let_next_kernel_start();  // it fetches weights meanwhile
  wait_for_kernel_before();
  const int64_t start = blockIdx.x * padded;
  auto scaled = [&](int64_t i, float (&value)[V]) {
    load<V>(row + i, value);
    if (!scale) return;
    float by[V];
    load<V>(scale + i, by);
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] *= by[j];
  };
  float factor = 1;
  if (row_scale) {
    float largest = 0;
#pragma unroll 2
    for (int64_t i = threadIdx.x * V; i < k; i += step) {
      float value[V];
      scaled(i, value);
#pragma unroll
      for (int j = 0; j < V; ++j) largest = fmaxf(largest, fabsf(value[j]));
    }
    largest = largest_of_block(largest);
    // the power of two that brings it to 2^14 … 2^15: float16 neither overflows nor loses what is small beside it
    int exponent = largest > 0 && isfinite(largest) ? max(ilogbf(largest), -100) - 14 : 0;
    factor = exp2f(float(-exponent));
    if (threadIdx.x == 0) row_scale[blockIdx.x] = exp2f(float(exponent));
  }
#pragma unroll 2
  for (int64_t i = threadIdx.x * V; i < padded; i += step) {
    float value[V] = {};
    if (i < k) scaled(i, value);
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        store<V>(static_cast<bfloat16*>(to) + p * plane + start + i, value);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          float part = to_float(from_float<bfloat16>(value[j]));
          value[j] = isfinite(part) ? value[j] - part : 0.f;  // infinity less infinity is no number
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) value[j] *= factor;
      store<V>(static_cast<T*>(to) + start + i, value);
    }
  }
}

// Sixteen lanes share a block of kBlockK.
template <typename T, bool kInt4, bool kAligned>
__global__ void __launch_bounds__(kThreads) prepare_as_fixed(const T* x, const float* scale, FixedActivations to, int64_t m,
    int64_t k, unsigned blocks_a_row) {
  constexpr int V = kFixedV;
  const int64_t row = blockIdx.x / blocks_a_row;
  const int64_t i = (int64_t(blockIdx.x % blocks_a_row) * blockDim.x + threadIdx.x) * V;
  if (i < k) {  // before the next kernel asks for its weights
    prefetch(x + row * k + i);
    if (scale && row == 0) prefetch(scale + i);
  }
  let_next_kernel_start();  // it fetches weights meanwhile
  wait_for_kernel_before();
  float value[V] = {}, by[V];
  if (kAligned && i < k) {
    load<V>(x + row * k + i, value);
    if (scale) load<V>(scale + i, by);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (i + j < k) value[j] = to_float(x[row * k + i + j]);
      by[j] = scale && i + j < k ? scale[i + j] : 1.f;
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) value[j] *= scale ? by[j] : 1.f;
  const FixedCodes codes = to_fixed<kInt4>(value);
  const int lanes = to.span / V, sum = sum_of_lanes(codes.sum, lanes);
  if (i >= to.padded) return;
  int8_t* const high = to.high + row * to.padded;
  int8_t* const low = high + m * to.padded;
  if (to.by_lanes) {
    const int64_t at = i / 32 * 32 + i % 32 / 8 * 4;
    *reinterpret_cast<uint32_t*>(high + at) = codes.high.x, *reinterpret_cast<uint32_t*>(high + at + 16) = codes.high.y;
    *reinterpret_cast<uint32_t*>(low + at) = codes.low.x, *reinterpret_cast<uint32_t*>(low + at + 16) = codes.low.y;
  } else {
    *reinterpret_cast<uint2*>(high + i) = codes.high;
    *reinterpret_cast<uint2*>(low + i) = codes.low;
  }
  if (threadIdx.x % kFixedLanes == 0) to.scale[i / kBlockK * to.side + row] = codes.scale;
  if (threadIdx.x % lanes) return;
  int32_t& to_sum = to.sum[i / to.span * to.side + row];
  to_sum = to.by_lanes ? __float_as_int(float(sum)) : sum;
}

// One block a row.
template <typename T, bool kInt4>
__global__ void __launch_bounds__(kThreads) expand(qpass_weight_only_matmul_args args, int64_t first, T* to, int64_t padded,
    float* row_scale) {
  let_next_kernel_start();
  const int64_t n = first + blockIdx.x;
  const int group = args.group_size ? args.group_size : int(args.k);
  const int64_t groups = args.group_size ? args.k / args.group_size : 1;
  const float* scale = args.scale + n * groups;
  const int8_t* zero = args.zero ? args.zero + n * groups : nullptr;
  // shares of the largest scale are below 1, and integers of at most 255 in magnitude: 256 times that is what float16 has room
  // for, and small shares keep their bits
  constexpr float kRoom = std::is_same_v<T, half> ? 256 : 1;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < groups; i += kThreads) largest = fmaxf(largest, fabsf(scale[i]));
  largest = largest_of_block(largest) / kRoom;
  if (!args.group_size) largest = scale[0];  // with its sign: the integers stay as they are
  wait_for_kernel_before();  // which may read what is written here
  if (threadIdx.x == 0) row_scale[blockIdx.x] = largest;

  constexpr int V = 8;  // values a thread takes at once: within a row, and within a group
  using Codes = Pack<int8_t, kInt4 ? V / 2 : V>;
  const int8_t* weight = args.weight + n * (kInt4 ? args.k / 2 : args.k);
  const bool whole = args.k % V == 0;  // else rows are not aligned, and the last values of one are fewer
  for (int k = threadIdx.x * V; k < padded; k += kThreads * V) {
    Codes codes;
    if (whole) codes = *reinterpret_cast<const Codes*>(weight + (kInt4 ? k / 2 : k));
    const int at = args.group_size ? k / group : 0;
    const int minus = zero && k < args.k ? zero[at] : 0;
    const float by = args.group_size ? largest > 0 ? scale[at] / largest : 0.f : 1.f;
    float v[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      bool there = k + i < args.k;
      int code = whole ? codes.x[kInt4 ? i / 2 : i] : there ? weight[kInt4 ? (k + i) / 2 : k + i] : 0;
      if (kInt4) code = i % 2 ? code >> 4 : int8_t(code << 4) >> 4;
      v[i] = there ? float(code - minus) * by : 0.f;
    }
    store<V>(to + blockIdx.x * padded + k, v);
  }
}

}  // namespace

cudaError_t prepare_activations(const qpass_weight_only_matmul_args& args, void* to, int64_t padded, float* row_scale,
    cudaStream_t stream) {
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  return with_float_type(args.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = kWidest<T>;
    const int64_t threads = std::min<int64_t>(ceil_div(padded, V * 32) * 32, kThreadsOfRow);
    const Grid grid{dim3(unsigned(args.m)), dim3(unsigned(threads))};
    return launch(grid, device, stream, args.k % V ? prepare<T, 1> : prepare<T, V>, static_cast<const T*>(args.x),
        args.pre_quant_scale, to, args.k, padded, args.m * padded, row_scale);
  });
}

cudaError_t prepare_fixed(const qpass_weight_only_matmul_args& args, const FixedActivations& to, cudaStream_t stream) {
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  auto with = [&](auto type, auto int4, auto aligned) {
    using T = typename decltype(type)::type;
    const int64_t of_row = ceil_div(to.padded, kBlockK * 2) * 32;  // two blocks a warp
    const bool beside = args.m * ceil_div(of_row, kThreadsBeside) <= device.multiprocessors;
    const int64_t threads = std::min<int64_t>(of_row, beside ? kThreadsBeside : kThreads);
    const int64_t blocks = ceil_div(to.padded, threads * 8);
    const Grid grid{dim3(unsigned(args.m * blocks)), dim3(unsigned(threads))};
    return launch(grid, device, stream, prepare_as_fixed<T, decltype(int4)::value, decltype(aligned)::value>,
        static_cast<const T*>(args.x), args.pre_quant_scale, to, args.m, args.k, unsigned(blocks));
  };
  auto typed = [&](auto int4, auto aligned) {
    return args.type == QPASS_HALF ? with(Tag<half>(), int4, aligned) : with(Tag<bfloat16>(), int4, aligned);
  };
  if (args.k % 8) {
    return args.int4 ? typed(std::true_type(), std::false_type()) : typed(std::false_type(), std::false_type());
  }
  return args.int4 ? typed(std::true_type(), std::true_type()) : typed(std::false_type(), std::true_type());
}

cudaError_t expand_weight(const qpass_weight_only_matmul_args& args, int64_t first, int64_t rows, void* to,
    int64_t padded, float* row_scale, cudaStream_t stream) {
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  auto with = [&](auto type, auto int4) {
    using T = typename decltype(type)::type;
    const Grid grid{dim3(unsigned(rows)), dim3(kThreads)};
    return launch(grid, device, stream, expand<T, decltype(int4)::value>, args, first, static_cast<T*>(to), padded, row_scale);
  };
  if (args.type == QPASS_HALF) {
    return args.int4 ? with(Tag<half>(), std::true_type()) : with(Tag<half>(), std::false_type());
  }
  return args.int4 ? with(Tag<bfloat16>(), std::true_type()) : with(Tag<bfloat16>(), std::false_type());
}

}  // namespace qpass
