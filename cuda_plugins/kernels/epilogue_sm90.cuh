// How the sums of products on streams become results: scaled, rounded, and from the order that products leave them in changed over to rows
// of tokens.
#pragma once

#include <type_traits>

#include "hopper.cuh"
#include "vectors.cuh"

namespace qpass {

// What sums are multiplied by in the end, and where they go: y [m, n] of Out.
struct Finish {
  const float* row_scale;  // of tokens: [m] with per_row, else [1]; null: 1
  const float* col_scale;  // of channels: likewise
  const void* bias;        // [n] of Out, or null
  void* y;
  bool per_row, per_column;
  void* partial;  // with more than one split, sums as lanes hold them: [splits, tiles, columns of eight tokens, threads, 4]
};

constexpr int kLineBytes = 512;  // of shared memory, by way of which a warp stores sixteen channels of sixteen tokens

// Of a lane's channels `channel` and channel + 8, and tokens from `token` on. What eight tokens have in common with the next is found
// once, and how they are put asked once: a tile has up to 32 times eight, which must not wait for each other, as nothing is multiplied
// meanwhile.
template <typename Out>
class Epilogue {
 public:
  __device__ __forceinline__ Epilogue(const Finish& to, int m, int n, int token, int channel)
      : lane_(opaque(threadIdx.x % 32)), n_(n), aligned_(n % 8 == 0 && reinterpret_cast<uintptr_t>(to.y) % 16 == 0),
        per_row_(to.row_scale && to.per_row), of_all_(to.row_scale && !to.per_row ? *to.row_scale : 1.f),
        row_scale_(to.row_scale + token + quarter() * 2), left_(m - token), channels_(n - channel + row()),
        to_(static_cast<Out*>(to.y) + int64_t(token) * n + channel - row()) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool there = channel + h * 8 < n;
      scale_[h] = to.col_scale && there ? to.col_scale[to.per_column ? channel + h * 8 : 0] : 1.f;
      bias_[h] = to.bias && there ? to_float(static_cast<const Out*>(to.bias)[channel + h * 8]) : 0.f;
    }
  }

  // Calls `each` with what puts the sums of eight tokens, as products leave them, so many ahead of the first. By all lanes of a warp.
  template <typename Each>
  __device__ __forceinline__ void put(Each each) const {
    auto by = [&](auto scaled, auto whole) { each([&](const float (&sums)[4], int ahead) { put_eight<scaled(), whole()>(sums, ahead); }); };
    if (kPairs && n_ % 2) by(std::true_type(), std::false_type());
    else if (per_row_) by(std::true_type(), std::true_type());
    else by(std::false_type(), std::true_type());
  }

  // The same of sixteen tokens, by way of a warp's `line` of shared memory: whole sectors leave, where put() writes halves of these.
  template <typename Each>
  __device__ __forceinline__ void put_by_lines(char* line, Each each) const {
    auto by = [&](auto scaled) {
      each([&](const float (&first)[4], const float (&second)[4], int ahead) { put_sixteen<scaled()>(first, second, ahead, line); });
      __syncwarp();  // whatever comes there next
    };
    if (!aligned_) {
      each([&](const float (&first)[4], const float (&second)[4], int ahead) {
        put_eight<true, false>(first, ahead), put_eight<true, false>(second, ahead + 8);
      });
    } else if (per_row_) {
      by(std::true_type());
    } else {
      by(std::false_type());
    }
  }

 private:
  static constexpr bool kPairs = sizeof(Out) == 2;  // a lane stores two channels of one token together, else one of two tokens
  __device__ __forceinline__ int row() const { return lane_ / 4; }
  __device__ __forceinline__ int quarter() const { return lane_ % 4; }

  // What to multiply the sums of a lane's two tokens by.
  template <bool kScaled>
  __device__ __forceinline__ void find_row_scales(float (&by)[2], int ahead) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      by[i] = kScaled && per_row_ && ahead + i < left_ - quarter() * 2 ? row_scale_[ahead + i] : of_all_;
    }
  }
  __device__ __forceinline__ float value(const float (&sums)[4], const float (&by)[2], int h, int i) const {
    return sums[h * 2 + i] * by[i] * scale_[h] + bias_[h];
  }
  __device__ __forceinline__ uint32_t pair(const float (&sums)[4], const float (&by)[2], int h) const {
    return to_bits<Out>({value(sums, by, h, 0), value(sums, by, h, 1)}).x[0];
  }
  __device__ __forceinline__ Out* at(int token, int channel) const { return to_ + uint64_t(n_) * unsigned(token) + channel; }

  template <bool kScaled, bool kWhole>
  __device__ __forceinline__ void put_eight(const float (&sums)[4], int ahead) const {
    float by[2];
    find_row_scales<kScaled>(by, ahead);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kPairs) {
        const uint32_t both = transposed(pair(sums, by, h));  // now two channels of one token
        const int channel = h * 8 + quarter() * 2;
        uint16_t* const to = reinterpret_cast<uint16_t*>(at(row(), channel) + uint64_t(n_) * unsigned(ahead));
        const bool there = ahead < left_ - row();
        if constexpr (kWhole) {
          if (there && channel < channels_) *reinterpret_cast<uint32_t*>(to) = both;
        } else {
          if (there && channel < channels_) to[0] = uint16_t(both);
          if (there && channel + 1 < channels_) to[1] = uint16_t(both >> 16);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = quarter() * 2 + i, channel = row() + h * 8;
          if (ahead < left_ - token && channel < channels_) {
            *(at(token, channel) + uint64_t(n_) * unsigned(ahead)) = value(sums, by, h, i);
          }
        }
      }
    }
  }

  // A token's sixteen channels are two halves, changed over for each other four tokens: no two of eight lie in the same banks. That a
  // half is stored once the next sixteen tokens are on their way, instead of waiting for it, was slower.
  template <bool kScaled>
  __device__ __forceinline__ void put_sixteen(const float (&first)[4], const float (&second)[4], int ahead, char* line) const {
    static_assert(kPairs);
    auto half_at = [&](int token, int half) { return line + (token * 2 + (half ^ (token >> 2 & 1))) * 16; };
    const int token = lane_ / 2, half = lane_ % 2;
    float by[2][2];
    find_row_scales<kScaled>(by[0], ahead), find_row_scales<kScaled>(by[1], ahead + 8);
    __syncwarp();  // what was there is read
    store_transposed(half_at(lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2),
        {pair(first, by[0], 0), pair(first, by[0], 1), pair(second, by[1], 0), pair(second, by[1], 1)});
    __syncwarp();
    const uint4 values = *reinterpret_cast<const uint4*>(half_at(token, half));
    if (ahead < left_ - token && half * 8 < channels_) {
      *reinterpret_cast<uint4*>(at(token, half * 8) + uint64_t(n_) * unsigned(ahead)) = values;
    }
  }

  const int lane_;  // found anew: what follows of it would be held while products run
  const unsigned n_;
  const bool aligned_, per_row_;
  const float of_all_;  // tokens
  const float* const row_scale_;
  const int left_, channels_;  // tokens from `token` on, and channels from the warp's first on
  Out* const to_;              // the warp's first channel of `token`
  float scale_[2], bias_[2];
};

}  // namespace qpass
