// ActivationQuantization.
#include "activations.cuh"
#include "quantized_rows.cuh"

namespace qpass {
namespace {

template <typename Element, bool kGated>
struct Activated {
  using T = Element;
  static constexpr bool kNorm = false, kHasY = true, kExact = false, kFewWarps = false;
  static constexpr int kOperands = kGated ? 2 : 1, kRegisters = 56;

  __device__ Activated at(int64_t row) const {
    return {x + row * k, kGated ? up + row * k : nullptr, k, activation};
  }

  __device__ const T* operand(int i) const { return i ? up : x; }

  template <int V>
  __device__ void values(const Operands<Activated, V>& raw, float (&v)[V]) const {
    to_floats(raw.of[0], v);
    activate(v, activation);
    if constexpr (kGated) {
      float factor[V];
      to_floats(raw.of[1], factor);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] *= factor[i];
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
