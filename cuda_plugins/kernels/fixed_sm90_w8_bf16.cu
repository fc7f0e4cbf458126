#include "fixed_sm90.cuh"

template cudaError_t qpass::fixed_sm90<qpass::bfloat16, false>(
    const MixedGemm&, const FixedActivations*, const Device&, cudaStream_t);
