#include "mixed_sm90.cuh"

template cudaError_t qpass::mixed_sm90<qpass::half, true>(
    const MixedGemm&, const Device&, cudaStream_t);
