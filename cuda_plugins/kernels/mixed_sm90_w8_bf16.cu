#include "mixed_sm90.cuh"

template cudaError_t qpass::mixed_sm90<qpass::bfloat16, false>(
    const MixedGemm&, const Device&, cudaStream_t);
