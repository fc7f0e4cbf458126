// Hopper's own instructions: copies that one thread asks for and a barrier in shared memory counts, and products of a warpgroup's
// registers with shared memory. And, on the host, the maps that such copies read matrices by.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "types.cuh"

namespace qpass {

using TensorMap = CUtensorMap;
constexpr bool kHasClusters = true;

// A matrix of bytes in rows `stride` apart, to be copied in boxes of `box_rows` rows of `box_bytes`, whose chunks of 16 bytes may be
// swizzled, as products want them: where a row is 128 bytes, chunk i of row r lies at i ^ r % 8, where it is 64, at i ^ r / 2 % 4.
// What lies beyond the matrix is zeros. `from` and `stride` are multiples of 16.
inline cudaError_t map_matrix(TensorMap* map, const void* from, int64_t rows, int64_t row_bytes, int64_t stride, int box_rows,
    int box_bytes, bool swizzled = true) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // by name, so that the library needs no driver where it is linked
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    return e == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {cuuint64_t(row_bytes), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride)};
  const cuuint32_t box[] = {cuuint32_t(box_bytes), cuuint32_t(box_rows)}, steps[] = {1, 1};
  CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(from), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      !swizzled ? CU_TENSOR_MAP_SWIZZLE_NONE : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ __forceinline__ unsigned address_in_shared(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ uint32_t word_in_shared(unsigned address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// (x & mask) ^ kFlipped in one instruction, of which only one operand can be a constant: the mask is `opaque` to the compiler.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <uint32_t kFlipped>
__device__ __forceinline__ uint32_t masked_and_flipped(uint32_t x, uint32_t mask) {
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(found) : "r"(x), "r"(mask), "n"(kFlipped));
  return found;
}
__device__ __forceinline__ uint32_t masked_and_flipped(uint32_t x, uint32_t mask, uint32_t flipped) {
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(found) : "r"(x), "r"(mask), "r"(flipped));
  return found;
}

// A barrier's phase ends when so many have arrived and all bytes that were announced are there. The first has parity 0.
using Barrier = uint64_t;

__device__ __forceinline__ void init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_in_shared(barrier)), "r"(arrivals) : "memory");
}

// Makes barriers known to copies, and to the other blocks of a cluster.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and announces bytes.
__device__ __forceinline__ void expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_in_shared(barrier)), "r"(bytes) : "memory");
}

// Arrives at the same barrier of a block of the cluster: what is told is that memory was read, not written.
template <int kCluster>
__device__ __forceinline__ void arrive(Barrier* barrier, unsigned block) {
  if constexpr (kCluster == 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_in_shared(barrier)) : "memory");
  } else {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(address_in_shared(barrier)), "r"(block) : "memory");
  }
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}" : "=r"(done) : "r"(address_in_shared(barrier)), "r"(parity) : "memory");
  }
}

// Copies the box whose first byte is byte x of row y. `barrier` counts its bytes.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int x, int y, Barrier* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(address_in_shared(to)), "l"(map), "r"(x), "r"(y), "r"(address_in_shared(barrier)) : "memory");
}

// To the same place in the first kCluster blocks of the cluster, each of whose barriers counts them.
template <int kCluster>
__device__ __forceinline__ void copy_box_to_all(void* to, const TensorMap* map, int x, int y, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(address_in_shared(to)), "l"(map), "r"(x), "r"(y), "r"(address_in_shared(barrier)), "h"(uint16_t((1 << kCluster) - 1))
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Makes what this thread wrote to shared memory known to products and copies, of which barriers tell other threads.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// How many registers each thread of a warpgroup has from here on: a multiple of eight.
template <int kCount>
__device__ __forceinline__ void limit_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

__device__ __forceinline__ unsigned block_of_cluster() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Of the first kThreads threads of a block, whole warps.
template <int kThreads>
__device__ __forceinline__ void barrier_of_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Sixteen bytes at the same place in the shared memory of a block of the cluster.
__device__ __forceinline__ uint4 read_from(const void* at, unsigned block) {
  uint4 value;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [there];\n"
      "}" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address_in_shared(at)), "r"(block) : "memory");
  return value;
}

// What a warp raises, and one of another block waits for and lowers. Without a branch of the first lane's, for the others write beside
// it, and by vote: else the compiler would not see that lanes go on together, and keep what they share in registers of each.
struct Flag {
  uint64_t raised, beside;
};

// By a warp, once it has written what is to be read then.
__device__ __forceinline__ void raise_flag(Flag* flag, uint64_t to) {
  uint64_t* const mine = threadIdx.x % 32 ? &flag->beside : &flag->raised;
  __syncwarp();
  asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u64 [%0], %1;" ::"l"(mine), "l"(to) : "memory");
}

// By a warp, before it reads that.
__device__ __forceinline__ void take_flag(Flag* flag, uint64_t raised) {
  uint64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(&flag->raised) : "memory");
  } while (!__all_sync(~0u, found == raised));
  uint64_t* const mine = threadIdx.x % 32 ? &flag->beside : &flag->raised;
  *mine = 0;
}

// Rows and columns of an 8 × 8 matrix of 16-bit values changed over: lane i holds values 2 (i % 4) and the next of row i / 4.
__device__ __forceinline__ uint32_t transposed(uint32_t values) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(values));
  return to;
}

// Four such matrices of 16-bit values, `values` of each as products leave them, changed over into shared memory: lane i says where row
// i % 8 of what becomes of the (i / 8)-th goes, 16 bytes.
__device__ __forceinline__ void store_transposed(void* to, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address_in_shared(to)), "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

// What a product reads from shared memory: rows of 128 bytes of K, swizzled, eight of them 1024 bytes apart from
// the next. `at` is the first row's, which lies at a multiple of 1024, and of K a multiple of 32 bytes further on.
__device__ __forceinline__ uint64_t matrix_at(const void* at) {
  constexpr uint64_t kSwizzled = uint64_t(1) << 62, kEightRows = uint64_t(1024 >> 4) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzled | kEightRows | kUnused | (address_in_shared(at) & 0x3ffff) >> 4;
}
constexpr uint64_t kNextInRow = 32 >> 4;  // to be added to it for the next 32 bytes

// Before products: what registers they read were last written by other instructions.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>  // groups that may be under way still
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After they were waited for: the compiler does not know that sums come of the wait, and may use them before it.
template <typename Sum, int kCount>
__device__ __forceinline__ void settle(Sum (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Sum, float>) asm volatile("" : "+f"(sums[i])::"memory");
    else asm volatile("" : "+r"(sums[i])::"memory");
  }
}

// d [64, kN] += a [64, 16] · b [kN, 16]ᵀ by the four warps of a warpgroup, of which each has sixteen rows of a and d. With g =
// lane / 4 and t = lane % 4, values of a: (row g, 2t and the next), (g + 8, 2t …), (g, 2t + 8 …), (g + 8, 2t + 8 …); of d, for each
// eight columns: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T, int kN>
struct Wgmma;

#define QPASS_REGS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QPASS_REGS_16 QPASS_REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QPASS_REGS_32 QPASS_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QPASS_REGS_64 \
  QPASS_REGS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QPASS_REGS_96 \
  QPASS_REGS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QPASS_REGS_128 \
  QPASS_REGS_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QPASS_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define QPASS_D16(i) QPASS_D8(i), QPASS_D8(i + 8)
#define QPASS_D32(i) QPASS_D16(i), QPASS_D16(i + 16)
#define QPASS_D64(i) QPASS_D32(i), QPASS_D32(i + 32)
#define QPASS_D96(i) QPASS_D64(i), QPASS_D32(i + 64)
#define QPASS_D128(i) QPASS_D64(i), QPASS_D64(i + 64)
#define QPASS_WGMMA(T, type, columns, count, a0, a1, a2, a3, b, one)                                                            \
  template <>                                                                                                                  \
  struct Wgmma<T, columns> {                                                                                                   \
    static __device__ __forceinline__ void run(float (&d)[count], const uint32_t (&a)[4], uint64_t with, int adds = 1) {       \
      asm volatile(                                                                                                            \
          "{\n.reg .pred adds;\nsetp.ne.b32 adds, " one ", 0;\n"                                                              \
          "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" QPASS_REGS_##count "}, "                   \
          "{" a0 ", " a1 ", " a2 ", " a3 "}, " b ", adds, 1, 1, 0;\n}"                                                         \
          : QPASS_D##count(0)                                                                                                  \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(with), "r"(adds));                                                 \
    }                                                                                                                          \
  };
QPASS_WGMMA(half, "f16", 16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
QPASS_WGMMA(half, "f16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
QPASS_WGMMA(half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
QPASS_WGMMA(half, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
QPASS_WGMMA(half, "f16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
QPASS_WGMMA(half, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
QPASS_WGMMA(bfloat16, "bf16", 16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
QPASS_WGMMA(bfloat16, "bf16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
QPASS_WGMMA(bfloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
QPASS_WGMMA(bfloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
QPASS_WGMMA(bfloat16, "bf16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
QPASS_WGMMA(bfloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

// d [64, kN] += a [64, 32] · b [kN, 32]ᵀ of int8, a from shared memory, too, or from registers: four values each of (row g, 4t …),
// (g + 8, 4t …), (g, 4t + 16 …), (g + 8, 4t + 16 …). Where `adds` is 0, d is what it was no more.
template <int kN>
struct WgmmaInt8;
#define QPASS_WGMMA_INT8(columns, count, first, second, one, a0, a1, a2, a3, with_b, with_one)                                         \
  template <>                                                                                                                  \
  struct WgmmaInt8<columns> {                                                                                                  \
    static __device__ __forceinline__ void run(int32_t (&d)[count], uint64_t rows, uint64_t with) {                            \
      asm volatile(                                                                                                            \
          "{\n.reg .pred adds;\nsetp.ne.b32 adds, " one ", 0;\n"                                                              \
          "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" QPASS_REGS_##count "}, " first ", " second ", adds;\n}" \
          : QPASS_D##count(0)                                                                                                  \
          : "l"(rows), "l"(with), "r"(1));                                                                                     \
    }                                                                                                                          \
    static __device__ __forceinline__ void run(int32_t (&d)[count], const uint32_t (&a)[4], uint64_t with, int adds) {         \
      asm volatile(                                                                                                            \
          "{\n.reg .pred adds;\nsetp.ne.b32 adds, " with_one ", 0;\n"                                                         \
          "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" QPASS_REGS_##count "}, "                               \
          "{" a0 ", " a1 ", " a2 ", " a3 "}, " with_b ", adds;\n}"                                                             \
          : QPASS_D##count(0)                                                                                                  \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(with), "r"(adds));                                                 \
    }                                                                                                                          \
  };
#undef QPASS_D8
#define QPASS_D8(i) \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
QPASS_WGMMA_INT8(16, 8, "%8", "%9", "%10", "%8", "%9", "%10", "%11", "%12", "%13")
QPASS_WGMMA_INT8(32, 16, "%16", "%17", "%18", "%16", "%17", "%18", "%19", "%20", "%21")
QPASS_WGMMA_INT8(64, 32, "%32", "%33", "%34", "%32", "%33", "%34", "%35", "%36", "%37")
#undef QPASS_WGMMA_INT8
#undef QPASS_WGMMA
#undef QPASS_D128
#undef QPASS_D96
#undef QPASS_D64
#undef QPASS_D32
#undef QPASS_D16
#undef QPASS_D8
#undef QPASS_REGS_128
#undef QPASS_REGS_96
#undef QPASS_REGS_64
#undef QPASS_REGS_32
#undef QPASS_REGS_16
#undef QPASS_REGS_8

}  // namespace qpass
