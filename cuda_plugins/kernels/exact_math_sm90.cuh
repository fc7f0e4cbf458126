// What exact_sm90.cuh multiplies: operands of 16-bit floats made of integer weights, which these hold exactly, and tokens in the places
// that they are left in.
//
// Of a unit of 32 values of K a lane has eight neighbours, as pairs of one and the fourth on: nibbles i and i + 4 lie in a word as a pair
// of floats wants them, and of bytes one comes of each of two words.
#pragma once

#include "hopper.cuh"
#include "mixed_operands.cuh"
#include "streams_sm90.cuh"

namespace qpass {

// What is taken from an integer in the last bits of a power of two: the power, the sign bit that was flipped, and the zero point.
template <typename T, bool kInt4, bool kZeros>
struct Less {
  static constexpr bool kHalf = std::is_same_v<T, half>;
  static constexpr int kPower = kHalf ? 1024 : 128;
  __device__ __forceinline__ void set(int zero) {
    if constexpr (kZeros) {
      // bfloat16 does not hold 128 + 8 and a large zero point: there the integer is counted down from -128 instead
      const bool down = !kHalf && zero > 0;
      const float less = down ? float(zero - (kPower + 7)) : float(zero + kPower + 8);
      one = PairOf<T>::make(less, less);
      if (!kHalf) flips = down ? 0xc307c307u : kFlips;
      if (kHalf) sixteenth = PairOf<T>::make(-(kPower / 16 + 8.f + zero), -(kPower / 16 + 8.f + zero));
    }
  }
  static constexpr uint32_t kFlips = kHalf ? 0x64086408u : 0x43084308u;  // the power and the sign
  uint32_t flips = kFlips;
  Pair<T> one = PairOf<T>::make(kPower + 8.f, kPower + 8.f);
  Pair<T> sixteenth = PairOf<T>::make(-(kPower / 16 + 8.f), -(kPower / 16 + 8.f));  // to be added where nibbles are sixteen times as much
};

// Of an int8. Bfloat16 has no bit left for its sign, which is counted apart (pairs_of): there it is the zero point alone.
template <typename T, bool kZeros>
struct Less<T, false, kZeros> {
  static constexpr float kPlain = std::is_same_v<T, half> ? 1024 + 128 : 0;
  __device__ __forceinline__ void set(int zero) {
    if constexpr (kZeros) one = PairOf<T>::make(kPlain + zero, kPlain + zero);
  }
  Pair<T> one = PairOf<T>::make(kPlain, kPlain);
};

// The bits of two integers that are taken from a word: of nibbles at the foot of its halves, and above; of bytes, or of all but their
// sign, and of that.
template <typename T, bool kInt4>
struct Masks {
  const uint32_t first = opaque(kInt4 ? 0x000f000fu : std::is_same_v<T, half> ? 0x00ff00ffu : 0x007f007fu);
  const uint32_t above = opaque(kInt4 ? 0x00f000f0u : 0x00800080u);
};

// Nibbles 0 and 4, 1 and 5, or of the `second` four 2 and 6, 3 and 7, as pairs of floats.
template <typename T, bool kZeros>
__device__ __forceinline__ void pairs_of(Pair<T> (&to)[2], const uint32_t (&words)[1], int second, const Masks<T, true>& masks,
    const Less<T, true, kZeros>& less) {
  if constexpr (std::is_same_v<T, half>) {  // which has bits for a nibble where it is in a byte
    const uint32_t shifted = words[0] >> second * 8;
    to[0] = __hsub2(same_bits<Pair<T>>(masked_and_flipped<0x64086408u>(shifted, masks.first)), less.one);
    to[1] = __hfma2(same_bits<Pair<T>>(masked_and_flipped<0x64806480u>(shifted, masks.above)), PairOf<T>::make(1 / 16.f, 1 / 16.f),
        less.sixteenth);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t shifted = words[0] >> (second * 2 + i) * 4;
      const uint32_t power = kZeros ? masked_and_flipped(shifted, masks.first, less.flips)
                                    : masked_and_flipped<0x43084308u>(shifted, masks.first);
      to[i] = __hsub2(same_bits<Pair<T>>(power), less.one);
    }
  }
}

// The same bytes of two words.
template <typename T, bool kZeros>
__device__ __forceinline__ void pairs_of(Pair<T> (&to)[2], const uint32_t (&words)[2], int second, const Masks<T, false>& masks,
    const Less<T, false, kZeros>& less) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int byte = second * 2 + i;
    const uint32_t both = __byte_perm(words[0], words[1], byte * 0x11 | (byte + 4) * 0x1100);
    if constexpr (std::is_same_v<T, half>) {
      to[i] = __hsub2(same_bits<Pair<T>>(masked_and_flipped<0x64806480u>(both, masks.first)), less.one);
    } else {  // what counts up less what counts down, each added to a power of two
      const uint32_t up = masked_and_flipped<0x43004300u>(both, masks.first), down = masked_and_flipped<0x43004300u>(both, masks.above);
      to[i] = __hsub2(same_bits<Pair<T>>(up), same_bits<Pair<T>>(down));
      if (kZeros) to[i] = __hsub2(to[i], less.one);
    }
  }
}

// What a lane has of a unit, of both its channels. `rows`: where its first begins.
template <typename S>
__device__ __forceinline__ void read_words(uint32_t (&words)[2][S::kWords], const char* rows, int unit) {
  const int quarter = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
  const auto first = address_in_shared(rows) + row * 16;  // rows are at multiples of 128: chunks are found by their bits
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (S::kInt4) {
      words[h][0] = word_in_shared(((first + quarter * 4) ^ unit * 16) + h * 8 * S::kRowBytes);
    } else {
      const int chunk = (unit * 2 + quarter / 2) ^ row;
      const uint2 two = *reinterpret_cast<const uint2*>(rows + h * 8 * S::kRowBytes + chunk * 16 + quarter % 2 * 8);
      words[h][0] = two.x, words[h][1] = two.y;
    }
  }
}

// The operands of the two products of a unit.
template <typename S, typename T>
__device__ __forceinline__ void exact_operands(uint32_t (&a)[2][4], const uint32_t (&words)[2][S::kWords],
    const Masks<T, S::kInt4>& masks, const Less<T, S::kInt4, S::kZeros> (&less)[2]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    Pair<T> pairs[2];
    const int h = j % 2;
    pairs_of<T, S::kZeros>(pairs, words[h], j / 2, masks, less[h]);
    a[j / 2][h] = same_bits<uint32_t>(pairs[0]), a[j / 2][h + 2] = same_bits<uint32_t>(pairs[1]);
  }
}

// Of each 32 values of a token, a lane's eight change places so that products meet them as pairs_of leaves weights: in each sixteen
// bytes one pair of each lane. A thread has all of a token's 64 bytes, and those of the same token further on. By kMakers threads.
template <typename S>
class Places {
 public:
  __device__ __forceinline__ Places() {
    const int warp = threadIdx.x % S::kMakers / 32, token = warp % kParts * 32 + threadIdx.x % 32, unit = warp / kParts;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk_[i] = (unit / 2 * S::kTokens + token) * kBoxBytes + ((unit % 2 * 4 + i) ^ token % 8) * 16;
  }

  __device__ __forceinline__ void change(char* tokens) const {
#pragma unroll
    for (int box = 0; box < S::kBoxes; box += kStep / 2) {
      auto chunk = [&](int i) { return reinterpret_cast<uint4*>(tokens + chunk_[i] + box * S::kTokens * kBoxBytes); };
      uint4 of[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) of[i] = *chunk(i);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        auto pair = [&](const uint4& x) { return __byte_perm(i < 2 ? x.x : x.y, i < 2 ? x.z : x.w, i % 2 ? 0x7632 : 0x5410); };
        *chunk(i) = {pair(of[0]), pair(of[1]), pair(of[2]), pair(of[3])};
      }
    }
  }

 private:
  static constexpr int kParts = S::kTokens / 32, kStep = S::kMakers / 32 / kParts;  // units that all warps have at once
  static_assert(kStep % 2 == 0 && S::kUnits % kStep == 0);
  int chunk_[4];
};

}  // namespace qpass
