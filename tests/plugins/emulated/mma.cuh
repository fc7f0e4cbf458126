// The instructions of cuda_plugins/kernels/mma.cuh as their definitions say.
#pragma once

#include "types.cuh"

namespace qpass {

inline void copy_async(void* to, const void* from, int bytes) {
  emulator::current->copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, 16});
}
inline void copy_cached_async(void* to, const void* from, int bytes) { copy_async(to, from, bytes); }
inline void copy_word_async(void* to, const void* from, int bytes) {
  emulator::Block& block = *emulator::current->home;
  const int64_t first = static_cast<char*>(to) - block.shared;
  if (first < 0 || first + 4 > int64_t(block.bytes)) return emulator::fault("a word is copied beside shared memory");
  const void*& owner = block.owners[to];
  if (owner && owner != emulator::current) emulator::fault("two threads copy to one word");
  owner = emulator::current;
  emulator::current->copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, 4});
}

inline void commit_copies() {
  emulator::Fiber& me = *emulator::current;
  me.groups.push_back(std::move(me.copies));
  me.copies.clear();
}

template <int kPending>
void wait_copies() {
  auto& groups = emulator::current->groups;
  for (; int(groups.size()) > kPending; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* from) {
  const void* const* rows = emulator::gather(from);
  const int lane = emulator::current->lane;
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], static_cast<const char*>(rows[i * 8 + lane / 4]) + lane % 4 * 4, 4);
}

template <typename T>
struct Mma {
  using Accumulator = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

  static void run(Accumulator (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
      uint32_t a[4], b[2];
    };
    const Operands* all = emulator::gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = emulator::current->lane;
    for (int c = 0; c < 4; ++c) {
      const int row = lane / 4, column = lane % 4 * 2 + c % 2;
      double sum = acc[c];
      for (int t = 0; t < 4; ++t) {
        const Operands &left = all[row * 4 + t], &right = all[column * 4 + t];
        for (int half_k = 0; half_k < 2; ++half_k) sum += product(left.a[half_k * 2 + c / 2], right.b[half_k]);
      }
      acc[c] = Accumulator(sum);
    }
  }

 private:
  static double product(uint32_t a, uint32_t b) {
    constexpr int kCount = 4 / sizeof(T);
    T x[kCount], y[kCount];
    std::memcpy(x, &a, 4);
    std::memcpy(y, &b, 4);
    double sum = 0;
    for (int i = 0; i < kCount; ++i) sum += value(x[i]) * value(y[i]);
    return sum;
  }
  static double value(int8_t x) { return x; }
  static double value(half x) { return to_float(x); }
  static double value(bfloat16 x) { return to_float(x); }
};

}  // namespace qpass
