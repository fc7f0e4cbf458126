// The choice of a kernel for a matrix product, and SmoothQuantGemm.
#include "gemm.h"

#include <algorithm>

#include "gemm_kernels.h"
#include "types.cuh"

namespace qpass {
namespace {

int64_t padded(int64_t k) { return ceil_div(k, 16) * 16; }
size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

__global__ void spread(const float* value, float* to, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    to[i] = *value;
  }
}

// Single scales as vectors in the workspace, for kernels that know no others.
[[maybe_unused]] cudaError_t spread_scales(Gemm* g, cudaStream_t stream) {
  float* at = static_cast<float*>(g->workspace);
  auto one = [&](const float*& scale, bool& is_vector, int64_t count) {
    if (!scale || is_vector) return cudaSuccess;
    spread<<<unsigned(std::min<int64_t>(ceil_div(count, 256), 1024)), 256, 0, stream>>>(scale, at, count);
    scale = at, is_vector = true;
    at += aligned(count * sizeof(float)) / sizeof(float);  // vectors are loaded 16 bytes at a time
    return cudaGetLastError();
  };
  if (cudaError_t e = one(g->row_scale, g->per_row, g->m)) return e;
  return one(g->col_scale, g->per_column, g->n);
}

template <typename In, typename Out>
cudaError_t with_cutlass(const Gemm& g, const Device& device, cudaStream_t stream) {
#if QPASS_SM90A
  if (device.major == 9) {
    constexpr bool kOnlyWide = !std::is_same_v<In, int8_t>;
    if constexpr (kOnlyWide) return gemm_sm90<In, Out, true>(g, stream);
    else return g.m > 128 ? gemm_sm90<In, Out, true>(g, stream) : gemm_sm90<In, Out, false>(g, stream);
  }
#endif
#if QPASS_SM80
  if (device.major != 9 || !QPASS_SM90A) {
    Gemm vectors = g;
    if (cudaError_t e = spread_scales(&vectors, stream)) return e;
    return gemm_sm80<In, Out>(vectors, stream);
  }
#endif
  return cudaErrorNotSupported;
}

cudaError_t with_cutlass(const Gemm& g, const Device& device, cudaStream_t stream) {
  if (g.in == QPASS_HALF) return with_cutlass<half, half>(g, device, stream);
  if (g.in == QPASS_BFLOAT16) return with_cutlass<bfloat16, bfloat16>(g, device, stream);
  return with_float_type(
      g.out, [&](auto tag) { return with_cutlass<int8_t, typename decltype(tag)::type>(g, device, stream); });
}

// CUTLASS counts in 32 bits, and stores 16 bytes at a time.
bool fits_cutlass(const Gemm& g) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  int64_t size = g.out == QPASS_FLOAT ? 4 : 2;
  return g.ldd * size % 16 == 0 && g.n * size % 16 == 0 && g.m <= kMost && g.n <= kMost && g.k <= kMost;
}


}  // namespace

cudaError_t gemm(const Gemm& g, cudaStream_t stream) {
  if (!g.m || !g.n) return cudaSuccess;
  if (g.in == QPASS_INT8 && g.m <= skinny_tokens(g.n, g.k, kHeadStartInt8)) return skinny_int8(g, stream);
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  if (fits_cutlass(g)) {
    cudaError_t e = with_cutlass(g, device, stream);
    if (e != cudaErrorNotSupported) return e;
  }
  return gemm_mma(g, stream);
}

size_t gemm_workspace(const Gemm& g) {
  size_t vectors = QPASS_SM80 ? aligned(g.m * sizeof(float)) + aligned(g.n * sizeof(float)) : 0;
  return std::max(vectors, g.in == QPASS_INT8 ? skinny_int8_workspace(g) : 0);
}

namespace {

// The product that an op is, on its own q and weight or on padded copies of them behind the product's own workspace.
Gemm product_of(const qpass_smooth_quant_gemm_args& args) {
  Gemm g{};
  g.in = QPASS_INT8;
  g.out = args.type;
  g.m = args.m, g.n = args.n, g.k = args.k;
  g.a = args.q, g.b = args.weight;
  g.lda = g.ldb = padded(args.k);
  g.row_scale = args.scale_a, g.per_row = args.per_token != 0;
  g.col_scale = args.scale_w, g.per_column = args.per_channel != 0;
  g.bias = args.bias;
  g.d = args.y, g.ldd = args.n;
  g.workspace = args.workspace;
  return g;
}

}  // namespace
}  // namespace qpass

size_t qpass_smooth_quant_gemm_workspace(const qpass_smooth_quant_gemm_args* args) {
  using namespace qpass;
  size_t bytes = aligned(gemm_workspace(product_of(*args)));
  int64_t k = padded(args->k);
  return k == args->k ? bytes : bytes + aligned(args->m * k) + aligned(args->n * k);
}

int qpass_smooth_quant_gemm(const qpass_smooth_quant_gemm_args* args, cudaStream_t stream) {
  using namespace qpass;
  if (!args->m || !args->n) return cudaSuccess;
  if (!args->k) return cudaErrorInvalidValue;
  Gemm g = product_of(*args);
  if (g.lda != args->k) {
    char* q = static_cast<char*>(args->workspace) + aligned(gemm_workspace(g));
    char* weight = q + aligned(args->m * g.lda);
    if (cudaError_t e = pad_rows(args->q, q, args->m, args->k, g.lda, stream)) return e;
    if (cudaError_t e = pad_rows(args->weight, weight, args->n, args->k, g.ldb, stream)) return e;
    g.a = q, g.b = weight;
    g.k = g.lda;  // zeros by zeros
  }
  return gemm(g, stream);
}
