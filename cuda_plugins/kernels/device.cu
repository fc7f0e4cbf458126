// What is asked of the current device, once each.
#include <atomic>

#include "launch.cuh"
#include "tuning.h"

namespace qpass {
namespace {

constexpr int kDevices = 64;

__global__ void nothing() {}

}  // namespace

cudaError_t current_device(Device* device) {
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
  *device = {int(word >> 48), int(word >> 32 & 0xffff), int(word & 0xffffffff), id};
  return cudaSuccess;
}

qpass_variant tuned(ProductKind kind, int64_t n, int64_t k, int64_t m) {
  static std::atomic<const Tuning*> known[kDevices];
  int id = 0;
  if (cudaGetDevice(&id)) return QPASS_RULE;
  const Tuning* tuning = id < kDevices ? known[id].load(std::memory_order_acquire) : nullptr;
  if (!tuning) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, id)) return QPASS_RULE;
    tuning = &tuning_of(properties.name);
    if (id < kDevices) known[id].store(tuning, std::memory_order_release);
  }
  return tuning->find(kind, n, k, m);
}

}  // namespace qpass

int qpass_launch_nothing(cudaStream_t stream) {
  qpass::Device device;
  if (cudaError_t e = qpass::current_device(&device)) return e;
  return qpass::launch({1, 32}, device, stream, qpass::nothing);
}
