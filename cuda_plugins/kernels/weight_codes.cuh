// Integer weights as operands of an mma beside int8 activations, as they are, or bfloat16 ones, exactly.
//
// Four registers of two values each come of four bytes of int4 or eight of int8. The integers 0 … 15 are put into the mantissa of a
// power of two whose last bit stands for one, and that power is subtracted again; 0 … 255 go by way of float32.
#pragma once

#include "mma.cuh"

namespace qpass {

template <typename T>
__device__ __forceinline__ uint32_t as_word(T x) {
  return *reinterpret_cast<uint32_t*>(&x);
}

// a - b of two values each; exact for the small integers here.
__device__ __forceinline__ uint32_t minus(uint32_t a, uint32_t b) {
  auto pair = [](uint32_t& x) { return *reinterpret_cast<__nv_bfloat162*>(&x); };
  return as_word(__hsub2(pair(a), pair(b)));
}

__device__ __forceinline__ uint32_t twice(int value) { return as_word(__bfloat162bfloat162(__float2bfloat16_rn(float(value)))); }

// What is taken from a code once it is in the mantissa of a power of two: the power, the sign bit that was flipped, and the zero
// point, all at once, so that zero points cost nothing. Exact: these are integers that the type holds, and so is what is left.
template <typename Act, bool kInt4>
struct Offset {
  __device__ __forceinline__ void set(int zero) {
    if constexpr (kInt4) {
      constexpr int kMost = 256 - (128 + 8);  // beyond, bfloat16 does not hold the sum
      word = twice(128 + 8 + min(zero, kMost));
      far = __any_sync(~0u, zero > kMost);
      rest = twice(max(zero - kMost, 0));
    } else {
      value = float((1 << 23) + 128 + zero);
    }
  }

  uint32_t word, rest;
  float value;
  bool far;  // the same in all threads of a warp
};

template <bool kInt4>
struct Offset<int8_t, kInt4> {  // int8 codes are taken as they are
  __device__ __forceinline__ void set(int) {}
};

// Values 0 and 1, 2 and 3, 4 and 5, 6 and 7 of eight nibbles.
__device__ __forceinline__ void int4_codes(uint32_t word, uint32_t (&codes)[4], const Offset<bfloat16, true>& offset) {
  constexpr uint32_t kPower = 0x43004300u;  // 128; the 8 below flips a nibble's sign bit, which makes it the value plus 8
  const uint32_t odd = word >> 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = __byte_perm(word, odd, 0x4400 + 0x1111 * i);  // byte i of both, each at the foot of a half
    codes[i] = minus((pair & 0x000f000fu) ^ (kPower | 0x00080008u), offset.word);
  }
  if (!offset.far) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes[i] = minus(codes[i], offset.rest);
}

// Values 0 and 1, 2 and 3 of four bytes.
__device__ __forceinline__ void int8_codes(uint32_t word, uint32_t& low, uint32_t& high, const Offset<bfloat16, false>& offset) {
  word ^= 0x80808080u;  // the value plus 128
  // bfloat16 has no room for 256 + 0 … 255; float32 has, and its upper half holds any integer of eight bits
  auto value = [&](int byte) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 | byte)) - offset.value; };
  low = __byte_perm(__float_as_uint(value(0)), __float_as_uint(value(1)), 0x7632);
  high = __byte_perm(__float_as_uint(value(2)), __float_as_uint(value(3)), 0x7632);
}

// The operand registers of two mma's: codes[0], [1] of the first, [2], [3] of the second.
template <typename Act, bool kInt4>
__device__ __forceinline__ void weight_codes(const uint32_t* words, uint32_t (&codes)[4], const Offset<Act, kInt4>& offset) {
  if constexpr (std::is_same_v<Act, int8_t>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = words[i];
  } else if constexpr (kInt4) {
    int4_codes(words[0], codes, offset);
  } else {
    int8_codes(words[0], codes[0], codes[1], offset);
    int8_codes(words[1], codes[2], codes[3], offset);
  }
}

}  // namespace qpass
