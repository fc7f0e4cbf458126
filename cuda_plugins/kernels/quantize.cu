// QuantizeTensor and QuantizePerToken.
#include "quantized_rows.cuh"

namespace qpass {
namespace {

template <typename Element>
struct Plain {
  using T = Element;
  static constexpr bool kNorm = false, kHasY = false, kExact = true, kFewWarps = false;
  static constexpr int kOperands = 1, kRegisters = 36;

  __device__ Plain at(int64_t row) const { return {x + row * k, k}; }

  __device__ const T* operand(int) const { return x; }

  template <int V>
  __device__ void values(const Operands<Plain, V>& raw, float (&v)[V]) const {
    to_floats(raw.of[0], v);
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
