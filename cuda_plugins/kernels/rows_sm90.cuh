// Matrices of which each channel of a tile has a few bytes a stage, copied on Hopper as weights are.
#pragma once

#include "hopper.cuh"
#include "mixed.h"

namespace qpass {

// Where a channel's rows do not begin at multiples of 16 bytes, `parts` neighbours are one row to copies, and those at the same place
// among their neighbours are a box. Boxes, too, begin at multiples of 16 bytes, so that a unit may lie further on in what is copied of a
// channel.
struct RowsMap {
  TensorMap map;
  int parts = 1, stride = 0;  // bytes of a channel's own row
  int eight = 8;  // how many rows of the map on the channel eight on is
};

// kUnit bytes a stage of each of a tile's channels.
template <int kChannels, int kUnit>
struct RowsOf {
  static constexpr int kBytes = kUnit < 16 ? 16 : kUnit, kAll = kChannels * kBytes;  // of a channel; of a stage

  // To where all channels' lie, by one thread.
  static __device__ __forceinline__ void copy(char* to, const RowsMap& rows, int stage, int n0, Barrier* barrier) {
    for (int part = 0; part < rows.parts; ++part) {
      const int x = (part * rows.stride + stage * kUnit) & ~15;
      copy_box(to + part * (kChannels / rows.parts) * kBytes, &rows.map, x, n0 / rows.parts, barrier);
    }
  }

  // Of channel i of a tile, and the one eight on.
  __device__ __forceinline__ RowsOf(const RowsMap& rows, int i)
      : first_((i % rows.parts * (kChannels / rows.parts) + i / rows.parts) * kBytes), byte_(i % rows.parts * rows.stride) {}
  // Where the unit of a stage lies.
  __device__ __forceinline__ int at(const RowsMap& rows, int stage, bool eight_on) const {
    return first_ + ((byte_ + stage * kUnit) & 15) + (eight_on ? rows.eight * kBytes : 0);
  }

  // Where rows_together says how.
  static cudaError_t map(RowsMap* to, const void* from, int64_t n, int64_t stride) {
    to->parts = rows_together(n, stride, kUnit), to->stride = int(stride);
    if (!to->parts) return cudaErrorInvalidValue;
    to->eight = 8 / to->parts;
    return map_matrix(&to->map, from, n / to->parts, to->parts * stride, to->parts * stride, kChannels / to->parts, kBytes, false);
  }

 private:
  int first_, byte_;
};

}  // namespace qpass
