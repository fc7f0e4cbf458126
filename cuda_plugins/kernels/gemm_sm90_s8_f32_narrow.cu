#include "gemm_sm90.cuh"

template cudaError_t qpass::gemm_sm90<int8_t, float, false>(const Gemm&, cudaStream_t);
