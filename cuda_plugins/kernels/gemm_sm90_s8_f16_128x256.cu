#include "gemm_sm90.cuh"

template cudaError_t qpass::gemm_sm90<int8_t, qpass::half, QPASS_SM90_128X256>(
    const Gemm&, const Device&, cudaStream_t);
template cudaError_t qpass::gemm_sm90<int8_t, qpass::half, QPASS_SM90_128X256, true>(
    const Gemm&, const Device&, cudaStream_t);
