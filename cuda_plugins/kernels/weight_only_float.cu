#include "weight_only.h"

cudaError_t qpass::weight_only_float(const Skinny& p, bool int4, int group_size, cudaStream_t stream) {
  return skinny_by_group<bfloat16, kPlanes>(p, int4, group_size, stream);
}
