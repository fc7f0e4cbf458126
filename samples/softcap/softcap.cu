// The plugin of softcap.py's op: the same declaration in C++, and a kernel.
//
//     qpass plugins build --with softcap.cu
#include "op.h"
#include "types.cuh"

namespace {

template <typename T>
__global__ void softcap(const T* x, T* y, int64_t count, float cap) {
  int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    y[i] = qpass::from_float<T>(tanhf(qpass::to_float(x[i]) / cap) * cap);
  }
}

class Softcap : public qpass::Op {
 public:
  using Op::Op;

  int run(const qpass::Call& call, cudaStream_t stream) const override {
    const qpass::Tensor &x = *call.in("x"), &y = *call.out("y");
    int64_t count = x.rows() * x.last();
    if (!count) return cudaSuccess;
    int blocks = int(std::min<int64_t>(qpass::ceil_div(count, 256), 4096));
    return qpass::with_float_type(x.type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      softcap<<<blocks, 256, 0, stream>>>(static_cast<const T*>(x.data), static_cast<T*>(y.data), count, call.number("cap"));
      return cudaGetLastError();
    });
  }
};

const Softcap op("Softcap", {{"cap", true}}, {{"x", qpass::Kind::kT, "... K"}}, {{"y", qpass::Kind::kT, "... K"}});
const qpass::Register registered(op);

}  // namespace
