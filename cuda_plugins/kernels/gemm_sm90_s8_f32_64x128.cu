#include "gemm_sm90.cuh"

template cudaError_t qpass::gemm_sm90<int8_t, float, QPASS_SM90_64X128>(
    const Gemm&, const Device&, cudaStream_t);
