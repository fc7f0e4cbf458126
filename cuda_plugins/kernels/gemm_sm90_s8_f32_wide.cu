#include "gemm_sm90.cuh"

template cudaError_t qpass::gemm_sm90<int8_t, float, true>(const Gemm&, cudaStream_t);
