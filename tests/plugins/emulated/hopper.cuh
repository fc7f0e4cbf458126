// The instructions of cuda_plugins/kernels/hopper.cuh as their definitions say. Clusters are of blocks that have a tile together;
// none copies for another.
#pragma once

#include "types.cuh"

extern "C" __attribute__((visibility("default"))) int emulated_flags_raised, emulated_flags_lowered;

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
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % 16 == 0 && box_bytes % 16 == 0;
  constexpr int64_t kMost = int64_t(1) << 32;
  const bool counted = 0 < rows && rows <= kMost && 0 < row_bytes && row_bytes <= kMost && stride < kMost << 8;
  const bool fits = 0 < box_rows && box_rows <= 256 && 0 < box_bytes && box_bytes <= 256;
  if (!aligned || !counted || !fits || (swizzled && box_bytes != 64 && box_bytes != 128)) return cudaErrorInvalidValue;
  *map = {static_cast<const char*>(from), rows, row_bytes, stride, box_rows, box_bytes, swizzled};
  return cudaSuccess;
}

inline uintptr_t address_in_shared(const void* p) { return reinterpret_cast<uintptr_t>(p); }
inline uint32_t word_in_shared(uintptr_t address) { return *reinterpret_cast<const uint32_t*>(address); }

struct Counts {
  int32_t bytes;  // announced, and not there yet
  uint8_t all, missing, parity, unused;
};
using Barrier = uint64_t;

inline Counts& counts(Barrier* barrier) { return *reinterpret_cast<Counts*>(barrier); }

inline void end_of_phase(Counts& c) {
  ++emulator::progress;
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

inline uint32_t opaque(uint32_t x) { return x; }
inline uint32_t masked_and_flipped(uint32_t x, uint32_t mask, uint32_t flipped) { return (x & mask) ^ flipped; }
template <uint32_t kFlipped>
uint32_t masked_and_flipped(uint32_t x, uint32_t mask) {
  return (x & mask) ^ kFlipped;
}

inline void wait(Barrier* barrier, int parity) {
  emulator::others_first();
  while (counts(barrier).parity == parity) swapcontext(&emulator::current->context, &emulator::scheduler);
  ++emulator::progress;
}

inline void copy_box(void* to, const TensorMap* map, int x, int y, Barrier* barrier) {
  const int64_t first = static_cast<char*>(to) - emulator::current->home->shared, bytes = map->box_rows * map->box_bytes;
  const uintptr_t address = static_cast<char*>(to) - emulator::current->home->base;
  const bool inside = first >= 0 && first + bytes <= int64_t(emulator::current->home->bytes);
  if (!inside) return emulator::fault("a box is copied beside shared memory");
  if (address % 128) emulator::fault("a box is copied to what is no multiple of 128 bytes");
  if (x % 16) emulator::fault("a box begins at no multiple of 16 bytes of its row");
  if (map->swizzled && address % 1024) emulator::fault("a swizzled box is copied to what is no multiple of 1024 bytes");
  for (int row = 0; row < map->box_rows; ++row) {
    const int swizzle = !map->swizzled ? 0 : map->box_bytes == 64 ? row / 2 % 4 : row % 8;
    for (int byte = 0; byte < map->box_bytes; byte += 16) {
      char* at = static_cast<char*>(to) + row * map->box_bytes + (byte / 16 ^ swizzle) * 16;
      const int64_t there = y + row < map->rows ? std::clamp<int64_t>(map->row_bytes - x - byte, 0, 16) : 0;
      std::memset(at, 0, 16);
      std::memcpy(at, map->from + (y + row) * map->stride + x + byte, there);
    }
  }
  counts(barrier).bytes -= bytes;
  end_of_phase(counts(barrier));
}

template <int kCluster>
void copy_box_to_all(void*, const TensorMap*, int, int, Barrier*) {}
inline void prefetch_map(const TensorMap*) {}
inline void publish_writes() {}
template <int kCount>
void limit_registers() {}
template <int kCount>
void raise_registers() {}
inline unsigned block_of_cluster() { return 0; }
inline void cluster_barrier() { emulator::wait(emulator::cluster_barrier); }
template <int kThreads>
void barrier_of_first() {
  if (emulator::current->warp * 32 >= kThreads) emulator::fault("a thread waits for a barrier that is not its own");
  emulator::current->home->first.size = kThreads;
  emulator::wait(emulator::current->home->first);
}
// Blocks run one after another: what is waited for was raised by one before, or never is.
struct Flag {
  uint64_t raised, beside;
};
inline void raise_flag(Flag* flag, uint64_t to) {
  __syncwarp();
  if (emulator::current->lane == 0) flag->raised = to, ++emulated_flags_raised;
}
inline void take_flag(Flag* flag, uint64_t raised) {
  __syncwarp();
  if (flag->raised != raised && emulator::current->lane == 0) emulator::fault("a warp waits for a flag that none before it raised");
  __syncwarp();
  if (emulator::current->lane == 0) flag->raised = 0, ++emulated_flags_lowered;
}
inline uint4 read_from(const void* at, unsigned block) {
  const int64_t place = static_cast<const char*>(at) - emulator::current->home->base;
  uint4 value{};
  if (block >= emulator::cluster.size()) return emulator::fault("a block reads of none of its cluster"), value;
  if (place % 16 || emulator::cluster[block].base + place + 16 > emulator::cluster[block].shared + emulator::cluster[block].bytes) {
    emulator::fault("a block reads beside another's shared memory");
  }
  std::memcpy(&value, emulator::cluster[block].base + place, sizeof(value));
  return value;
}

inline uint32_t transposed(uint32_t values) {
  const uint32_t* all = emulator::gather(values);
  const int row = emulator::current->lane / 4, column = emulator::current->lane % 4 * 2;
  auto value = [&](int r, int c) { return all[r * 4 + c / 2] >> c % 2 * 16 & 0xffff; };
  return value(column, row) | value(column + 1, row) << 16;
}

inline void store_transposed(void* to, const uint32_t (&values)[4]) {
  void* const* all = emulator::gather(to);
  const int channel = emulator::current->lane / 4, token = emulator::current->lane % 4 * 2;
  for (int i = 0; i < 8; ++i) {
    char* row = static_cast<char*>(all[i / 2 * 8 + token + i % 2]);
    const int64_t first = row - emulator::current->home->shared;
    if (first < 0 || first + 16 > int64_t(emulator::current->home->bytes) || (row - emulator::current->home->base) % 16) {
      return emulator::fault("a matrix's row is stored beside shared memory, or at no multiple of 16 bytes");
    }
    reinterpret_cast<uint16_t*>(row)[channel] = uint16_t(values[i / 2] >> i % 2 * 16);
  }
}

inline uint64_t matrix_at(const void* at) {
  const uint64_t address = static_cast<const char*>(at) - emulator::current->home->base;
  if (address % 1024 >= 128 || address % 32) emulator::fault("a matrix does not begin with its first row");
  return address / 16;
}
constexpr uint64_t kNextInRow = 2;

// A byte of a matrix's row in shared memory: swizzled by the bits of the place itself.
inline const char* place_of(uint64_t matrix, int row, int byte) {
  const uint64_t place = matrix * 16 + row * 128 + byte;
  return emulator::current->home->base + (place ^ (place >> 7 & 7) << 4);
}

// By all lanes of a warp, each with references to its own registers: they are read when products are waited for.
inline void begin_products() {}
template <typename Product>
void later(Product product) {
  emulator::current->products.push_back(product);
}
inline void commit_products() {
  emulator::Fiber& me = *emulator::current;
  me.product_groups.push_back(std::move(me.products));
  me.products.clear();
}
template <int kPending>
void wait_products() {
  auto& groups = emulator::current->product_groups;
  for (; int(groups.size()) > kPending; groups.pop_front()) {
    for (const auto& product : groups.front()) product();
  }
}

// Sums of rows lane / 4 and 8 on, of two columns of each eight: what a lane has of them.
template <int kN, typename Sum, typename Value, typename Left, typename Right>
void add_products(Value (&d)[kN / 2], int depth, Left left, Right right) {
  const int lane = emulator::current->lane;
  Sum rows[2][32], column[32];
  for (int k = 0; k < depth; ++k) rows[0][k] = left(lane / 4, k), rows[1][k] = left(lane / 4 + 8, k);
  for (int i = 0; i < kN / 4; ++i) {
    for (int k = 0; k < depth; ++k) column[k] = right(i / 2 * 8 + lane % 4 * 2 + i % 2, k);
    for (int h = 0; h < 2; ++h) {
      Value& to = d[i / 2 * 4 + h * 2 + i % 2];
      Sum sum = to;
      for (int k = 0; k < depth; ++k) sum += rows[h][k] * column[k];
      to = Value(sum);
    }
  }
}

// What a lane has of its warp's sixteen rows.
struct Operand {
  uint32_t a[4];
};
template <typename T>
T of_operands(const Operand* all, int row, int k) {
  constexpr int kWord = 4 / sizeof(T);
  const uint32_t& word = all[row % 8 * 4 + k / kWord % 4].a[k / (kWord * 4) * 2 + row / 8];
  T value;
  std::memcpy(&value, reinterpret_cast<const T*>(&word) + k % kWord, sizeof(T));
  return value;
}

template <typename T>
double as_double(T value) {
  static const std::vector<double> values = [] {  // of all bits: taking them apart is slow
    std::vector<double> made(1 << 16);
    for (size_t i = 0; i < made.size(); ++i) made[i] = to_float(emulated_bits<T>(uint16_t(i)));
    return made;
  }();
  return values[emulated_bits<uint16_t>(value)];
}

// Each warp's sixteen rows by themselves.
template <typename T, int kN>
struct Wgmma {
  static void run(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t with, int adds = 1) {
    later([&d, &a, with, adds] {
      for (float& x : d) x = adds ? x : 0;
      const Operand* all = emulator::gather(Operand{{a[0], a[1], a[2], a[3]}});
      add_products<kN, double>(
          d, 16, [=](int row, int k) { return as_double(of_operands<T>(all, row, k)); },
          [=](int column, int k) { return as_double(*reinterpret_cast<const T*>(place_of(with, column, k * 2))); });
    });
  }
};

template <int kN>
struct WgmmaInt8 {
  static void run(int32_t (&d)[kN / 2], uint64_t rows, uint64_t with) {
    const int first = emulator::current->warp % 4 * 16;
    later([=, &d] {
      add_products<kN, int32_t>(
          d, 32, [=](int row, int k) { return int8_t(*place_of(rows, first + row, k)); },
          [=](int column, int k) { return int8_t(*place_of(with, column, k)); });
    });
  }
  static void run(int32_t (&d)[kN / 2], const uint32_t (&a)[4], uint64_t with, int adds) {
    later([=, &d, &a] {
      for (int32_t& x : d) x = adds ? x : 0;
      const Operand* all = emulator::gather(Operand{{a[0], a[1], a[2], a[3]}});
      add_products<kN, int32_t>(
          d, 32, [=](int row, int k) { return of_operands<int8_t>(all, row, k); },
          [=](int column, int k) { return int8_t(*place_of(with, column, k)); });
    });
  }
};

template <typename Sum, int kCount>
void settle(Sum (&)[kCount]) {}

}  // namespace qpass
