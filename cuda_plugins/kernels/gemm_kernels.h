// The kernels that `gemm` chooses from. Each returns cudaErrorNotSupported for what it cannot do, before anything is launched.
#pragma once

#include "gemm.h"
#include "types.cuh"

namespace qpass {

// Own kernel on mma.sync: every shape and architecture.
cudaError_t gemm_mma(const Gemm& g, cudaStream_t stream);

// CUTLASS 3.x on Hopper, by one of the QPASS_SM90 tiles. Rows of d must be 16-byte aligned. Blocks of a cluster share channels, or
// tokens: kAlongChannels.
template <typename In, typename Out, qpass_variant kVariant, bool kAlongChannels = false>
cudaError_t gemm_sm90(const Gemm& g, const Device& device, cudaStream_t stream);

// CUTLASS 2.x, for Ampere to Blackwell. Rows of d must be 16-byte aligned.
template <typename In, typename Out>
cudaError_t gemm_sm80(const Gemm& g, const Device& device, cudaStream_t stream);

}  // namespace qpass
