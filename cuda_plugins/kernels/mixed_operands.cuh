// Integer weights as operands of Hopper's 16-bit products: what a warp holds in registers of sixteen channels and sixteen values of K.
//
// Rows of the weight lie as they are stored, and so does K of the activations. Of eight neighbouring values of a row, a lane holds
// two: it reads what all four lanes of the row do, which shared memory gives at once, and takes its byte, or two.
#pragma once


#include "vectors.cuh"

namespace qpass {

template <typename T>
struct PairOf;
template <>
struct PairOf<half> {
  using type = __half2;
  static constexpr uint32_t kPower = 0x64006400u;  // 1024 in both halves: an integer in the last bits is added to it
  static __device__ __forceinline__ __half2 make(float a, float b) { return __floats2half2_rn(a, b); }
};
template <>
struct PairOf<bfloat16> {
  using type = __nv_bfloat162;
  static constexpr uint32_t kPower = 0x43004300u;  // 128
  static __device__ __forceinline__ __nv_bfloat162 make(float a, float b) { return __floats2bfloat162_rn(a, b); }
};
template <typename T>
using Pair = typename PairOf<T>::type;

// Of nibbles, the second value of a pair is sixteen times what it is: it keeps its place in the byte.
template <bool kInt4>
constexpr float kSecond = kInt4 ? 16 : 1;

// What a channel's integers are multiplied by, and what is taken from them first. `rest` is what of the scale the type has no bits
// for: integer * scale is rounded once.
template <typename T>
struct ChannelScale {
  Pair<T> scale, rest, zero;
};

template <typename T, bool kInt4>
__device__ __forceinline__ void set_scale(ChannelScale<T>& to, float scale) {
  to.scale = PairOf<T>::make(scale, scale / kSecond<kInt4>);
  const float rest = scale - to_float(to.scale.x);
  to.rest = PairOf<T>::make(rest, rest / kSecond<kInt4>);
}

template <typename T, bool kInt4>
__device__ __forceinline__ void set_zero(ChannelScale<T>& to, int zero) {
  to.zero = PairOf<T>::make(float(zero), float(zero) * kSecond<kInt4>);
}

// Selectors of the bytes of a lane's pairs, for __byte_perm.
template <bool kInt4>
__device__ __forceinline__ uint32_t bytes_of_lane(int quarter) {
  // int4: byte `quarter` of four, in both halves, the upper byte of each from the power; int8: the two from 2 * quarter on of eight
  return kInt4 ? quarter | 0x50 | quarter << 8 | 0x5000 : quarter * 2 | (quarter * 2 + 1) << 8;
}

// The two integers of a lane among eight values of a row, in one word or two. Two's complement by bits: what counts up less what
// counts down, each added to a power of two.
template <typename T, bool kInt4>
__device__ __forceinline__ Pair<T> integers(uint32_t first, uint32_t second, uint32_t bytes) {
  constexpr uint32_t kPower = PairOf<T>::kPower;
  uint32_t up, down;
  if constexpr (kInt4) {
    const uint32_t pair = __byte_perm(first, kPower, bytes);
    up = pair & 0xff70ff07u, down = pair & 0xff80ff08u;
  } else {
    const uint32_t pair = __byte_perm(first, second, bytes);
    up = (pair & 0x007f007fu) | kPower, down = (pair & 0x00800080u) | kPower;
  }
  return __hsub2(same_bits<Pair<T>>(up), same_bits<Pair<T>>(down));
}

}  // namespace qpass
