// CUDA's threads on a CPU, for kernels to be tested where there is no GPU.
//
// Every thread of a block is a fiber of one CPU thread; barriers and what a warp does together switch between them.
// Clusters of blocks run one after another. Shared memory begins as NaNs, and at a multiple of 128 bytes of which no more is a
// multiple. Asynchronous copies and products happen as late as they may: when they are waited for; copies that a barrier
// counts, as soon as they may. One warp of a cluster, another in every cluster, is slow: it goes on when no other can, and stops
// wherever it might have to wait. What a GPU would stop at is kept as a fault. Not seen are races that no such order of fibers
// shows, and what memory beside a tensor is read. A word of shared memory that a thread copies to is its own: another that does is a fault.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)
#undef __grid_constant__
#define __grid_constant__
#define __CUDA_ARCH__ 900

// How often the runtime was asked for what does not change, or told what it knows.
extern "C" __attribute__((visibility("default"))) int emulated_questions;
extern "C" __attribute__((visibility("default"))) int emulated_multiprocessors;
// What a GPU would have stopped at first, until somebody asks: then it is null again.
extern "C" __attribute__((visibility("default"))) const char* emulated_fault;

namespace emulator {

struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) char values[2][32 * 64];  // of one collective and the next
};

struct Block {
  Barrier barrier, first;  // of all, and of the threads that barrier_of_first says
  std::vector<Warp> warps;
  std::vector<char> memory;
  char* base = nullptr;  // of addresses in shared memory
  char* shared = nullptr;
  size_t bytes = 0;
  std::unordered_map<const void*, const void*> owners;  // of words that threads keep copies in: each its own
};

struct Copy {
  char* to;
  const char* from;
  int bytes, size;  // read, and written
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread, block;
  Block* home = nullptr;
  int lane = 0, warp = 0;
  unsigned collectives = 0;
  bool done = false, slow = false;
  std::vector<Copy> copies;  // of the group that is open
  std::deque<std::vector<Copy>> groups;
  std::vector<std::function<void()>> products;  // likewise
  std::deque<std::vector<std::function<void()>>> product_groups;
};

inline Fiber* current;
inline ucontext_t scheduler;
inline std::vector<Block> cluster;  // that runs
inline Barrier cluster_barrier;
inline std::function<void()> body;
inline dim3 grid, block_size;
inline int64_t progress;  // arrivals, and waits that came to an end
inline unsigned clusters_run;

inline void fault(const char* what) {
  if (!emulated_fault) emulated_fault = what;
}

inline void release(Barrier& b) {
  if (b.size && b.arrived == b.size) b.arrived = 0, ++b.generation;
}

// Before what may have to be waited for.
inline void others_first() {
  if (current->slow) ++progress, swapcontext(&current->context, &scheduler);
}

inline void wait(Barrier& b) {
  const unsigned generation = b.generation;
  ++b.arrived, ++progress;
  release(b);
  while (b.generation == generation) swapcontext(&current->context, &scheduler);
}

// What every lane of the warp gives.
template <typename T>
const T* gather(const T& mine) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = current->home->warps[current->warp];
  char* values = warp.values[current->collectives++ % 2];
  std::memcpy(values + current->lane * sizeof(T), &mine, sizeof(T));
  wait(warp.barrier);
  return reinterpret_cast<const T*>(values);
}

inline void enter() {
  body();
  Fiber& me = *current;
  me.done = true, ++progress;
  if (!me.products.empty() || !me.product_groups.empty()) fault("products were not waited for");
  for (Barrier* b : {&me.home->barrier, &me.home->warps[me.warp].barrier, &cluster_barrier}) --b->size, release(*b);
  swapcontext(&me.context, &scheduler);
}

inline void begin(Block& block, int threads, size_t shared_bytes) {
  block.barrier.size = threads;
  block.warps.resize((threads + 31) / 32);
  block.memory.assign(shared_bytes + 2048, char(0xff));
  block.base = block.memory.data() + (1024 - reinterpret_cast<uintptr_t>(block.memory.data()) % 1024) % 1024;
  block.shared = block.base + 128, block.bytes = shared_bytes;
}

// The blocks from `first` on, `size` of them along y and no more than one along x.
inline void run_cluster(uint3 first, unsigned size, size_t shared_bytes) {
  constexpr size_t kStack = 256 << 10;
  const int threads = int(block_size.x * block_size.y * block_size.z);
  cluster.assign(size, Block());
  cluster_barrier = Barrier();
  cluster_barrier.size = threads * int(size);
  for (Block& block : cluster) begin(block, threads, shared_bytes);
  std::vector<Fiber> fibers(threads * size);
  const unsigned warps = unsigned(cluster[0].warps.size()), slow = clusters_run++ % (warps * size + 1);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    const unsigned t = i % threads, block = i / threads;
    f.thread = {t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y)};
    f.block = {first.x, first.y + block, first.z};
    f.home = &cluster[block];
    f.lane = t % 32, f.warp = t / 32;
    f.slow = block * warps + f.warp == slow;
    ++f.home->warps[f.warp].barrier.size;
    f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (bool busy = true; busy;) {
    const int64_t before = progress;
    busy = false;
    auto run = [&](bool slow) {
      for (Fiber& f : fibers) {
        if (f.done) continue;
        busy = true;
        if (f.slow != slow) continue;
        current = &f;
        swapcontext(&scheduler, &f.context);
      }
    };
    run(false);
    if (progress == before) run(true);
    if (busy && progress == before) return fault("a block waits for ever");
  }
}

struct Config {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // along y
};

template <typename... Parameters, typename... Arguments>
void launch(const Config& config, void (*kernel)(Parameters...), Arguments... arguments) {
  grid = config.grid, block_size = config.block;
  body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; y += config.cluster) {
      for (unsigned x = 0; x < grid.x; ++x) run_cluster({x, y, z}, config.cluster, config.shared);
    }
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_with(const cudaLaunchConfig_t* told, void (*kernel)(Parameters...), Arguments... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < told->numAttrs; ++i) {
    const auto& [x, y, z] = told->attrs[i].val.clusterDim;
    if (told->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    if (x != 1 || z != 1 || y > 8 || told->gridDim.y % y) return cudaErrorInvalidValue;
    cluster = y;
  }
  launch({told->gridDim, told->blockDim, told->dynamicSmemBytes, told->stream, cluster}, kernel, arguments...);
  return cudaSuccess;
}

// A GPU whose multiprocessors are in groups of sixteen, none of whose clusters is in two of them.
template <typename... Parameters>
cudaError_t clusters_at_once(int* count, void (*)(Parameters...), const cudaLaunchConfig_t* told) {
  const int size = int(told->attrs[0].val.clusterDim.y), all = emulated_multiprocessors;
  return ++emulated_questions, *count = all / 16 * (16 / size) + all % 16 / size, cudaSuccess;
}

template <typename... Parameters>
cudaError_t set_attribute(void (*)(Parameters...), cudaFuncAttribute, int) {
  return ++emulated_questions, cudaSuccess;
}

template <typename... Parameters>
cudaError_t blocks_at_once(int* count, void (*)(Parameters...), int, size_t) {
  return ++emulated_questions, *count = 1, cudaSuccess;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)

inline dim3 &gridDim = emulator::grid, &blockDim = emulator::block_size;

inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void __syncthreads() { emulator::wait(emulator::current->home->barrier); }
inline void __syncwarp(unsigned = ~0u) { emulator::gather(0); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::gather(value)[lane % 32];
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return emulator::gather(value)[emulator::current->lane ^ bits];
}
inline int __any_sync(unsigned, int value) {
  const int* all = emulator::gather(value);
  return std::any_of(all, all + 32, [](int v) { return v != 0; });
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const unsigned* all = emulator::gather(value);
  return *std::max_element(all, all + 32);
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= uint32_t(both >> (selector >> i * 4 & 7) * 8 & 255) << i * 8;
  return found;
}
template <typename To, typename From>
To emulated_bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t x) { return emulated_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulated_bits<uint32_t>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  auto one = [](__half x, __half y, __half z) { return std::fma(__half2float(x), __half2float(y), __half2float(z)); };
  return __floats2half2_rn(one(a.x, b.x, c.x), one(a.y, b.y, c.y));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  auto one = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return std::fma(__bfloat162float(x), __bfloat162float(y), __bfloat162float(z));
  };
  return __floats2bfloat162_rn(one(a.x, b.x, c.x), one(a.y, b.y, c.y));
}
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
using std::isfinite;
