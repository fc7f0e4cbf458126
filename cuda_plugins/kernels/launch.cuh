// Launches that overlap: from sm_90 on a kernel starts while the one ahead of it in the stream ends, so that neither its launch
// nor what it does before it reads anything is waited for.
#pragma once

#include <atomic>

#include "types.cuh"

namespace qpass {

// What every kernel that is launched so does before it reads or writes what others write or read: it waits until the kernel ahead
// is done, which has waited for the one ahead of it.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets the next kernel start as soon as all blocks of this one have.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// What a kernel needs once on every device, such as leave for more shared memory: asked at every call, it delays launches. Threads
// that come to it at the same time all do it; what failed is tried again.
class OncePerDevice {
 public:
  template <typename Call>
  cudaError_t operator()(const Device& device, Call call) {
    const uint64_t bit = device.id < 64 ? uint64_t(1) << device.id : 0;
    if (done_.load(std::memory_order_acquire) & bit) return cudaSuccess;
    cudaError_t error = call();
    if (!error) done_.fetch_or(bit, std::memory_order_release);
    return error;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

// What a launch returned. The runtime keeps a failure until somebody asks, who would take it for that of a later launch.
inline cudaError_t taken_back(cudaError_t error) {
  if (error) cudaGetLastError();
  return error;
}

struct Grid {
  dim3 blocks, threads;
  int shared = 0;        // bytes of dynamic shared memory
  dim3 cluster = 1;      // blocks that run together and reach each other's shared memory
};

// As the runtime takes it, without a stream and without overlap; `attributes` are kept by the caller.
inline cudaLaunchConfig_t config_of(const Grid& grid, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks, config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.attrs = attributes;
  if (grid.cluster.x * grid.cluster.y > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {grid.cluster.x, grid.cluster.y, 1};
  }
  return config;
}

// What is to be launched so, by a call of the runtime's.
template <typename Call>
cudaError_t launch_by(const Grid& grid, const Device& device, cudaStream_t stream, Call call) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = config_of(grid, attributes);
  config.stream = stream;
  if (device.major >= 9) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return taken_back(call(&config));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Grid& grid, const Device& device, cudaStream_t stream, void (*kernel)(Parameters...),
    const Arguments&... arguments) {
  return launch_by(grid, device, stream, [&](auto* config) { return cudaLaunchKernelEx(config, kernel, arguments...); });
}

}  // namespace qpass
