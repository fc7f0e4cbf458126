// Layernorm and Rmsnorm, and LayernormQuantization and RmsnormQuantization.
#include "quantized_rows.cuh"

namespace qpass {
namespace {

__device__ __forceinline__ int64_t operand_row(const qpass_rows& rows, int64_t row) {
  if (!rows.rank) return row;
  int64_t found = 0;
  uint32_t left = uint32_t(row);  // a division of 64 bits takes registers that the row needs
#pragma unroll 1
  for (int d = rows.rank - 1; d >= 0; --d) {
    found += left % uint32_t(rows.extent[d]) * rows.stride[d];
    left /= uint32_t(rows.extent[d]);
  }
  return found;
}

template <typename Element, bool kResidual, bool kRms_>
struct Normed {
  using T = Element;
  static constexpr bool kNorm = true, kHasY = true, kExact = false, kHasSum = kResidual, kRms = kRms_;
  // Where there is much to do for a row, the fewer warps do it, the less they wait for each other.
  static constexpr bool kFewWarps = kResidual || !kRms;
  static constexpr int kOperands = kResidual ? 2 : 1, kRegisters = 48;

  __device__ Normed at(int64_t row) const {
    Normed one = *this;
    one.x += operand_row(x_rows, row) * k;
    if (kResidual) one.residual += operand_row(residual_rows, row) * k;
    if (kHasSum && sum) one.sum += row * k;
    return one;
  }

  __device__ const T* operand(int i) const { return i ? residual : x; }

  template <int V>
  __device__ void values(const Operands<Normed, V>& raw, float (&v)[V]) const {
    to_floats(raw.of[0], v);
    if constexpr (kResidual) {
      float other[V];
      to_floats(raw.of[1], other);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] += other[i];
      to_floats(to_bits<T>(v), v);  // rounded, as the Add that it stands for
    }
  }

  const T *x, *residual, *gamma, *beta;
  T* sum;
  int64_t k;
  qpass_rows x_rows, residual_rows;
  float epsilon, share;  // share: 1 / k
};

}  // namespace
}  // namespace qpass

int qpass_norm(const qpass_norm_args* args, cudaStream_t stream) {
  if ((args->x_rows.rank || args->residual_rows.rank) && args->rows > UINT32_MAX) return cudaErrorInvalidValue;
  return qpass::with_float_type(args->type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto typed = [](const void* p) { return static_cast<const T*>(p); };
    auto launch = [&](auto residual, auto rms) {
      qpass::Normed<T, residual(), rms()> source{typed(args->x), typed(args->residual), typed(args->gamma), typed(args->beta),
          static_cast<T*>(args->sum), args->k, args->x_rows, args->residual_rows, args->epsilon, 1.f / float(args->k)};
      return qpass::quantize_rows_of(source, args->rows, args->k, args->result, stream);
    };
    auto of = [&](auto residual) { return args->rms ? launch(residual, std::true_type()) : launch(residual, std::false_type()); };
    return args->residual ? of(std::true_type()) : of(std::false_type());
  });
}
