#include "fixed_sm90.cuh"

template cudaError_t qpass::fixed_sm90<qpass::half, true>(
    const MixedGemm&, const FixedActivations*, const Device&, cudaStream_t);
