#include "gemm_sm80.cuh"

template cudaError_t qpass::gemm_sm80<qpass::half, qpass::half>(
    const Gemm&, const Device&, cudaStream_t);
