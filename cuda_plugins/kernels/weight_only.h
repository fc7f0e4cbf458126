// The parts of the weight-only matmul: activations and weights made ready, and the kernel for few tokens by activation type.
#pragma once

#include "mixed.h"
#include "skinny.cuh"

namespace qpass {

constexpr int kPlanes = 3;  // bfloat16 values that add up to a float32: 3 · 8 bits of mantissa

// to = x · pre_quant_scale (where there is one), rows of k values to rows of `padded`, zeros behind. half and bfloat16 keep
// their type; float becomes kPlanes planes of bfloat16, m * padded elements apart. With row_scale (for half) each row is divided
// by a power of two that goes there.
cudaError_t prepare_activations(const qpass_weight_only_matmul_args& args, void* to, int64_t padded, float* row_scale,
    cudaStream_t stream);

// The same as Fixed, of half and bfloat16.
cudaError_t prepare_fixed(const qpass_weight_only_matmul_args& args, const FixedActivations& to, cudaStream_t stream);

// Rows of a weight as 16-bit floats, `padded` elements apart, each to be multiplied by row_scale: integers less their zero
// points where there is one scale a row, and shares of the row's largest scale where there are groups.
cudaError_t expand_weight(const qpass_weight_only_matmul_args& args, int64_t first, int64_t rows, void* to,
    int64_t padded, float* row_scale, cudaStream_t stream);

// Few tokens; `p` has everything but what follows from its shape. The first two of Fixed activations.
cudaError_t weight_only_int4(const Skinny& p, int group_size, cudaStream_t stream);
cudaError_t weight_only_int8(const Skinny& p, int group_size, cudaStream_t stream);
cudaError_t weight_only_float(const Skinny& p, bool int4, int group_size, cudaStream_t stream);

template <typename Act, bool kInt4, int kPlanesOfAct>
cudaError_t skinny_by_group(const Skinny& p, int group_size, cudaStream_t stream) {
  switch (group_size) {
    case 0: return skinny_by_tokens<Act, kInt4, kBlockK, false, kPlanesOfAct>(p, stream);
    case 32: return skinny_by_tokens<Act, kInt4, 32, true, kPlanesOfAct>(p, stream);
    case 64: return skinny_by_tokens<Act, kInt4, 64, true, kPlanesOfAct>(p, stream);
    case 128: return skinny_by_tokens<Act, kInt4, 128, true, kPlanesOfAct>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace qpass
