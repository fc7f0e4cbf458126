#include "weight_only.h"

cudaError_t qpass::weight_only_bfloat16(const Skinny& p, bool int4, int group_size, cudaStream_t stream) {
  return skinny_by_group<bfloat16, 1>(p, int4, group_size, stream);
}
