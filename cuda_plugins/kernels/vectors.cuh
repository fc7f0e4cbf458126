// Loads and stores of several neighbouring elements at once, as floats.
#pragma once

#include <cstring>
#include <type_traits>

#include "types.cuh"

namespace qpass {

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};

// A pack as it lies in memory, in the words that registers hold.
template <typename T, int V>
struct alignas(alignof(Pack<T, V>)) Bits {
  using Word = std::conditional_t<sizeof(T) * V % 4 == 0, uint32_t, uint16_t>;
  Word x[sizeof(T) * V / sizeof(Word)];
};

template <int V, typename T>
__device__ __forceinline__ Bits<T, V> read(const T* from) {
  return *reinterpret_cast<const Bits<T, V>*>(from);
}

// Of what is needed once: it is not kept in L1, where there may be something to keep. Volatile, so that the compiler does not
// move it before what the kernel waits for.
template <int V, typename T>
__device__ __forceinline__ Bits<T, V> read_once(const T* from) {
  if constexpr (sizeof(T) * V == 16) {
    Bits<T, V> bits;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(bits.x[0]), "=r"(bits.x[1]), "=r"(bits.x[2]), "=r"(bits.x[3])
        : "l"(from));
    return bits;
  } else {
    return read<V>(from);
  }
}

// To L2. Also of what the kernel ahead may still write, before it is waited for: L2 is where that is written.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <typename T, int V>
__device__ __forceinline__ void to_floats(const Bits<T, V>& bits, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = __uint_as_float(bits.x[i]);
    } else if constexpr (V == 1) {
      T x;
      memcpy(&x, &bits, sizeof(x));
      v[i] = to_float(x);
    } else if constexpr (std::is_same_v<T, bfloat16>) {  // the upper half of a float
      v[i] = __uint_as_float(i % 2 ? bits.x[i / 2] & 0xffff0000u : bits.x[i / 2] << 16);
    } else {
      v[i] = to_float(__ushort_as_half(static_cast<unsigned short>(bits.x[i / 2] >> i % 2 * 16)));
    }
  }
}

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&v)[V]) {
  to_floats(read<V>(from), v);
}

// Rounds to T; 16-bit types in pairs, one instruction each.
template <typename T, int V>
__device__ __forceinline__ Bits<T, V> to_bits(const float (&v)[V]) {
  Bits<T, V> bits;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) bits.x[i] = __float_as_uint(v[i]);
  } else if constexpr (V == 1) {
    const T x = from_float<T>(v[0]);
    memcpy(&bits, &x, sizeof(x));
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        memcpy(&bits.x[i], &pair, 4);
      } else {
        const __half2 pair = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        memcpy(&bits.x[i], &pair, 4);
      }
    }
  }
  return bits;
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&v)[V]) {
  *reinterpret_cast<Bits<T, V>*>(to) = to_bits<T>(v);
}

// How many elements of T a thread takes at once from rows of k, each row beginning where the last ends.
template <typename T>
constexpr int kWidest = 16 / sizeof(T);

template <typename To, typename From>
__device__ __forceinline__ To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace qpass
