#include "int8_sm90.cuh"

template cudaError_t qpass::int8_sm90<qpass::half>(const Gemm&, const Device&, cudaStream_t);
