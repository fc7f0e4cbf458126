#include "mixed_sm90.cuh"

template cudaError_t qpass::mixed_sm90<qpass::half, false>(
    const MixedGemm&, const Device&, cudaStream_t);
