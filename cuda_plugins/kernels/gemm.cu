// The choice of a kernel for a matrix product, and SmoothQuantGemm.
#include "gemm.h"

#include <algorithm>

#include "gemm_kernels.h"
#include "tuning.h"
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

// CUTLASS counts in 32 bits, and stores 16 bytes at a time.
bool fits_cutlass(const Gemm& g) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  int64_t size = g.out == QPASS_FLOAT ? 4 : 2;
  return g.ldd * size % 16 == 0 && g.n * size % 16 == 0 && g.m <= kMost && g.n <= kMost && g.k <= kMost;
}

// Whether the split-K product for few tokens takes it, which copies rows one behind another.
bool fits_split_k(const Gemm& g) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1024;
  return g.in == QPASS_INT8 && g.m <= kSplitKTokens && g.n < kMost && g.k < kMost && g.ldd == g.n;
}

constexpr uint32_t bit(qpass_variant variant) { return 1u << variant; }

// The variants that are compiled for the device, and can do what is asked.
uint32_t variants_of(const Gemm& g, const Device& device) {
  uint32_t mask = bit(QPASS_MMA);
  if (g.in == QPASS_INT8) mask |= bit(QPASS_SKINNY);
  if (QPASS_STREAMS && device.major == 9 && fits_split_k(g)) mask |= bit(QPASS_SM90_SPLIT_K);
  if (!fits_cutlass(g)) return mask;
  const bool hopper = QPASS_SM90A && device.major == 9;
  if (hopper) mask |= bit(QPASS_SM90_128X256);
  if (hopper && g.out != QPASS_FLOAT) mask |= bit(QPASS_SM90_128X128);
  if (hopper && g.in == QPASS_INT8) mask |= bit(QPASS_SM90_64X128);
  if (hopper && g.in == QPASS_INT8 && g.out != QPASS_FLOAT) mask |= bit(QPASS_SM90_64X64);
  if (QPASS_SM80 && !hopper) mask |= bit(QPASS_SM80_128X128);
  return mask;
}

// Rounds of the multiprocessors that tiles of 128 tokens and n channels take, of which two that follow one another in tokens, or else in
// channels, are a cluster's.
int64_t rounds_of_pairs(const Gemm& g, int64_t n, bool along_channels, const Device& device) {
  const int64_t tiles = along_channels ? ceil_div(g.m, 128) * ceil_div(g.n, 2 * n) : ceil_div(g.m, 256) * ceil_div(g.n, n);
  return ceil_div(2 * tiles, int64_t(device.multiprocessors));
}

// Whether those of the largest tiles are to be along the channels: 300 tokens are three tiles, but two pairs.
bool pairs_along_channels(const Gemm& g, const Device& device) {
  return g.in == QPASS_INT8 && rounds_of_pairs(g, 256, true, device) < rounds_of_pairs(g, 256, false, device);
}

qpass_variant rule(const Gemm& g, uint32_t mask, const Device& device) {
  auto tiles = [&](int64_t m, int64_t n) { return ceil_div(g.m, m) * ceil_div(g.n, n); };
  auto at_once = [&](int64_t m, int64_t n) { return tiles(m, n) <= device.multiprocessors; };
  // Hopper's smallest tiles are faster from the second tile of tokens on, and beside small weights from the first token on
  if (!(mask & bit(QPASS_SM90_64X64) && g.k <= 2048 && at_once(64, 64))) {
    if (mask & bit(QPASS_SM90_SPLIT_K) && g.m <= 32) return QPASS_SM90_SPLIT_K;
    const int64_t few = mask & bit(QPASS_SM90_64X128) ? 16 : skinny_tokens(g.n, g.k, kHeadStartInt8, kSkinnyTokens);
    if (g.in == QPASS_INT8 && g.m <= few) return QPASS_SKINNY;
  }
  auto first = [&] {
    // small ones as long as each has a multiprocessor to itself, or where larger ones would be filled by half
    if (mask & bit(QPASS_SM90_64X64) && (g.m <= 64 || at_once(64, 64))) return QPASS_SM90_64X64;
    if (mask & bit(QPASS_SM90_64X128) && (g.m <= 128 || at_once(64, 128))) return QPASS_SM90_64X128;
    // where the largest would wait for the results of a tile more than for what little of K the next has
    if (g.k <= 2048 && !at_once(128, 256)) return QPASS_SM90_128X128;
    // The largest does the most with what it reads, but its last round may be filled by little. What rounds of others take of one of
    // its own was measured on an H200 (tuning/nvidia_h200.json) and, of an odd number of tiles of tokens, on an H100 (`w8a8_pairs` in
    // benchmarks/results/products_profile_h100.json).
    const bool odd = g.in == QPASS_INT8 && ceil_div(g.m, 128) % 2;
    const double largest = double(rounds_of_pairs(g, 256, pairs_along_channels(g, device), device));
    const double half = double(rounds_of_pairs(g, 128, false, device)) * (odd ? 0.6 : 0.52);
    const double quarter = double(ceil_div(tiles(64, 128), int64_t(device.multiprocessors))) * (odd ? 0.35 : 0.32);
    if (mask & bit(QPASS_SM90_64X128) && quarter < std::min(largest, half)) return QPASS_SM90_64X128;
    return half < largest ? QPASS_SM90_128X128 : QPASS_SM90_128X256;
  };
  for (qpass_variant variant : {first(), QPASS_SM90_128X256, QPASS_SM80_128X128}) {
    if (mask & bit(variant)) return variant;
  }
  return QPASS_MMA;
}

template <typename In, typename Out>
cudaError_t launch(const Gemm& g, qpass_variant variant, const Device& device, cudaStream_t stream) {
  [[maybe_unused]] constexpr bool kInt8 = std::is_same_v<In, int8_t>, kFloat = std::is_same_v<Out, float>;
  switch (variant) {
#if QPASS_SM90A
    case QPASS_SM90_64X64:
      if constexpr (kInt8 && !kFloat) return gemm_sm90<In, Out, QPASS_SM90_64X64>(g, device, stream);
      break;
    case QPASS_SM90_64X128:
      if constexpr (kInt8) return gemm_sm90<In, Out, QPASS_SM90_64X128>(g, device, stream);
      break;
    case QPASS_SM90_128X128:
      if constexpr (!kFloat) return gemm_sm90<In, Out, QPASS_SM90_128X128>(g, device, stream);
      break;
    case QPASS_SM90_128X256:
      if constexpr (kInt8) {
        if (pairs_along_channels(g, device)) return gemm_sm90<In, Out, QPASS_SM90_128X256, true>(g, device, stream);
      }
      return gemm_sm90<In, Out, QPASS_SM90_128X256>(g, device, stream);
#endif
#if QPASS_SM80
    case QPASS_SM80_128X128: {
      Gemm vectors = g;
      if (cudaError_t e = spread_scales(&vectors, stream)) return e;
      return gemm_sm80<In, Out>(vectors, device, stream);
    }
#endif
    default: break;
  }
  return cudaErrorNotSupported;
}

cudaError_t launch(const Gemm& g, qpass_variant variant, const Device& device, cudaStream_t stream) {
  if (variant == QPASS_SKINNY) return skinny_int8(g, stream);
#if QPASS_STREAMS
  if (variant == QPASS_SM90_SPLIT_K) {
    return with_float_type(g.out, [&](auto tag) { return int8_sm90<typename decltype(tag)::type>(g, device, stream); });
  }
#endif
  if (variant == QPASS_MMA) return gemm_mma(g, stream);
  if (g.in == QPASS_HALF) return launch<half, half>(g, variant, device, stream);
  if (g.in == QPASS_BFLOAT16) return launch<bfloat16, bfloat16>(g, variant, device, stream);
  return with_float_type(
      g.out, [&](auto tag) { return launch<int8_t, typename decltype(tag)::type>(g, variant, device, stream); });
}

}  // namespace

cudaError_t gemm(const Gemm& g, cudaStream_t stream) {
  if (!g.m || !g.n) return cudaSuccess;
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  const uint32_t mask = variants_of(g, device);
  if (g.variant > QPASS_RULE) return mask & bit(g.variant) ? launch(g, g.variant, device, stream) : cudaErrorNotSupported;
  cudaError_t e = launch(g, rule(g, mask, device), device, stream);
  return e == cudaErrorNotSupported ? gemm_mma(g, stream) : e;
}

size_t gemm_workspace(const Gemm& g) {
  size_t vectors = QPASS_SM80 ? aligned(g.m * sizeof(float)) + aligned(g.n * sizeof(float)) : 0;
  const size_t split = QPASS_STREAMS ? split_bytes(std::min(g.m, kSplitKTokens), g.n, kSplitKTokens) : 0;
  return g.in == QPASS_INT8 ? std::max({vectors, split, skinny_int8_workspace(g)}) : vectors;
}

cudaError_t gemm_choice(const Gemm& g, qpass_choice* choice) {
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  choice->mask = variants_of(g, device);
  choice->rule = rule(g, choice->mask, device);
  return cudaSuccess;
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
  g.variant = args.variant;
  g.follows = g.lda == args.k;  // else the weight is padded just before
  return g;
}

cudaError_t smooth_quant_gemm(const qpass_smooth_quant_gemm_args& args, cudaStream_t stream) {
  Gemm g = product_of(args);
  if (g.lda != args.k) {
    char* q = static_cast<char*>(args.workspace) + aligned(gemm_workspace(g));
    char* weight = q + aligned(args.m * g.lda);
    if (cudaError_t e = pad_rows(args.q, q, args.m, args.k, g.lda, stream)) return e;
    if (cudaError_t e = pad_rows(args.weight, weight, args.n, args.k, g.ldb, stream)) return e;
    g.a = q, g.b = weight;
    g.k = g.lda;  // zeros by zeros
  }
  return gemm(g, stream);
}

}  // namespace
}  // namespace qpass

size_t qpass_smooth_quant_gemm_workspace(const qpass_smooth_quant_gemm_args* args) {
  using namespace qpass;
  size_t bytes = aligned(gemm_workspace(product_of(*args)));
  int64_t k = padded(args->k);
  return k == args->k ? bytes : bytes + aligned(args->m * k) + aligned(args->n * k);
}

int qpass_smooth_quant_gemm_choice(const qpass_smooth_quant_gemm_args* args, qpass_choice* choice) {
  choice->kind = qpass::kind_of(*args);
  return qpass::gemm_choice(qpass::product_of(*args), choice);
}

int qpass_smooth_quant_gemm(const qpass_smooth_quant_gemm_args* args, cudaStream_t stream) {
  using namespace qpass;
  if (!args->m || !args->n) return cudaSuccess;
  if (!args->k) return cudaErrorInvalidValue;
  return by_variant(*args, [&](const auto& chosen) { return smooth_quant_gemm(chosen, stream); });
}
