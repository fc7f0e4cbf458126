// Loads and stores of several neighbouring elements at once, as floats.
#pragma once

#include "types.cuh"

namespace qpass {

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&v)[V]) {
  Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = to_float(pack.x[i]);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&v)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.x[i] = from_float<T>(v[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// How many elements of T a thread takes at once from rows of k, each row beginning where the last ends.
template <typename T>
constexpr int kWidest = 16 / sizeof(T);

}  // namespace qpass
