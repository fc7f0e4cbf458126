#include "mixed.h"

#include <type_traits>

#include "gemm.h"

namespace qpass {

bool fits_mixed(const MixedGemm& g) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1024;
  return g.type != QPASS_FLOAT && g.k % (g.int4 ? 32 : 16) == 0 && g.m < kMost && g.n < kMost && g.k < kMost / 2;
}

bool is_small(const MixedGemm& g, int multiprocessors) {
  return g.k <= 2048 && ceil_div(g.n, 64) * ceil_div(g.m, 64) <= multiprocessors;
}

size_t mixed_workspace(int64_t m, int64_t n) { return split_bytes(m, n, kMixedTokens); }

int rows_together(int64_t n, int64_t stride, int unit) {
  int64_t rows = 1;
  while (rows * stride % 16) rows *= 2;
  const bool within_rows = n % rows == 0 && rows <= 8 && (rows == 1 || stride % unit == 0);  // no unit lies in two of them
  return within_rows ? int(rows) : 0;
}

bool fits_exact(const MixedGemm& g) {
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (g.m <= 16 || g.m > kSplitKTokens || g.x_scale || !aligned(g.x)) return false;
  if (!g.group_size) return true;
  auto copied = [&](const void* p, int bytes) {
    return aligned(p) && rows_together(g.n, g.k / g.group_size * bytes, exact_stage(g.int4) / g.group_size * bytes);
  };
  return copied(g.scale, 4) && (!g.zero || copied(g.zero, 1));
}

namespace {

// Calls f by the product's types, on the current device, if it can be done there.
template <typename F>
cudaError_t by_types(const MixedGemm& g, F f) {
  Device device;
  if (cudaError_t e = current_device(&device)) return e;
  if (!QPASS_STREAMS || device.major != 9 || !fits_mixed(g)) return cudaErrorNotSupported;
  if (g.type == QPASS_HALF) return g.int4 ? f(device, Tag<half>(), std::true_type()) : f(device, Tag<half>(), std::false_type());
  return g.int4 ? f(device, Tag<bfloat16>(), std::true_type()) : f(device, Tag<bfloat16>(), std::false_type());
}

}  // namespace

cudaError_t mixed_gemm(const MixedGemm& g, cudaStream_t stream) {
  return by_types(g, [&](const Device& device, auto type, auto int4) -> cudaError_t {
    if constexpr (QPASS_STREAMS) return mixed_sm90<typename decltype(type)::type, int4()>(g, device, stream);
    else return cudaErrorNotSupported;
  });
}

cudaError_t fixed_gemm(const MixedGemm& g, const FixedActivations* x, cudaStream_t stream) {
  return by_types(g, [&](const Device& device, auto type, auto int4) -> cudaError_t {
    if constexpr (QPASS_STREAMS) return fixed_sm90<typename decltype(type)::type, int4()>(g, x, device, stream);
    else return cudaErrorNotSupported;
  });
}

}  // namespace qpass
