#include "gemm_sm80.cuh"

template cudaError_t qpass::gemm_sm80<qpass::bfloat16, qpass::bfloat16>(
    const Gemm&, const Device&, cudaStream_t);
