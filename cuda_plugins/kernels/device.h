// What kernels are launched on, for headers that no kernel is in.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace qpass {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Compute capability and multiprocessors of the current device; asked once a device.
struct Device {
  int major, minor, multiprocessors, id;
};
cudaError_t current_device(Device* device);

}  // namespace qpass
