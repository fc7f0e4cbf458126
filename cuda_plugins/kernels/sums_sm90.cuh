// How sums of products on streams leave. Where tiles are fewer than multiprocessors, K is split among blocks; those that have a tile
// together are a cluster, if the GPU can run them all at the same time, and read each other's sums from shared memory. Else a second
// kernel adds up what they leave in memory. Splits are added in order, either way.
#pragma once

#include <algorithm>
#include <atomic>
#include <iterator>

#include "epilogue_sm90.cuh"
#include "stream_k_sm90.cuh"
#include "streams_sm90.cuh"

namespace qpass {

// Whose sums a product's threads have: kWarpgroups of kTiles_ * 64 channels each, all of a tile's tokens; of kTeams_ such teams, each a
// part of K. What adds them up knows no more of a shape.
template <typename Out_, typename Sum_, int kWarpgroups, int kTiles_, int kTokens_, int kCluster_, int kTeams_ = 1>
struct SumsOf {
  using Out = Out_;
  using Sum = Sum_;
  static constexpr int kTiles = kTiles_, kTokens = kTokens_, kCluster = kCluster_, kTeams = kTeams_;
  static constexpr int kTeam = kWarpgroups * 128, kConsumers = kTeam * kTeams, kChannels = kWarpgroups * kTiles * 64;
  static constexpr int kColumns = kTiles * kTokens / 8;  // of eight tokens that a warp has sums of
  static constexpr bool kStreamK = false;                // whether tiles may be of several blocks, and these of more than one
  static constexpr bool kByLines = false;                // whether a warp has kLineBytes of shared memory beside the ring, in the end
};

constexpr int kMostTogether = 8;  // splits of a cluster: more are not promised by every GPU

// Where a thread's sums of eight tokens are kept until those of all splits are there; `column` counts eight tokens, by tiles of rows.
template <typename S>
__device__ __forceinline__ int64_t partial_at(int split, int64_t tiles, int64_t tile, int column) {
  return (((split * tiles + tile) * S::kColumns + column) * S::kConsumers + threadIdx.x) * 4;
}

// The first of a lane's channels among its tile's, of its warpgroup's part `t`.
template <typename S>
__device__ __forceinline__ int line_of(int warp, int t) {
  return warp / 4 * (S::kTiles * 64) + t * 64 + warp % 4 * 16 + threadIdx.x % 32 / 4;
}

// The sums of the splits, a block for eight tokens of a tile.
template <typename S>
__global__ void __launch_bounds__(S::kConsumers) add_up(const Finish to, int m, int n, int splits) {
  using Sum = typename S::Sum;
  let_next_kernel_start();
  const Tile<S> tile(m, n, blockIdx.y);
  const int t = blockIdx.x / (S::kTokens / 8), token = tile.m0 + blockIdx.x % (S::kTokens / 8) * 8;
  if (token >= m) return;
  wait_for_kernel_before();
  const Epilogue<typename S::Out> epilogue(to, m, n, token, tile.n0 + line_of<S>(threadIdx.x / 32, t));
  constexpr int kAtOnce = 4;
  Sum sums[4] = {};
  for (int from = 0; from < splits; from += kAtOnce) {
    Pack<Sum, 4> parts[kAtOnce];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      parts[s] = {};
      if (from + s < splits) {
        const Sum* at = static_cast<const Sum*>(to.partial) + partial_at<S>(from + s, gridDim.y, blockIdx.y, blockIdx.x);
        parts[s] = *reinterpret_cast<const Pack<Sum, 4>*>(at);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce * 4; ++j) sums[j % 4] += parts[j / 4].x[j % 4];
  }
  epilogue.put([&](auto put) { put({float(sums[0]), float(sums[1]), float(sums[2]), float(sums[3])}, 0); });
}

// What a product is finished by is on its way to L2 while it is under way. By all consumers.
template <typename S>
__device__ __forceinline__ void prefetch_finish(const Finish& to, const Streams& p, const Tile<S>& tile) {
  const int channel = tile.n0 + int(threadIdx.x);
  if (threadIdx.x >= S::kChannels || channel >= p.n) return;
  if (to.col_scale && to.per_column) prefetch(to.col_scale + channel);
  if (to.bias) prefetch(static_cast<const typename S::Out*>(to.bias) + channel);
}

// Where a column of eight tokens of a tile begins.
template <typename S>
__device__ __forceinline__ int token_of(const Tile<S>& tile, int column) {
  return tile.m0 + column % (S::kTokens / 8) * 8;
}

// Adds up what all teams of a cluster's blocks left where stages were: of sixteen channels and eight tokens by a warp, dealt out among
// those of the cluster. All that a warp has is of the same channels, and where it is much, of several columns on its way at once.
template <typename S>
__device__ __forceinline__ void add_up_together(const Finish& to, const Streams& p, const Block<S>& own, const Tile<S>& tile) {
  using Sum = typename S::Sum;
  constexpr int kWarps = S::kConsumers / 32, kOfTeam = S::kTeam / 32, kOfTile = S::kTokens / 8;
  constexpr int kBatch = S::kColumns < 16 ? 1 : kWarps <= 8 ? 4 : 2;  // columns that are added up together: what registers hold
  constexpr int kAtOnce = kBatch == 1 ? 4 : 2;                        // parts of each on their way at once
  const Pack<Sum, 4>* const lanes = reinterpret_cast<const Pack<Sum, 4>*>(own.ring.stages) + opaque(threadIdx.x % 32);
  const int mine = blockIdx.y + p.splits * own.warp, warp = mine % kOfTeam, step = p.splits * S::kTeams, parts = step;
#pragma unroll
  for (int t = 0; t < S::kTiles; ++t) {
    const Epilogue<typename S::Out> epilogue(to, p.m, p.n, tile.m0, tile.n0 + line_of<S>(warp, t));
    // the first of its columns that is of these channels
    const int skipped = max(0, t * kOfTile - mine / kOfTeam), first = mine / kOfTeam + (skipped + step - 1) / step * step;
    for (int column = first; column < (t + 1) * kOfTile; column += step * kBatch) {
      Sum sums[kBatch][4] = {};
      auto there = [&](int c) {
        const int of = column + c * step;
        return of < (t + 1) * kOfTile && token_of(tile, of) < p.m;
      };
      for (int from = 0; from < parts; from += kAtOnce) {
        uint4 loaded[kBatch][kAtOnce];
        auto each = [&](auto f) {
#pragma unroll
          for (int i = 0; i < kBatch * kAtOnce; ++i) {
            const int c = i / kAtOnce, s = i % kAtOnce;
            if (from + s < parts && there(c)) f(c, loaded[c][s], (from + s) / S::kTeams, (from + s) % S::kTeams);
          }
        };
        each([&](int c, uint4& part, int block, int team) {
          part = read_from(lanes + ((column + c * step) * kWarps + team * kOfTeam + warp) * 32, block);
        });
        each([&](int c, const uint4& part, int, int) {
          const auto of = same_bits<Pack<Sum, 4>>(part);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[c][i] += of.x[i];
        });
      }
      epilogue.put([&](auto put) {
#pragma unroll
        for (int c = 0; c < kBatch; ++c) {
          if (there(c)) {
            put({float(sums[c][0]), float(sums[c][1]), float(sums[c][2]), float(sums[c][3])}, (column + c * step) % kOfTile * 8);
          }
        }
      });
    }
  }
}

// Stores a thread's sums, or leaves them to be added up: `value(t, j, c)` is of part t of its warpgroup's channels and eight tokens from
// 8 j on. By all consumers.
template <typename S, typename Value>
__device__ __forceinline__ void leave(const Finish& to, const Streams& p, const Block<S>& own, const Tile<S>& tile, Value value) {
  using Sum = typename S::Sum;
  static_assert(S::kColumns * S::kConsumers * 16 <= Ring<S>::kStages * Ring<S>::kStage);
  const bool here = S::kTeams > 1 || p.together;
  if (here) barrier_of_first<S::kConsumers>();  // the ring is read no more
#pragma unroll
  for (int t = 0; t < S::kTiles; ++t) {
    if (!here && p.splits == 1) {
      const Epilogue<typename S::Out> epilogue(to, p.m, p.n, tile.m0, tile.n0 + line_of<S>(own.warp, t));
      if constexpr (S::kByLines) {
        char* const line = own.ring.beside() + own.warp * (S::kBytesBeside / (S::kConsumers / 32));
        epilogue.put_by_lines(line, [&](auto put) {
#pragma unroll
          for (int j = 0; j < S::kTokens / 8; j += 2) {
            put({value(t, j, 0), value(t, j, 1), value(t, j, 2), value(t, j, 3)},
                {value(t, j + 1, 0), value(t, j + 1, 1), value(t, j + 1, 2), value(t, j + 1, 3)}, j * 8);
          }
        });
      } else {
        epilogue.put([&](auto put) {
#pragma unroll
          for (int j = 0; j < S::kTokens / 8; ++j) {
            put({float(value(t, j, 0)), float(value(t, j, 1)), float(value(t, j, 2)), float(value(t, j, 3))}, j * 8);
          }
        });
      }
    } else {
#pragma unroll
      for (int j = 0; j < S::kTokens / 8; ++j) {
        if (tile.m0 + j * 8 >= p.m) break;
        const int column = t * (S::kTokens / 8) + j;
        Sum* at = static_cast<Sum*>(to.partial) + partial_at<S>(blockIdx.y, gridDim.x, blockIdx.x, column);
        if (here) at = reinterpret_cast<Sum*>(own.ring.stages) + (column * S::kConsumers + threadIdx.x) * 4;
        *reinterpret_cast<Pack<Sum, 4>*>(at) = {{value(t, j, 0), value(t, j, 1), value(t, j, 2), value(t, j, 3)}};
      }
    }
  }
  if (!here) return;
  auto all_there = [&] {
    if (!p.together) return barrier_of_first<S::kConsumers>();
    __syncwarp();
    cluster_barrier();
  };
  all_there();
  add_up_together(to, p, own, tile);
  if (p.together) all_there();  // nobody leaves while its sums are read
}

// How many clusters of `grid.cluster` the GPU runs at the same time, asked once a device and size: as kernels on streams have a
// multiprocessor to themselves, it is the same for all.
template <typename Parameters>
int64_t clusters_at_once(void (*kernel)(Parameters), const Grid& grid, const Device& device) {
  static std::atomic<int> known[64][kMostTogether + 1];  // and one more
  std::atomic<int> asked{0}, &answer = device.id < 64 ? known[device.id][grid.cluster.y] : asked;
  if (int count = answer.load(std::memory_order_relaxed)) return count - 1;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = config_of(grid, attributes);
  int count = 0;
  if (taken_back(cudaOccupancyMaxActiveClusters(&count, kernel, &config))) count = 0;
  answer.store(count + 1, std::memory_order_relaxed);
  return count;
}

// Divides a product into tiles, and their K where they are few.
template <typename S, typename Parameters>
Grid divide(void (*kernel)(Parameters), Streams& p, const Device& device) {
  if constexpr (S::kStreamK) {
    if (p.by_stream_k) return divide_by_stream_k<S>(p, device);
  }
  const int64_t tiles = Tile<S>::count(p.m, p.n), stages = ceil_div(p.k, S::kStageK);
  p.tiles = p.stream_k.from = int(tiles);
  const int64_t stay = device.multiprocessors / S::kCluster * S::kCluster;
  Grid grid{dim3(unsigned(S::kStays ? std::min(tiles, stay) : tiles)), S::kThreads, Ring<S>::kBytes, dim3(S::kCluster)};
  auto split = [&](int64_t into) {
    p.stages_a_split = int(ceil_div(stages, into));
    p.splits = int(ceil_div(stages, p.stages_a_split));
    grid.blocks.y = unsigned(p.splits);
  };
  // A part of fewer than two stages costs more to add up than it saves.
  const int64_t at_once = std::min<int64_t>(device.multiprocessors, kMostStreaming);
  int64_t parts = std::min({at_once / tiles, stages / (2 * S::kTeams), kMostSplitsOfK});
  // Tiles of 192 tokens are none of those that workspaces are sized by, and may have to be split less.
  if (S::kTokens > kSplitKTokens) {
    const int64_t room = split_bytes(p.m, p.n, kMixedTokens) / sizeof(float);
    parts = std::min(parts, room / (tiles * S::kChannels * S::kTokens));
  }
  split(S::kTeams > 1 ? 1 : std::max<int64_t>(parts, 1));
  for (int together = kMostTogether; together > 1 && S::kCluster == 1 && !p.together; together /= 2) {
    // a second kernel takes longer than a quarter more of K, or than what so many splits leave
    const bool enough = S::kTeams > 1 || together == kMostTogether || together * 4 >= parts * 3;
    if (together > parts || !enough || ceil_div(stages, ceil_div(stages, together)) != together) continue;
    Grid clusters = grid;
    clusters.blocks.y = clusters.cluster.y = unsigned(together);
    if (clusters_at_once(kernel, clusters, device) < tiles) continue;
    split(together);
    grid.cluster.y = unsigned(together), p.together = true;
  }
  return grid;
}

// How many multiprocessors are to have a block, so that tiles of fewer channels pay: where they leave more idle, larger ones do as well.
inline int64_t most_of(const Device& device) { return device.multiprocessors * 3 / 5; }

// Whether at least `least` multiprocessors have a block to do, and none more than one.
inline bool one_wave(const Streams& p, int64_t least, const Device& device) {
  const int64_t blocks = int64_t(p.tiles) * p.splits;
  return least <= blocks && blocks <= device.multiprocessors;
}

// Leave for a shape's shared memory, which a kernel needs before it is launched, and before it is asked how many of it there can be.
template <typename S, typename Parameters>
cudaError_t allow_memory(void (*kernel)(Parameters), const Device& device) {
  static OncePerDevice allowed;
  return allowed(device, [&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Ring<S>::kBytes); });
}

constexpr int64_t kNoShare = int64_t(1) << 56;

// Of a product as it would be divided, how much the block has that has the most to do, in channels of a stage; what adds up its splits, if
// that is another kernel, counts as `adding`: as measured. kNoShare where `good` says no.
template <typename S, typename Parameters, typename Good>
int64_t share_of(void (*kernel)(Parameters), Streams p, const Device& device, Good good, int64_t adding = 400) {
  if (allow_memory<S>(kernel, device)) return kNoShare;
  divide<S>(kernel, p, device);
  return good(p) ? int64_t(S::kChannels) * p.stages_a_split + (p.splits > 1 && !p.together ? adding : 0) : kNoShare;
}

// Runs a product by the first of the `usual` tiles that can do it, or by one `between` these, whose channels are powers of two, where the
// largest share of that is a tenth less: where tiles would leave many multiprocessors idle, or be more than these by few.
template <typename Share, typename Run, typename Between, typename Usual, typename... Others>
cudaError_t run_by_share(Share share, Run run, Between between, Usual usual, Others... others) {
  const int64_t of_usual = share(usual);
  if constexpr (sizeof...(others) > 0) {
    if (of_usual == kNoShare) return run_by_share(share, run, between, others...);
  }
  return share(between) * 10 <= of_usual * 9 ? run(between) : run(usual);
}

// Tiles of a product, and what a stage of one takes a multiprocessor, in hundredths of a microsecond, as measured.
template <typename S_, int kStage_>
struct Timed {
  using S = S_;
  static constexpr int kStage = kStage_;
};

// What a product would take by `tiles`, in hundredths of a microsecond: as many rounds as the multiprocessors need for them, each with a
// beginning, and an end that takes as long as there are sums; where K is split, its parts end together once more. Where stages are dealt
// out, a block has parts of two tiles, of which it leaves one, and takes what others left of the other.
template <typename S, int kStage, typename Parameters>
int64_t time_of(Timed<S, kStage>, void (*kernel)(Parameters), Streams p, const Device& device, bool stream_k) {
  constexpr int64_t kBegins = 160, kSums = S::kChannels * S::kTokens, kEnds = kSums / 131, kWaits = 190, kLeaves = kSums / 14, kTakes = 300;
  if ((stream_k && !S::kStreamK) || allow_memory<S>(kernel, device)) return kNoShare;
  p.by_stream_k = stream_k;
  const Grid grid = divide<S>(kernel, p, device);
  const int64_t whole = int64_t(p.stages_a_split) * kStage + kBegins + kEnds;
  if (!stream_k) return ceil_div(p.tiles, grid.blocks.x) * whole + (p.splits > 1 ? kBegins + kEnds + kWaits : 0);
  if (!divides_by_stream_k(p, grid)) return kNoShare;
  const int64_t rounds = p.stream_k.from / grid.blocks.x, others = ceil_div(p.stages_a_split, p.stream_k.least);
  return rounds * whole + (p.stream_k.least + 1) * int64_t(kStage) + kBegins + kEnds + kLeaves + (others - 1) * kTakes;
}

// Runs a product by those tiles that take the least time, and in that way, the first of equal ones.
template <typename Time, typename Run, typename... Tiles>
cudaError_t run_fastest(Time time, Run run, Tiles... tiles) {
  const int64_t times[] = {time(tiles, false)..., time(tiles, true)...}, least = *std::min_element(std::begin(times), std::end(times));
  cudaError_t e = cudaErrorNotSupported;
  int i = 0;
  auto one = [&](auto of, bool stream_k) { return times[i++] == least && (e = run(of, stream_k), true); };
  (void)((one(tiles, false) || ...) || (one(tiles, true) || ...));
  return e;
}

// Launches a product whose kernel takes `p`, which has everything but maps and splits, and adds up what it left. Without `tokens` it
// finds them itself. Where `good` says no to how it would be divided: cudaErrorNotSupported.
template <typename S, typename Parameters, typename Good>
cudaError_t launch_streaming(void (*kernel)(Parameters), Parameters p, const void* weights, int64_t weight_bytes, const void* tokens,
    int64_t token_bytes, const Device& device, cudaStream_t stream, Good good) {
  if (cudaError_t e = allow_memory<S>(kernel, device)) return e;
  const Grid grid = divide<S>(kernel, p, device);
  if (!good(p)) return cudaErrorNotSupported;
  if (p.by_stream_k) p.stream_k.launch = new_launch();
  if (cudaError_t e = map_matrix(&p.weights, weights, p.n, weight_bytes, weight_bytes, S::kChannels, S::kRowBytes)) return e;
  if (tokens) {
    const int rows = S::kTokens / S::kCluster;
    if (cudaError_t e = map_matrix(&p.tokens, tokens, p.m * S::kPlanes, token_bytes, token_bytes, rows, kBoxBytes)) return e;
  }
  if (cudaError_t e = launch(grid, device, stream, kernel, p)) return e;
  if (p.splits == 1 || p.together) return cudaSuccess;
  const Grid adding{dim3(S::kColumns, unsigned(p.tiles)), S::kConsumers};
  return launch(adding, device, stream, add_up<typename S::Sums>, p.finish, p.m, p.n, p.splits);
}
template <typename S, typename Parameters>
cudaError_t launch_streaming(void (*kernel)(Parameters), Parameters p, const void* weights, int64_t weight_bytes, const void* tokens,
    int64_t token_bytes, const Device& device, cudaStream_t stream) {
  return launch_streaming<S>(kernel, p, weights, weight_bytes, tokens, token_bytes, device, stream, [](const Parameters&) { return true; });
}

}  // namespace qpass
