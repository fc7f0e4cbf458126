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

// Values 0 and 1, 2 and 3, 4 and 5, 6 and 7 of eight nibbles.
template <typename Act>
__device__ __forceinline__ void int4_codes(uint32_t word, uint32_t (&codes)[4]) {
  // 1024 in float16, 128 in bfloat16; the 8 flips a nibble's sign bit, which makes it the value plus 8
  constexpr uint32_t kPower = std::is_same_v<Act, half> ? 0x64006400u : 0x43004300u;
  const uint32_t offset = twice<Act>(std::is_same_v<Act, half> ? 1032 : 136);
  const uint32_t odd = word >> 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = __byte_perm(word, odd, 0x4400 + 0x1111 * i);  // byte i of both, each at the foot of a half
    codes[i] = minus<Act>((pair & 0x000f000fu) ^ (kPower | 0x00080008u), offset);
  }
}

// Values 0 and 1, 2 and 3 of four bytes.
template <typename Act>
__device__ __forceinline__ void int8_codes(uint32_t word, uint32_t& low, uint32_t& high) {
  word ^= 0x80808080u;  // the value plus 128
  if constexpr (std::is_same_v<Act, half>) {
    const uint32_t offset = twice<half>(1152);
    low = minus<half>(__byte_perm(word, 0x64646464u, 0x4140), offset);
    high = minus<half>(__byte_perm(word, 0x64646464u, 0x4342), offset);
  } else {
    // bfloat16 has no room for 256 + 0 … 255; float32 has, and its upper half holds any integer of eight bits
    auto value = [&](int byte) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 | byte)) - 8388736.f; };
    low = __byte_perm(__float_as_uint(value(0)), __float_as_uint(value(1)), 0x7632);
    high = __byte_perm(__float_as_uint(value(2)), __float_as_uint(value(3)), 0x7632);
  }
}

// The operand registers of two mma's: codes[0], [1] of the first, [2], [3] of the second. `zero` is subtracted where there is one.
template <typename Act, bool kInt4>
__device__ __forceinline__ void weight_codes(const uint32_t* words, uint32_t (&codes)[4], bool has_zero, int zero) {
  if constexpr (std::is_same_v<Act, int8_t>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = words[i];
  } else {
    if constexpr (kInt4) {
      int4_codes<Act>(words[0], codes);
    } else {
      int8_codes<Act>(words[0], codes[0], codes[1]);
      int8_codes<Act>(words[1], codes[2], codes[3]);
    }
    if (has_zero) {
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = minus<Act>(codes[i], twice<Act>(zero));
    }
  }
}

}  // namespace qpass
