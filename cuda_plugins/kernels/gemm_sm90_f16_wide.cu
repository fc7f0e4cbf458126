#include "gemm_sm90.cuh"

template cudaError_t qpass::gemm_sm90<qpass::half, qpass::half, true>(const Gemm&, cudaStream_t);
