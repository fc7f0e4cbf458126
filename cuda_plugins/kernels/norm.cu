// LayernormQuantization and RmsnormQuantization.
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

template <typename Element, bool kResidual>
struct Normed {
  using T = Element;
  static constexpr bool kNorm = true, kHasY = true, kHasSum = kResidual;
  static constexpr int kRegisters = 36;

  template <int V>
  struct Raw {
    Bits<T, V> terms[kResidual ? 2 : 1];
  };
  template <int V>
  struct Coefficients {
    Bits<T, V> gamma;
  };

  __device__ Normed at(int64_t row) const {
    Normed one = *this;
    one.x += operand_row(x_rows, row) * k;
    if (kResidual) one.residual += operand_row(residual_rows, row) * k;
    if (kHasSum && sum) one.sum += row * k;
    return one;
  }

  template <int V>
  __device__ Raw<V> fetch(int column) const {
    if constexpr (kResidual) return {read_once<V>(x + column), read_once<V>(residual + column)};
    else return {read_once<V>(x + column)};
  }

  template <int V, int N>
  __device__ void values(const Raw<V> (&raw)[N], float (&v)[N][V]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to_floats(raw[i].terms[0], v[i]);
      if constexpr (kResidual) {
        float other[V];
        to_floats(raw[i].terms[1], other);
#pragma unroll
        for (int j = 0; j < V; ++j) v[i][j] += other[j];
        to_floats(to_bits<T>(v[i]), v[i]);  // rounded, as the Add that it stands for
      }
    }
  }

  template <int V>
  __device__ Coefficients<V> coefficients(int column) const {
    return {read<V>(gamma + column)};
  }

  __device__ void prefetch(int column) const {
    if (beta) qpass::prefetch(beta + column);
  }

  template <int V>
  __device__ void scale(int column, bool within, const Coefficients<V>& by, float inverse, float (&v)[V]) const {
    float factor[V];
    to_floats(by.gamma, factor);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], inverse), factor[i]);  // rounded like the ONNX body
    if (!beta) return;
    float plus[V] = {};
    if (within) load<V>(beta + column, plus);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = __fadd_rn(v[i], plus[i]);
  }

  const T *x, *residual, *gamma, *beta;
  T* sum;
  int64_t k;
  qpass_rows x_rows, residual_rows;
  float epsilon;
  bool rms;
};

}  // namespace
}  // namespace qpass

int qpass_norm_quantize(const qpass_norm_quantize_args* args, cudaStream_t stream) {
  if ((args->x_rows.rank || args->residual_rows.rank) && args->rows > UINT32_MAX) return cudaErrorInvalidValue;
  return qpass::with_float_type(args->type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto typed = [](const void* p) { return static_cast<const T*>(p); };
    auto launch = [&](auto residual) {
      qpass::Normed<T, residual()> source{typed(args->x), typed(args->residual), typed(args->gamma), typed(args->beta),
          static_cast<T*>(args->sum), args->k, args->x_rows, args->residual_rows, args->epsilon, args->rms != 0};
      return qpass::quantize_rows_of(source, args->rows, args->k, args->result, stream);
    };
    return args->residual ? launch(std::true_type()) : launch(std::false_type());
  });
}
