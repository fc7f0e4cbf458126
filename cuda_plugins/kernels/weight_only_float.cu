#include "weight_only.h"

cudaError_t qpass::weight_only_float(const Skinny& p, bool int4, int group_size, cudaStream_t stream) {
  return int4 ? skinny_by_group<bfloat16, true, kPlanes>(p, group_size, stream)
              : skinny_by_group<bfloat16, false, kPlanes>(p, group_size, stream);
}
