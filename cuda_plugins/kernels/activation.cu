// ActivationQuantization.
#include "quantized_rows.cuh"

namespace qpass {
namespace {

enum Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu, kRelu2, kSigmoid };

__device__ __forceinline__ float activate(float x, int activation) {
  switch (activation) {
    case kGelu: return x * (0.5f + 0.5f * erff(x * 0.70710678f));
    case kGeluTanh: return x * (0.5f + 0.5f * tanhf(0.79788456f * (x * (1.f + 0.044715f * (x * x)))));
    case kQuickGelu: return x / (1.f + expf(-(x * 1.702f)));
    case kRelu: return x < 0 ? 0.f : x;
    case kSilu: return x / (1.f + expf(-x));
    case kRelu2: {
      float positive = x < 0 ? 0.f : x;  // NaN stays NaN
      return positive * positive;
    }
    default: return 1.f / (1.f + expf(-x));
  }
}

template <typename Element>
struct Activated {
  using T = Element;
  static constexpr bool kNorm = false;

  __device__ Activated at(int64_t row) const { return {x + row * k, up ? up + row * k : nullptr, k, activation}; }

  template <int V>
  __device__ void load(int column, float (&v)[V]) const {
    qpass::load<V>(x + column, v);
    float factor[V];
    if (up) qpass::load<V>(up + column, factor);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = activate(v[i], activation);
      if (up) v[i] *= factor[i];
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
    qpass::Activated<T> source{
        static_cast<const T*>(args->x), static_cast<const T*>(args->up), args->k, args->activation};
    return qpass::quantize_rows_of(source, args->rows, args->k, args->result, stream);
  });
}
