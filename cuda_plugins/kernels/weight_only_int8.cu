#include "weight_only.h"

cudaError_t qpass::weight_only_int8(const Skinny& p, int group_size, cudaStream_t stream) {
  return skinny_by_group<Fixed, false, 2>(p, group_size, stream);
}
