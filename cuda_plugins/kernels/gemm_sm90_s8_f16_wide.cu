#include "gemm_sm90.cuh"

template cudaError_t qpass::gemm_sm90<int8_t, qpass::half, true>(const Gemm&, cudaStream_t);
