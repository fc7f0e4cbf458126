// The kernels that `gemm` chooses from. Each returns cudaErrorNotSupported for what it cannot do, before anything is launched.
#pragma once

#include "gemm.h"

namespace qpass {

// Own kernel on mma.sync: every shape and architecture.
cudaError_t gemm_mma(const Gemm& g, cudaStream_t stream);

// CUTLASS 3.x on Hopper. Rows of d must be 16-byte aligned. `wide`: 128 × 256 tiles for many tokens, else 64 × 128.
template <typename In, typename Out, bool kWide>
cudaError_t gemm_sm90(const Gemm& g, cudaStream_t stream);

// CUTLASS 2.x, for Ampere to Blackwell. Rows of d must be 16-byte aligned.
template <typename In, typename Out>
cudaError_t gemm_sm80(const Gemm& g, cudaStream_t stream);

}  // namespace qpass
