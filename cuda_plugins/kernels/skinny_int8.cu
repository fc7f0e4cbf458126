// int8 × int8 for few tokens.
#include "skinny.cuh"

namespace qpass {

cudaError_t skinny_int8(const Gemm& g, cudaStream_t stream) {
  Skinny p{};
  p.g = g;
  p.partial = g.workspace;
  return skinny_by_tokens<int8_t, false, kBlockK, false, 1>(p, stream);
}

size_t skinny_int8_workspace(const Gemm& g) {
  return partial_bytes(g.m, g.n);
}

}  // namespace qpass
