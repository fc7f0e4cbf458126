// ActivationQuantization.
#include "activations.cuh"
#include "quantized_rows.cuh"

namespace qpass {
namespace {

template <typename Element, bool kGated>
struct Activated {
  using T = Element;
  static constexpr bool kNorm = false, kHasY = true;
  static constexpr int kRegisters = 56;

  template <int V>
  struct Raw {
    Bits<T, V> factors[kGated ? 2 : 1];
  };
  template <int V>
  struct Coefficients {};

  __device__ Activated at(int64_t row) const {
    return {x + row * k, kGated ? up + row * k : nullptr, k, activation};
  }

  template <int V>
  __device__ Raw<V> fetch(int column) const {
    if constexpr (kGated) return {read_once<V>(x + column), read_once<V>(up + column)};
    else return {read_once<V>(x + column)};
  }

  template <int V, int N>
  __device__ void values(const Raw<V> (&raw)[N], float (&v)[N][V]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to_floats(raw[i].factors[0], v[i]);
      activate(v[i], activation);
      if constexpr (kGated) {
        float factor[V];
        to_floats(raw[i].factors[1], factor);
#pragma unroll
        for (int j = 0; j < V; ++j) v[i][j] *= factor[j];
      }
    }
  }

  const T* x;
  const T* up;
  int64_t k;
  int activation;
};

}  // namespace
}  // namespace qpass

int qpass_activation_quantize(const qpass_activation_quantize_args* args, cudaStream_t stream) {
  if (args->activation < qpass::kGelu || args->activation > qpass::kSigmoid) return cudaErrorInvalidValue;
  return qpass::with_float_type(args->type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto launch = [&](auto gated) {
      qpass::Activated<T, gated()> source{
          static_cast<const T*>(args->x), static_cast<const T*>(args->up), args->k, args->activation};
      return qpass::quantize_rows_of(source, args->rows, args->k, args->result, stream);
    };
    return args->up ? launch(std::true_type()) : launch(std::false_type());
  });
}
