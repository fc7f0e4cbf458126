// The instructions that the kernels are made of, each under a name.
#pragma once

#include "types.cuh"

namespace qpass {

// Copies 16 bytes from global to shared memory without passing through registers; of them only the first `bytes` are read, the
// rest becomes zeros. With 0 bytes `from` is not touched.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  unsigned shared = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}

// The same by way of the L1 cache, where the next bytes of a sector are asked for soon.
__device__ __forceinline__ void copy_cached_async(void* to, const void* from, int bytes) {
  unsigned shared = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}

// The same with a word of 4 bytes.
__device__ __forceinline__ void copy_word_async(void* to, const void* from, int bytes) {
  unsigned shared = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of copies. Groups complete in order.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8 × 16-byte matrices; lane i gives the address of row i % 8 of matrix i / 8, and gets bytes 4 (i % 4) of row i / 4
// of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* from) {
  unsigned shared = unsigned(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// acc [16, 8] += a [16, 32 bytes of K] · b [8, 32 bytes of K]ᵀ. With g = lane / 4 and t = lane % 4, in units of 4 bytes:
// a = (row g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b = (column g, t), (g, t + 4);
// acc = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
struct Mma;

template <>
struct Mma<int8_t> {
  using Accumulator = int32_t;
  static __device__ __forceinline__ void run(int32_t (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Mma<half> {
  using Accumulator = float;
  static __device__ __forceinline__ void run(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Mma<bfloat16> {
  using Accumulator = float;
  static __device__ __forceinline__ void run(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace qpass
