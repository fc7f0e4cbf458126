#include "weight_only.h"

cudaError_t qpass::weight_only_int4(const Skinny& p, int group_size, cudaStream_t stream) {
  return skinny_by_group<Fixed, true, 2>(p, group_size, stream);
}
