// WeightOnlyQuantMatmul and WeightOnlyGroupwiseQuantMatmul: few tokens by kernels that multiply the integers, more on Hopper by some that
// make 16-bit floats of them on their way to the tensor cores, and else by a 16-bit product on the weight expanded chunk by chunk: a
// chunk is large enough to fill the GPU, and bounds the workspace.
#include "weight_only.h"

#include <optional>

#include "mixed.h"
#include "tuning.h"

namespace qpass {
namespace {

constexpr int64_t kChunkBytes = 512 << 20;  // of expanded weight

constexpr double kHeadStart = 7e8;  // of the integers, over expanding them: see skinny_tokens
constexpr int64_t kFewTokens = 128;
constexpr int64_t kScaledAsIntegers = 32;  // most tokens that split-K products take as integers where there is a pre_quant_scale

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

enum Path {
  kFew,     // skinny.cuh
  kSplitK,  // fixed_sm90.cuh
  kMixed,   // mixed_sm90.cuh
  kMany,    // expanded
};

// The product that the mixed path would be; whether there is one does not depend on where tensors lie.
MixedGemm mixed_of(const qpass_weight_only_matmul_args& args) {
  MixedGemm g{};
  g.type = args.type, g.int4 = args.int4 != 0;
  g.m = args.m, g.n = args.n, g.k = args.k;
  g.x = args.x, g.weight = args.weight, g.group_size = args.group_size;
  g.scale = args.scale, g.zero = args.zero, g.bias = args.bias, g.y = args.y;
  return g;
}

// Few tokens never expand, so that a model that knows no others needs no workspace for it.
bool may_expand(const qpass_weight_only_matmul_args& args) {
  return args.m > kSkinnyTokens && args.type != QPASS_FLOAT;
}

// Whether Hopper's products can do it. An engine may be built on one GPU and run on another: workspaces do not depend on which it is.
bool may_mix_on_hopper(const qpass_weight_only_matmul_args& args) { return QPASS_STREAMS && fits_mixed(mixed_of(args)); }

// The current device, where that is a Hopper whose products can do it.
std::optional<Device> mixing_device(const qpass_weight_only_matmul_args& args) {
  Device device;
  const bool may = may_mix_on_hopper(args) && !current_device(&device) && device.major == 9;
  return may ? std::optional(device) : std::nullopt;
}

Path path_by_rule(const qpass_weight_only_matmul_args& args) {
  if (args.type == QPASS_FLOAT) return kFew;
  if (const std::optional<Device> device = mixing_device(args)) {
    const int64_t weights = args.n * args.k;
    const bool small = is_small(mixed_of(args), device->multiprocessors);
    if (small && (args.m > 16 || (!args.int4 && args.k <= 1024))) return kMixed;
    if (args.m <= 32) return kSplitK;
    if (args.m <= kSplitKTokens && weights >= 1 << 24) return kSplitK;
    // where K is short a tile's results take longer than its products, and CUTLASS's next tile does not wait for them
    return args.k <= 1024 && ceil_div(args.m, 256) * ceil_div(args.n, 128) > device->multiprocessors ? kMany : kMixed;
  }
  return args.m <= skinny_tokens(args.n, args.k, kHeadStart, kFewTokens) ? kFew : kMany;
}

Path path_of(const qpass_weight_only_matmul_args& args) {
  if (args.variant <= QPASS_RULE) return path_by_rule(args);
  switch (args.variant) {
    case QPASS_SKINNY: return kFew;
    case QPASS_SM90_SPLIT_K: return kSplitK;
    case QPASS_SM90_MIXED: return kMixed;
    default: return kMany;
  }
}

// A call of as many tokens as the split-K product takes at most.
qpass_weight_only_matmul_args few_of(qpass_weight_only_matmul_args args) {
  args.m = std::min(args.m, kSplitKTokens);
  return args;
}

int span_of(const qpass_weight_only_matmul_args& args) { return args.group_size ? args.group_size : kBlockK; }

// Where in the workspace the parts of a call lie.
struct Plan {
  Plan(const qpass_weight_only_matmul_args& args, Path path) : path(path) {
    const bool few = path == kFew;
    int64_t bytes = args.int4 ? args.k / 2 : args.k;
    row_bytes = ceil_div(bytes, 16) * 16;
    pads_weight = few && row_bytes != bytes;
    padded = few ? row_bytes * (args.int4 ? 2 : 1) : path == kSplitK ? ceil_div(args.k, kBlockK) * kBlockK : ceil_div(args.k, 8) * 8;
    fixed = (few && args.type != QPASS_FLOAT) || path == kSplitK;
    makes = few && fixed && args.m <= kMadeTokens && args.k % kFixedV == 0;
    scales_ahead = path == kSplitK && args.pre_quant_scale && args.m > kScaledAsIntegers;
    prepares = !makes && (fixed || args.pre_quant_scale || args.type == QPASS_FLOAT || padded != args.k);
    size_t at = 0;
    auto take = [&](size_t size) {
      size_t from = at;
      at += aligned(size);
      return from;
    };
    int64_t planes = args.type == QPASS_FLOAT ? kPlanes : 1;
    x = take(prepares ? args.m * padded * 2 * planes : 0);
    side = ceil_div(args.m, 4) * 4;
    act_scale = take(fixed && !makes ? ceil_div(padded, kBlockK) * side * sizeof(float) : 0);
    act_sum = take(fixed && !makes ? ceil_div(padded, span_of(args)) * side * sizeof(int32_t) : 0);
    divides = (!fixed || scales_ahead) && args.pre_quant_scale && args.type == QPASS_HALF;
    row_scale = take(divides ? args.m * sizeof(float) : 0);
    weight = take(pads_weight ? args.n * row_bytes : 0);
    partial = take(few ? partial_bytes(args.m, args.n)
                   : path == kSplitK ? split_bytes(std::min(args.m, kSplitKTokens), args.n, kSplitKTokens)
                   : path == kMixed ? mixed_workspace(args.m, args.n) : 0);
    if (path == kMany) {
      chunk = std::min(args.n, std::max<int64_t>(128, kChunkBytes / (padded * 2) / 128 * 128));
      expanded = take(chunk * padded * 2);
      scale = take(chunk * sizeof(float));
    }
    size = at;
  }

  Path path;
  bool fixed, makes;  // activations are multiplied as Fixed; made by the product itself
  bool scales_ahead;  // or where there is a product for these, as 16-bit floats times pre_quant_scale
  bool pads_weight, prepares, divides;
  int64_t side;
  int64_t padded;  // values of a row as the kernel sees it
  int64_t row_bytes;
  int64_t chunk = 0;  // rows of weight that are expanded at a time
  size_t x, act_scale, act_sum, row_scale, weight, partial, expanded = 0, scale = 0, size;
};

Gemm product_of(const qpass_weight_only_matmul_args& args, const Plan& plan) {
  char* workspace = static_cast<char*>(args.workspace);
  Gemm g{};
  g.out = args.type;
  g.in = args.type == QPASS_HALF ? QPASS_HALF : QPASS_BFLOAT16;
  g.m = args.m, g.n = args.n, g.k = plan.padded;
  g.a = plan.prepares ? workspace + plan.x : args.x;
  g.lda = plan.padded;
  if (plan.divides) g.row_scale = reinterpret_cast<float*>(workspace + plan.row_scale), g.per_row = true;
  g.bias = args.bias;
  g.d = args.y, g.ldd = args.n;
  g.variant = args.variant;
  return g;
}

FixedActivations fixed_of(const qpass_weight_only_matmul_args& args, const Plan& plan) {
  char* workspace = static_cast<char*>(args.workspace);
  return {reinterpret_cast<int8_t*>(workspace + plan.x), plan.padded, reinterpret_cast<float*>(workspace + plan.act_scale),
      reinterpret_cast<int32_t*>(workspace + plan.act_sum), plan.side, span_of(args), plan.path == kSplitK};
}

cudaError_t few_tokens(const qpass_weight_only_matmul_args& args, const Plan& plan, cudaStream_t stream) {
  char* workspace = static_cast<char*>(args.workspace);
  Skinny p{};
  p.g = product_of(args, plan);
  p.g.b = args.weight;
  p.g.ldb = plan.row_bytes;
  if (plan.pads_weight) {
    int64_t bytes = args.int4 ? args.k / 2 : args.k;
    p.g.b = workspace + plan.weight;
    if (cudaError_t e = pad_rows(args.weight, workspace + plan.weight, args.n, bytes, plan.row_bytes, stream)) return e;
  }
  if (!args.group_size) p.g.col_scale = args.scale, p.g.per_column = true;
  p.plane = args.m * plan.padded;
  p.scale = args.scale;
  p.zero = args.zero;
  p.scales = args.group_size ? args.k / args.group_size : 1;
  p.group_shift = args.group_size == 32 ? 5 : args.group_size == 64 ? 6 : 7;
  p.partial = workspace + plan.partial;
  p.follows = (plan.prepares || plan.makes) && !plan.pads_weight;
  if (!plan.fixed) return weight_only_float(p, args.int4, args.group_size, stream);
  const FixedActivations to = fixed_of(args, plan);
  p.act_scale = to.scale, p.act_sum = to.sum, p.side = to.side;
  if (plan.makes) p.x = args.x, p.x_scale = args.pre_quant_scale, p.x_k = args.k;
  return args.int4 ? weight_only_int4(p, args.group_size, stream) : weight_only_int8(p, args.group_size, stream);
}

cudaError_t many_tokens(const qpass_weight_only_matmul_args& args, const Plan& plan, cudaStream_t stream) {
  char* workspace = static_cast<char*>(args.workspace);
  const Gemm whole = product_of(args, plan);
  for (int64_t n = 0; n < args.n; n += plan.chunk) {
    Gemm g = whole;
    g.n = std::min(plan.chunk, args.n - n);
    g.b = workspace + plan.expanded, g.ldb = plan.padded;
    g.col_scale = reinterpret_cast<float*>(workspace + plan.scale), g.per_column = true;
    g.d = static_cast<char*>(whole.d) + n * 2;
    if (g.bias) g.bias = static_cast<const char*>(whole.bias) + n * 2;
    float* scale = reinterpret_cast<float*>(workspace + plan.scale);
    if (cudaError_t e = expand_weight(args, n, g.n, workspace + plan.expanded, plan.padded, scale, stream)) return e;
    if (cudaError_t e = gemm(g, stream)) return e;
  }
  return cudaSuccess;
}

cudaError_t mixed(const qpass_weight_only_matmul_args& args, const Plan& plan, cudaStream_t stream) {
  char* workspace = static_cast<char*>(args.workspace);
  MixedGemm g = mixed_of(args);
  g.workspace = workspace + plan.partial;
  if (plan.prepares) g.x = workspace + plan.x;
  if (plan.divides) g.row_scale = reinterpret_cast<float*>(workspace + plan.row_scale);
  return mixed_gemm(g, stream);
}

// By the product that takes tokens as they are, times pre_quant_scale: cudaErrorNotSupported where it cannot do it, or is slower.
cudaError_t scaled_ahead(const qpass_weight_only_matmul_args& args, const Plan& plan, MixedGemm g, cudaStream_t stream) {
  char* workspace = static_cast<char*>(args.workspace);
  g.x = workspace + plan.x, g.x_scale = nullptr;
  if (!fits_exact(g)) return cudaErrorNotSupported;
  float* row_scale = plan.divides ? reinterpret_cast<float*>(workspace + plan.row_scale) : nullptr;
  g.row_scale = row_scale;
  if (cudaError_t e = prepare_activations(args, workspace + plan.x, args.k, row_scale, stream)) return e;
  return fixed_gemm(g, nullptr, stream);
}

cudaError_t split_k(const qpass_weight_only_matmul_args& args, const Plan& plan, cudaStream_t stream) {
  MixedGemm g = mixed_of(args);
  g.workspace = static_cast<char*>(args.workspace) + plan.partial;
  g.x_scale = args.pre_quant_scale;
  cudaError_t e = plan.scales_ahead ? scaled_ahead(args, plan, g, stream) : fixed_gemm(g, nullptr, stream);
  if (e != cudaErrorNotSupported) return e;
  const FixedActivations x = fixed_of(args, plan);
  e = prepare_fixed(args, x, stream);
  return e ? e : fixed_gemm(g, &x, stream);
}

cudaError_t weight_only_matmul(const qpass_weight_only_matmul_args& args, cudaStream_t stream) {
  const Plan plan(args, path_of(args));
  if (plan.path == kMany && !may_expand(args)) return cudaErrorNotSupported;
  const bool streams = plan.path == kMixed || plan.path == kSplitK;
  if (streams && (!mixing_device(args) || (plan.path == kSplitK && args.m > kSplitKTokens))) return cudaErrorNotSupported;
  if (plan.path == kSplitK) return split_k(args, plan, stream);
  if (plan.fixed && plan.prepares) {
    if (cudaError_t e = prepare_fixed(args, fixed_of(args, plan), stream)) return e;
  } else if (plan.prepares) {
    char* workspace = static_cast<char*>(args.workspace);
    float* row_scale = plan.divides ? reinterpret_cast<float*>(workspace + plan.row_scale) : nullptr;
    if (cudaError_t e = prepare_activations(args, workspace + plan.x, plan.padded, row_scale, stream)) return e;
  }
  return plan.path == kFew     ? few_tokens(args, plan, stream)
         : plan.path == kMixed ? mixed(args, plan, stream)
                               : many_tokens(args, plan, stream);
}

}  // namespace
}  // namespace qpass

size_t qpass_weight_only_matmul_workspace(const qpass_weight_only_matmul_args* args) {
  using namespace qpass;
  if (!args->n || !args->k) return 0;
  size_t most = Plan(*args, kFew).size;
  if (may_mix_on_hopper(*args)) most = std::max({most, Plan(*args, kMixed).size, Plan(few_of(*args), kSplitK).size});
  if (may_expand(*args)) most = std::max(most, Plan(*args, kMany).size);
  return most;
}

int qpass_weight_only_matmul_choice(const qpass_weight_only_matmul_args* args, qpass_choice* choice) {
  using namespace qpass;
  *choice = {};
  if (may_expand(*args)) {
    if (cudaError_t e = gemm_choice(product_of(*args, Plan(*args, kMany)), choice)) return e;
  }
  choice->mask |= 1u << QPASS_SKINNY;
  if (mixing_device(*args)) choice->mask |= 1u << QPASS_SM90_MIXED | (args->m <= kSplitKTokens ? 1u << QPASS_SM90_SPLIT_K : 0);
  choice->kind = kind_of(*args);
  const Path path = path_by_rule(*args);
  if (path != kMany) choice->rule = path == kFew ? QPASS_SKINNY : path == kSplitK ? QPASS_SM90_SPLIT_K : QPASS_SM90_MIXED;
  return cudaSuccess;
}

int qpass_weight_only_matmul(const qpass_weight_only_matmul_args* args, cudaStream_t stream) {
  using namespace qpass;
  if (!args->m || !args->n) return cudaSuccess;
  bool grouped = args->group_size == 32 || args->group_size == 64 || args->group_size == 128;
  if (!args->k || (args->group_size && !grouped)) return cudaErrorInvalidValue;
  return by_variant(*args, [&](const auto& chosen) { return weight_only_matmul(chosen, stream); });
}
