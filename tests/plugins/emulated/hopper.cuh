// The instructions of cuda_plugins/kernels/hopper.cuh as their definitions say, of a block that is its own cluster.
#pragma once

#include "types.cuh"

namespace qpass {

constexpr bool kHasClusters = false;

struct TensorMap {
  const char* from;
  int64_t rows, row_bytes, stride;
  int box_rows, box_bytes;
  bool swizzled;
};

inline cudaError_t map_matrix(
    TensorMap* map, const void* from, int64_t rows, int64_t row_bytes, int64_t stride, int box_rows, int box_bytes,
    bool swizzled = true) {
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % 16 == 0;
  if (!aligned || box_rows > 256 || (swizzled && box_bytes != 64 && box_bytes != 128)) return cudaErrorInvalidValue;
  *map = {static_cast<const char*>(from), rows, row_bytes, stride, box_rows, box_bytes, swizzled};
  return cudaSuccess;
}

inline uintptr_t address_in_shared(const void* p) { return reinterpret_cast<uintptr_t>(p); }

struct Counts {
  int32_t bytes;  // announced, and not there yet
  uint8_t all, missing, parity, unused;
};
using Barrier = uint64_t;

inline Counts& counts(Barrier* barrier) { return *reinterpret_cast<Counts*>(barrier); }

inline void end_of_phase(Counts& c) {
  if (!c.missing && !c.bytes) c.missing = c.all, c.parity ^= 1;
}

inline void init(Barrier* barrier, int arrivals) { counts(barrier) = {0, uint8_t(arrivals), uint8_t(arrivals), 0, 0}; }
inline void publish_barriers() {}

inline void expect(Barrier* barrier, int bytes) {
  Counts& c = counts(barrier);
  c.bytes += bytes, --c.missing;
  end_of_phase(c);
}

template <int kCluster>
void arrive(Barrier* barrier, unsigned) {
  static_assert(kCluster == 1 || !kHasClusters);
  --counts(barrier).missing;
  end_of_phase(counts(barrier));
}

inline void wait(Barrier* barrier, int parity) {
  while (counts(barrier).parity == parity) swapcontext(&emulator::current->context, &emulator::scheduler);
}

inline void copy_box(void* to, const TensorMap* map, int x, int y, Barrier* barrier) {
  for (int row = 0; row < map->box_rows; ++row) {
    const int swizzle = !map->swizzled ? 0 : map->box_bytes == 64 ? row / 2 % 4 : row % 8;
    for (int byte = 0; byte < map->box_bytes; byte += 16) {
      char* at = static_cast<char*>(to) + row * map->box_bytes + (byte / 16 ^ swizzle) * 16;
      const int64_t there = y + row < map->rows ? std::clamp<int64_t>(map->row_bytes - x - byte, 0, 16) : 0;
      std::memset(at, 0, 16);
      std::memcpy(at, map->from + (y + row) * map->stride + x + byte, there);
    }
  }
  counts(barrier).bytes -= map->box_rows * map->box_bytes;
  end_of_phase(counts(barrier));
}

template <int kCluster>
void copy_box_to_all(void*, const TensorMap*, int, int, Barrier*) {}
inline void prefetch_map(const TensorMap*) {}
template <int kCount>
void limit_registers() {}
template <int kCount>
void raise_registers() {}
inline unsigned block_of_cluster() { return 0; }
inline void cluster_barrier() {}

inline uint32_t transposed(uint32_t values) {
  const uint32_t* all = emulator::gather(values);
  const int row = emulator::current->lane / 4, column = emulator::current->lane % 4 * 2;
  auto value = [&](int r, int c) { return all[r * 4 + c / 2] >> c % 2 * 16 & 0xffff; };
  return value(column, row) | value(column + 1, row) << 16;
}

inline uint64_t matrix_at(const void* at) { return (static_cast<const char*>(at) - emulator::own.shared) / 16; }
constexpr uint64_t kNextInRow = 2;

inline void begin_products() {}
inline void commit_products() {}
template <int kPending>
void wait_products() {}

// Each warp's sixteen rows by themselves.
template <typename T, int kN>
struct Wgmma {
  static void run(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t with) {
    struct Operand {
      uint32_t a[4];
    };
    const Operand* all = emulator::gather(Operand{{a[0], a[1], a[2], a[3]}});
    const int lane = emulator::current->lane;
    for (int i = 0; i < kN / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < 16; ++k) {
        const Operand& of = all[row % 8 * 4 + k % 8 / 2];
        T left, right;
        std::memcpy(&left, reinterpret_cast<const char*>(&of.a[k / 8 * 2 + row / 8]) + k % 2 * 2, 2);
        const uint64_t place = with * 16 + column * 128 + k * 2;  // swizzled by the bits of the place itself
        std::memcpy(&right, emulator::own.shared + (place ^ (place >> 7 & 7) << 4), 2);
        sum += double(to_float(left)) * to_float(right);
      }
      d[i] = float(sum);
    }
  }
};

template <int kN>
struct WgmmaInt8 {
  static void run(int32_t (&d)[kN / 2], uint64_t rows, uint64_t with) {
    emulator::gather(0);
    const int first = emulator::current->warp % 4 * 16;
    add(d, with, [=](int row, int k) { return byte_of(rows, first + row, k); });
  }
  static void run(int32_t (&d)[kN / 2], const uint32_t (&a)[4], uint64_t with, int adds) {
    for (int32_t& x : d) x = adds ? x : 0;
    struct Operand {
      uint32_t a[4];
    };
    const Operand* all = emulator::gather(Operand{{a[0], a[1], a[2], a[3]}});
    add(d, with, [=](int row, int k) {
      return int(int8_t(all[row % 8 * 4 + k % 16 / 4].a[k / 16 * 2 + row / 8] >> k % 4 * 8));
    });
  }

 private:
  static int byte_of(uint64_t matrix, int row, int k) {
    const uint64_t place = matrix * 16 + row * 128 + k;
    return int8_t(emulator::own.shared[place ^ (place >> 7 & 7) << 4]);
  }
  template <typename Left>
  static void add(int32_t (&d)[kN / 2], uint64_t with, Left left) {
    const int lane = emulator::current->lane;
    for (int i = 0; i < kN / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) d[i] += left(row, k) * byte_of(with, column, k);
    }
  }
};

}  // namespace qpass
