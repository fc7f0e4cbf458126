// LayernormQuantization and RmsnormQuantization.
#include "quantized_rows.cuh"

namespace qpass {
namespace {

__device__ __forceinline__ int64_t operand_row(const qpass_rows& rows, int64_t row) {
  if (!rows.rank) return row;
  int64_t found = 0;
  for (int d = rows.rank - 1; d >= 0; --d) {
    found += row % rows.extent[d] * rows.stride[d];
    row /= rows.extent[d];
  }
  return found;
}

template <typename Element>
struct Normed {
  using T = Element;
  static constexpr bool kNorm = true;

  __device__ Normed at(int64_t row) const {
    Normed one = *this;
    one.x += operand_row(x_rows, row) * k;
    if (residual) one.residual += operand_row(residual_rows, row) * k;
    if (sum) one.sum += row * k;
    return one;
  }

  template <int V>
  __device__ void load(int column, float (&v)[V]) const {
    qpass::load<V>(x + column, v);
    if (!residual) return;
    float other[V];
    qpass::load<V>(residual + column, other);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = to_float(from_float<T>(v[i] + other[i]));  // as the Add that it stands for
    if (sum) store<V>(sum + column, v);
  }

  template <int V>
  __device__ void scale(int column, float mean, float inverse, float (&v)[V]) const {
    float by[V], plus[V];
    qpass::load<V>(gamma + column, by);
    if (beta) qpass::load<V>(beta + column, plus);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = __fmul_rn(__fmul_rn(v[i] - mean, inverse), by[i]);  // rounded after each step, like the ONNX body
      if (beta) v[i] = __fadd_rn(v[i], plus[i]);
    }
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
  return qpass::with_float_type(args->type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto typed = [](const void* p) { return static_cast<const T*>(p); };
    qpass::Normed<T> source{typed(args->x), typed(args->residual), typed(args->gamma), typed(args->beta),
        static_cast<T*>(args->sum), args->k, args->x_rows, args->residual_rows, args->epsilon, args->rms != 0};
    return qpass::quantize_rows_of(source, args->rows, args->k, args->result, stream);
  });
}
