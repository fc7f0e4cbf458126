// QuantizeTensor and QuantizePerToken.
#include "quantized_rows.cuh"

namespace qpass {
namespace {

template <typename Element>
struct Plain {
  using T = Element;
  static constexpr bool kNorm = false, kHasY = false;
  static constexpr int kRegisters = 36;

  __device__ Plain at(int64_t row) const { return {x + row * k, k}; }

  template <int V>
  using Raw = Bits<T, V>;

  template <int V>
  struct Coefficients {};

  template <int V>
  __device__ Raw<V> fetch(int column) const {
    return read_once<V>(x + column);
  }

  template <int V, int N>
  __device__ void values(const Raw<V> (&raw)[N], float (&v)[N][V]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to_floats(raw[i], v[i]);
  }

  const T* x;
  int64_t k;
};

}  // namespace
}  // namespace qpass

int qpass_quantize(const qpass_quantize_args* args, cudaStream_t stream) {
  return qpass::with_float_type(args->type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    qpass::Plain<T> source{static_cast<const T*>(args->x), args->k};
    return qpass::quantize_rows_of(source, args->rows, args->k, args->result, stream);
  });
}
