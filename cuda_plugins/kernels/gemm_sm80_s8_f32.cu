#include "gemm_sm80.cuh"

template cudaError_t qpass::gemm_sm80<int8_t, float>(
    const Gemm&, const Device&, cudaStream_t);
