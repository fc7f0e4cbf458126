// Products on Hopper whose operands stream through shared memory, a stage of K at a time: who has which tile, and how stages get
// there. Channels are rows of what is multiplied, tokens columns.
//
// A shape S says: kChannels × kTokens of a tile; kCluster blocks that share what they copy of the tokens; of a stage, kRowBytes of a
// weight's row, which is its box; kBoxes boxes of kBoxBytes of a token's, neighbours in its row, of kPlanes matrices, whose boxes
// follow each other; kSideBytes for what else a stage needs; kMostStages of them, and where K is split kStagesAhead, whose weights do
// not wait for the kernel that makes tokens; and kBytesBeside for what lies beside all.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "hopper.cuh"
#include "launch.cuh"
#include "vectors.cuh"

namespace qpass {

// Tiles whose stages are dealt out among blocks (stream_k_sm90.cuh): those from `from` on are a row of stages, of which each block, or
// cluster, has `least` neighbours, and the first `more` of them one more.
struct StreamK {
  int from, least, more;
  uint32_t by_stages;  // 2^32 over those of a tile
  uint64_t launch;     // what no other launch has

  __device__ __forceinline__ int begin_of(int n) const { return n * least + min(n, more); }
  // Of a division it would not be known that all threads have the same, and what follows of it would take each of them registers.
  __device__ __forceinline__ int tile_of(int stage) const { return int(uint64_t(unsigned(stage)) * by_stages >> 32); }
};

struct Streams {
  TensorMap weights, tokens;
  int m, n, k, tiles;
  int splits, stages_a_split;
  bool together;  // the splits of a tile are a cluster
  bool by_stream_k;
  StreamK stream_k;  // else it is from beyond all tiles
  bool follows;  // the tokens come of the kernel before, and nothing else that is read here does
};

constexpr int kBoxBytes = 128;  // of a token's row: what products read, swizzled

// Bytes of a block's shared memory, and where in it what lies. The ring begins at a multiple of 1024, for which there is room.
template <typename S>
struct Ring {
  static constexpr int kWeights = S::kChannels * S::kRowBytes, kBox = S::kTokens * kBoxBytes;
  static constexpr int kTokens = S::kPlanes * S::kBoxes * kBox, kStage = kWeights + kTokens + S::kSideBytes;
  // More than are needed for memory to be busy would delay what else is read: scales, or the tokens of the first stage.
  static constexpr int kMost = (227 << 10) - 1024 - 512 - S::kBytesBeside, kFitting = kMost / kStage;
  // A slot is always the same team's: one that waits for what it is filled with next would take a phase of another's for its own.
  static constexpr int kStages = (kFitting < S::kMostStages ? kFitting : S::kMostStages) / S::kTeams * S::kTeams;
  static constexpr int kBytes = kStages * kStage + S::kBytesBeside + 1024 + kStages * 2 * int(sizeof(Barrier));
  static_assert(kStages >= 2 && kStages >= S::kTeams && S::kChannels <= 256 && S::kTokens / S::kCluster % 8 == 0);
  static_assert(kStage % 1024 == 0 && S::kSideBytes % 1024 == 0);

  __device__ __forceinline__ explicit Ring(char* start)
      : stages(start + (-address_in_shared(start) & 1023)), full(reinterpret_cast<Barrier*>(beside() + S::kBytesBeside)),
        empty(full + kStages) {}
  __device__ __forceinline__ char* weights(int slot) const { return stages + slot * kStage; }
  __device__ __forceinline__ char* tokens(int slot) const { return weights(slot) + kWeights; }
  __device__ __forceinline__ char* beside() const { return stages + kStages * kStage; }  // kBytesBeside of a shape's own
  __device__ __forceinline__ char* side(int slot) const { return tokens(slot) + kTokens; }

  // By all threads of a block. `readers` arrive at a slot of each block that fills it once they are done with it, and `writers` at one
  // that they filled.
  __device__ __forceinline__ void open(int readers, int writers = 1) const {
    if (threadIdx.x == blockDim.x - 32) {  // of the warp that copies, or that nobody waits for
      for (int i = 0; i < kStages; ++i) init(&full[i], writers), init(&empty[i], S::kCluster * readers);
      publish_barriers();
    }
    if constexpr (S::kCluster > 1) cluster_barrier();
    else __syncthreads();
  }
  // By all threads: nobody leaves while another block may write or arrive here.
  __device__ __forceinline__ void close() const {
    if constexpr (S::kCluster > 1) {
      __syncwarp();
      cluster_barrier();
    }
  }
  // By a warp that has read what is in a slot.
  __device__ __forceinline__ void free(int slot) const {
    __syncwarp();
    const unsigned lane = threadIdx.x % 32;
    if (lane < S::kCluster) arrive<S::kCluster>(&empty[slot], lane);
  }

  char* const stages;
  Barrier *const full, *const empty;
};

// Which tile a block has. Those of a few tiles of tokens follow one another, so that what they share is still in the L2 cache.
template <typename S>
struct Tile {
  static int64_t count(int64_t m, int64_t n) {
    return ceil_div(ceil_div(n, S::kChannels), S::kCluster) * S::kCluster * ceil_div(m, S::kTokens);
  }
  __device__ __forceinline__ Tile(int m0, int n0) : m0(m0), n0(n0) {}
  __device__ __forceinline__ Tile(int m, int n, int64_t block) {
    constexpr int kTogether = 8;
    const int64_t clusters_n = ceil_div(ceil_div(n, S::kChannels), S::kCluster), tiles_m = ceil_div(m, S::kTokens);
    const int64_t cluster = block / S::kCluster, group = cluster / (kTogether * clusters_n);
    const int64_t within = cluster % (kTogether * clusters_n), size = min(tiles_m - group * kTogether, int64_t(kTogether));
    m0 = int(group * kTogether + within % size) * S::kTokens;
    n0 = int(within / size * S::kCluster + block % S::kCluster) * S::kChannels;
  }
  int m0, n0;
};

// The stages that a block multiplies; each of its teams has a part of them, what does not divide goes to the first.
template <typename S>
struct Share {
  __device__ __forceinline__ Share(int first, int count) : first(first), count(count) {}
  __device__ __forceinline__ explicit Share(const Streams& p)
      : first(blockIdx.y * p.stages_a_split), count(min(p.stages_a_split, int(ceil_div(p.k, S::kStageK)) - first)) {}
  __device__ __forceinline__ int first_of(int team) const {
    return first + team * (count / S::kTeams) + min(team, count % S::kTeams);
  }
  __device__ __forceinline__ int count_of(int team) const { return count / S::kTeams + (team < count % S::kTeams); }
  // The one that is copied as the i-th: teams take turns.
  __device__ __forceinline__ int stage(int i) const { return first_of(i % S::kTeams) + i / S::kTeams; }
  int first, count;
};

// Where in the ring a thread is: which slot, and the parity of the phase that it waits for there.
template <typename S>
struct Turn {
  template <int kSteps = 1>
  __device__ __forceinline__ void next() {
    static_assert(kSteps <= Ring<S>::kStages);
    if ((slot += kSteps) >= Ring<S>::kStages) slot -= Ring<S>::kStages, parity ^= 1;
  }
  int slot = 0, parity = 0;
};

// What a block has of a product, a piece after another: a tile of each round and, where stages are dealt out, its part of these from the
// last tile back to the first. So it leaves what ends in another block first, and comes last to what began in those before it, which
// these have left by then.
//
// Blocks that stay (kStays), as many as the GPU runs at once, have more than one piece: stages of the next are copied while one is
// finished. Where memory is the bound, that is slower than new blocks, which go where there is time.
template <typename S>
class Pieces {
 public:
  __device__ __forceinline__ explicit Pieces(const Streams& p) : share(p), tile(blockIdx.x), p_(p) {
    if constexpr (S::kStays) next_ = blockIdx.x;
    if constexpr (S::kStreamK) begin_ = p.stream_k.begin_of(cluster()), end_ = p.stream_k.begin_of(cluster() + 1);
  }
  // To the next, at first to the first: whether there is one.
  __device__ __forceinline__ bool next() {
    if (next_ < p_.stream_k.from) {
      tile = next_, next_ += gridDim.x;
      return true;
    }
    if constexpr (S::kStreamK) {
      if (begin_ == end_) return false;
      const int t = p_.stream_k.tile_of(end_ - 1), first_of_tile = t * p_.stages_a_split;
      share.first = max(begin_ - first_of_tile, 0), share.count = end_ - first_of_tile - share.first;
      tile = p_.stream_k.from + t * S::kCluster + int(blockIdx.x % S::kCluster), end_ -= share.count;
      return true;
    }
    return false;
  }
  // Whether another block ends the tile.
  __device__ __forceinline__ bool leaves() const {
    return S::kStreamK && tile >= p_.stream_k.from && share.first + share.count < p_.stages_a_split;
  }
  // Where this block ends the tile, whether the i-th block, or cluster, before it has stages of that.
  __device__ __forceinline__ bool begun_by(int i) const {
    if constexpr (!S::kStreamK) return false;
    else return tile >= p_.stream_k.from && share.first && !leaves() && p_.stream_k.begin_of(cluster() - i + 1) > begin_ - share.first;
  }
  Share<S> share;
  int tile;

 private:
  static __device__ __forceinline__ int cluster() { return blockIdx.x / S::kCluster; }
  const Streams& p_;
  int next_, begin_, end_;  // a tile; stages
};

// What every product begins with: its ring, opened for warps that read, and what of the product is the block's. By all threads.
template <typename S>
struct Block {
  __device__ __forceinline__ Block(const Streams& p, char* start) : ring(start), share(p), warp(__shfl_sync(~0u, threadIdx.x / 32, 0)) {}
  __device__ __forceinline__ Block(const Streams& p, char* start, int readers) : Block(p, start) { ring.open(readers); }
  // Calls f with each tile of which the block has a piece, and with that.
  template <typename F>
  __device__ __forceinline__ void each_piece(const Streams& p, F f) const {
    Pieces<S> pieces(p);
    if constexpr (!S::kStays) f(Tile<S>(p.m, p.n, pieces.tile), pieces);
    else while (pieces.next()) f(Tile<S>(p.m, p.n, pieces.tile), pieces);
  }
  const Ring<S> ring;
  const Share<S> share;
  const int warp;  // so that the compiler sees that lanes have the same
};

// Copies stages of both operands into the ring, by one thread. With the tokens of a stage goes what `beside(tile, stage, slot)` copies,
// so many bytes.
template <typename S, typename Beside>
__device__ __forceinline__ void copy_stages(const Streams& p, const Block<S>& own, int bytes_beside, Beside beside) {
  const Ring<S>& ring = own.ring;
  const int rank = S::kCluster > 1 ? int(block_of_cluster()) : 0;
  prefetch_map(&p.weights), prefetch_map(&p.tokens);
  auto weights = [&](const Tile<S>& tile, int stage, int slot) {
    expect(&ring.full[slot], Ring<S>::kWeights + Ring<S>::kTokens + bytes_beside);
    copy_box(ring.weights(slot), &p.weights, stage * S::kRowBytes, tile.n0, &ring.full[slot]);
  };
  auto tokens = [&](const Tile<S>& tile, int stage, int slot) {
    constexpr int kRows = S::kTokens / S::kCluster;
#pragma unroll
    for (int box = 0; box < S::kPlanes * S::kBoxes; ++box) {
      char* to = ring.tokens(slot) + box * Ring<S>::kBox + rank * kRows * kBoxBytes;
      const int x = (stage * S::kBoxes + box / S::kPlanes) * kBoxBytes;
      const int y = tile.m0 + rank * kRows + box % S::kPlanes * p.m;
      if constexpr (S::kCluster == 1) copy_box(to, &p.tokens, x, y, &ring.full[slot]);
      else copy_box_to_all<S::kCluster>(to, &p.tokens, x, y, &ring.full[slot]);
    }
    beside(tile, stage, slot);
  };
  Pieces<S> first(p);
  int ahead = 0;
  if (p.follows && (!S::kStays || first.next())) {
    ahead = min(first.share.count, p.splits > 1 ? min(S::kStagesAhead, Ring<S>::kStages) : Ring<S>::kStages);
    for (int i = 0; i < ahead; ++i) weights(Tile<S>(p.m, p.n, first.tile), first.share.stage(i), i);
  }
  wait_for_kernel_before();
  Turn<S> turn{0, 1};  // at first, slots are free
  own.each_piece(p, [&](const Tile<S>& tile, const Pieces<S>& piece) {
    for (int i = 0; i < piece.share.count; ++i, turn.next()) {
      const int stage = piece.share.stage(i);
      wait(&ring.empty[turn.slot], turn.parity);
      if (--ahead < 0) weights(tile, stage, turn.slot);
      tokens(tile, stage, turn.slot);
    }
  });
}

// The same where warps of the block change a stage's tokens before they are multiplied: `raw` counts these, and `full` what
// `weights(i, slot)` copies of the i-th.
template <typename S, typename Weights>
__device__ __forceinline__ void copy_raw_stages(const Streams& p, const Block<S>& own, Barrier* raw, Weights weights) {
  const Ring<S>& ring = own.ring;
  prefetch_map(&p.weights), prefetch_map(&p.tokens);
  int ahead = min(own.share.count, S::kStagesAhead);
  for (int i = 0; i < ahead; ++i) weights(i, i);
  wait_for_kernel_before();
  Turn<S> turn{0, 1};  // at first, slots are free
  for (int i = 0; i < own.share.count; ++i, turn.next()) {
    wait(&ring.empty[turn.slot], turn.parity);
    expect(&raw[turn.slot], Ring<S>::kTokens);
#pragma unroll
    for (int box = 0; box < S::kPlanes * S::kBoxes; ++box) {
      const int x = (own.share.stage(i) * S::kBoxes * S::kPlanes + box) * kBoxBytes;
      copy_box(ring.tokens(turn.slot) + box * Ring<S>::kBox, &p.tokens, x, 0, &raw[turn.slot]);
    }
    if (--ahead < 0) weights(i, turn.slot);
  }
}

// A stage's tokens and nothing else.
struct Nothing {
  template <typename Tile>
  __device__ __forceinline__ void operator()(const Tile&, int, int) const {}
};

}  // namespace qpass
