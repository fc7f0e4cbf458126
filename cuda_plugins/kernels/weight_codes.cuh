// Integer weights as operands of an mma: as they are for int8 activations, else as 16-bit floats, exactly.
//
// Four registers of two values each come of four bytes of int4 or eight of int8. The integers 0 … 15 and 0 … 255 are put into
// the mantissa of a power of two whose last bit stands for one, and that power is subtracted again.
#pragma once

#include "mma.cuh"

namespace qpass {

__device__ __forceinline__ half2 as_half2(uint32_t x) { return *reinterpret_cast<half2*>(&x); }
__device__ __forceinline__ __nv_bfloat162 as_bfloat162(uint32_t x) { return *reinterpret_cast<__nv_bfloat162*>(&x); }
template <typename T>
__device__ __forceinline__ uint32_t as_word(T x) {
  return *reinterpret_cast<uint32_t*>(&x);
}

// a - b of two values each, in the type of the activations; exact for the small integers here.
template <typename Act>
__device__ __forceinline__ uint32_t minus(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<Act, half>) return as_word(__hsub2(as_half2(a), as_half2(b)));
  else return as_word(__hsub2(as_bfloat162(a), as_bfloat162(b)));
}

template <typename Act>
__device__ __forceinline__ uint32_t twice(int value) {
  if constexpr (std::is_same_v<Act, half>) return as_word(__half2half2(__int2half_rn(value)));
  else return as_word(__bfloat162bfloat162(__float2bfloat16_rn(float(value))));
}

// What is taken from a code once it is in the mantissa of a power of two: the power, the sign bit that was flipped, and the zero
// point, all at once, so that zero points cost nothing. Exact: these are integers that the type holds, and so is what is left.
template <typename Act, bool kInt4>
struct Offset {
  __device__ __forceinline__ void set(int zero) {
    if constexpr (std::is_same_v<Act, half>) {
      word = twice<half>((kInt4 ? 1024 + 8 : 1024 + 128) + zero);
    } else if constexpr (kInt4) {
      constexpr int kMost = 256 - (128 + 8);  // beyond, bfloat16 does not hold the sum
      word = twice<bfloat16>(128 + 8 + min(zero, kMost));
      far = __any_sync(~0u, zero > kMost);
      rest = twice<bfloat16>(max(zero - kMost, 0));
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
template <typename Act>
__device__ __forceinline__ void int4_codes(uint32_t word, uint32_t (&codes)[4], const Offset<Act, true>& offset) {
  // 1024 in float16, 128 in bfloat16; the 8 flips a nibble's sign bit, which makes it the value plus 8
  constexpr uint32_t kPower = std::is_same_v<Act, half> ? 0x64006400u : 0x43004300u;
  const uint32_t odd = word >> 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = __byte_perm(word, odd, 0x4400 + 0x1111 * i);  // byte i of both, each at the foot of a half
    codes[i] = minus<Act>((pair & 0x000f000fu) ^ (kPower | 0x00080008u), offset.word);
  }
  if constexpr (std::is_same_v<Act, bfloat16>) {
    if (!offset.far) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = minus<Act>(codes[i], offset.rest);
  }
}

// Values 0 and 1, 2 and 3 of four bytes.
template <typename Act>
__device__ __forceinline__ void int8_codes(uint32_t word, uint32_t& low, uint32_t& high, const Offset<Act, false>& offset) {
  word ^= 0x80808080u;  // the value plus 128
  if constexpr (std::is_same_v<Act, half>) {
    low = minus<half>(__byte_perm(word, 0x64646464u, 0x4140), offset.word);
    high = minus<half>(__byte_perm(word, 0x64646464u, 0x4342), offset.word);
  } else {
    // bfloat16 has no room for 256 + 0 … 255; float32 has, and its upper half holds any integer of eight bits
    auto value = [&](int byte) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 | byte)) - offset.value; };
    low = __byte_perm(__float_as_uint(value(0)), __float_as_uint(value(1)), 0x7632);
    high = __byte_perm(__float_as_uint(value(2)), __float_as_uint(value(3)), 0x7632);
  }
}

// The operand registers of two mma's: codes[0], [1] of the first, [2], [3] of the second.
template <typename Act, bool kInt4>
__device__ __forceinline__ void weight_codes(const uint32_t* words, uint32_t (&codes)[4], const Offset<Act, kInt4>& offset) {
  if constexpr (std::is_same_v<Act, int8_t>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = words[i];
  } else if constexpr (kInt4) {
    int4_codes<Act>(words[0], codes, offset);
  } else {
    int8_codes<Act>(words[0], codes[0], codes[1], offset);
    int8_codes<Act>(words[1], codes[2], codes[3], offset);
  }
}

}  // namespace qpass
