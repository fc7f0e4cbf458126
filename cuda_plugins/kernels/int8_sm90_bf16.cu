#include "int8_sm90.cuh"

template cudaError_t qpass::int8_sm90<qpass::bfloat16>(const Gemm&, const Device&, cudaStream_t);
