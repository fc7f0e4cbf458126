#include <atomic>

#include "types.cuh"

namespace qpass {

cudaError_t current_device(Device* device) {
  constexpr int kDevices = 64;
  static std::atomic<uint64_t> known[kDevices];  // 0: not asked yet; one word, so that it is never seen half written
  int id = 0;
  if (cudaError_t e = cudaGetDevice(&id)) return e;
  uint64_t word = id < kDevices ? known[id].load(std::memory_order_relaxed) : 0;
  if (!word) {
    int major, minor, count;
    if (cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id)) return e;
    if (cudaError_t e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id)) return e;
    if (cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id)) return e;
    word = uint64_t(major) << 48 | uint64_t(minor) << 32 | uint64_t(count);
    if (id < kDevices) known[id].store(word, std::memory_order_relaxed);
  }
  *device = {int(word >> 48), int(word >> 32 & 0xffff), int(word & 0xffffffff)};
  return cudaSuccess;
}

}  // namespace qpass
