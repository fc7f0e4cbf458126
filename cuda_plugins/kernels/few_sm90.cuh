// Sixteen tokens and fewer beside integer weights on Hopper, in one kernel: every block makes the integers of the tokens that it meets
// while the first weights are on their way, and keeps them. Its warpgroups take stages in turn, in teams that have a stage's
// channels together; where tiles are few, so do the blocks of a cluster. All of them add up their sums in shared memory.
#pragma once

#include "fixed_math_sm90.cuh"

namespace qpass {

// kWide of the warpgroups are a team: these are four, or three.
template <typename Out, bool kInt4, int kGroup, bool kZeros, int kTokens, int kWide>
struct FewShape : SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>, FixedOf<kInt4, kGroup, kZeros, kTokens> {
  using Sums = SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>;
  using Of = FixedOf<kInt4, kGroup, kZeros, kTokens>;
  static constexpr int kThreads = Sums::kConsumers + 32, kBoxes = 0, kSideBytes = 0;
  static constexpr int kMostStages = kWide == 1 ? 8 : kWide == 2 ? 6 : 4;  // with more in flight, all take longer
  using Scales = GroupStream<2, Sums::kConsumers, fours_of(Of::kGroups, kMostStages / Sums::kTeams), kZeros>;
  static constexpr int kBlockBytes = Of::kPlanes * kTokens * kBoxBytes;            // of kBlockK values of all tokens
  static constexpr int kSideRow = kTokens * 4 * (1 + (kZeros ? Of::kSpans : 0));   // beside them: scales, and sums
  static constexpr int kMostBlocks = (kWide == 1 ? 96 : 64) * 1024 / kBlockBytes;  // that there is room for
  static constexpr int kScalesAt = (kMostBlocks * (kBlockBytes + kSideRow) + 1023) / 1024 * 1024;
  static constexpr int kBytesBeside = kScalesAt + Scales::kBytes;
};

// Tokens of the block's share of K, as integers in shared memory. All consumers make them: sixteen lanes a block of a token.
template <typename S>
class Resident {
 public:
  __device__ __forceinline__ Resident(const FixedProduct& p, const Ring<S>& ring, const Share<S>& share)
      : p_(p), blocks_(share.count * S::kBlocks), first_(share.first * S::kBlocks), token_a_job_(1.f / float(blocks_)),
        matrices_(ring.beside()), sides_(matrices_ + S::kMostBlocks * S::kBlockBytes) {}

  __device__ __forceinline__ FixedBlock block(int i) const {
    const float* scale = reinterpret_cast<const float*>(sides_ + i * S::kSideRow);
    return {matrix_at(matrices_) + i * (S::kBlockBytes >> 4), scale, scale + S::kTokens};
  }

  // Asks for tokens, the first ones before all else: they would come behind it.
  __device__ __forceinline__ void ask(int from = 0) {
    each(from, [&](int r, bool there, int token, int, int k) {
      raw_[r] = there && k < p_.k ? read<kV>(static_cast<const T*>(p_.x) + int64_t(token) * p_.k + k) : Bits<T, kV>();
    });
  }

  __device__ __forceinline__ void make() {
    for (int from = 0;; ask(from)) {
      each(from, [&](int r, bool there, int token, int block, int k) { put(raw_[r], there, token, block, k); });
      if ((from += kTeams * kAtOnce) >= p_.m * blocks_) break;
    }
    publish_writes();
    barrier_of_first<S::kConsumers>();
  }

 private:
  using T = typename S::Out;
  static constexpr int kV = kFixedV, kTeams = S::kConsumers / kFixedLanes, kAtOnce = 8;

  // f(which of those at once, whether it is one, its token, block, and first value) of a lane's jobs.
  template <typename F>
  __device__ __forceinline__ void each(int from, F f) const {
    const int lane = threadIdx.x % kFixedLanes, team = threadIdx.x / kFixedLanes, jobs = p_.m * blocks_;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int job = from + r * kTeams + team, token = int((float(job) + 0.5f) * token_a_job_), block = job - token * blocks_;
      if (job - team < jobs) f(r, job < jobs, token, block, (first_ + block) * kBlockK + lane * kV);
    }
  }

  __device__ __forceinline__ void put(const Bits<T, kV>& raw, bool there, int token, int block, int k) const {
    float value[kV];
    to_floats(raw, value);
    if (p_.x_scale && there && k < p_.k) {
      float by[kV];
      load<kV>(p_.x_scale + k, by);
#pragma unroll
      for (int j = 0; j < kV; ++j) value[j] *= by[j];
    }
    char* const side = sides_ + block * S::kSideRow;
    put_fixed<S>(to_fixed<S::kInt4>(value), there, token, matrices_ + block * S::kBlockBytes, reinterpret_cast<float*>(side),
        reinterpret_cast<float*>(side) + S::kTokens);
  }

  const FixedProduct& p_;
  const int blocks_, first_;
  const float token_a_job_;
  char *const matrices_, *const sides_;
  Bits<T, kV> raw_[kAtOnce];
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) few_product(const __grid_constant__ FixedProduct p) {
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  constexpr int kWarps = S::kTeam / 32;
  const Block<S> own(p, start);
  const Tile<S> tile(0, blockIdx.x * S::kChannels);
  const int team = own.warp / kWarps, line = line_of<S>(own.warp % kWarps, 0);
  const bool multiplies = own.warp < S::kConsumers / 32;
  const int first = own.share.first_of(team), count = own.share.count_of(team);
  Resident<S> tokens(p, own.ring, own.share);
  if (multiplies) {  // tokens and scales are asked for first: they would wait behind all that weights are
    wait_for_kernel_before();
    tokens.ask();
  }
  const int groups = multiplies ? count * S::kGroups : 0;
  FixedScales<S> scales(own.ring.beside() + S::kScalesAt, p, tile.n0 + line, first * S::kGroups, first * S::kGroups + groups);
  own.ring.open(kWarps);
  if (!multiplies) {
    if (threadIdx.x == S::kConsumers) {
      prefetch_map(&p.weights);
      Turn<S> turn{0, 1};  // at first, slots are free
      for (int i = 0; i < own.share.count; ++i, turn.next()) {
        wait(&own.ring.empty[turn.slot], turn.parity);
        expect(&own.ring.full[turn.slot], Ring<S>::kWeights);
        copy_box(own.ring.weights(turn.slot), &p.weights, own.share.stage(i) * S::kRowBytes, tile.n0, &own.ring.full[turn.slot]);
      }
    }
    return;
  }
  prefetch_finish(p.finish, p, tile);
  tokens.make();
  float sums[S::kSums] = {};
  const int begin = (first - own.share.first) * S::kBlocks;  // among the share's
  add_stages<S>(sums, own.ring, Turn<S>{team, 0}, line, count, first * S::kGroups, scales,
      [&](const Turn<S>&, int i, int block) { return tokens.block(begin + i * S::kBlocks + block); });
  leave(p.finish, p, own, tile, [&](int, int j, int c) { return sums[j * 4 + c]; });
}

// cudaErrorNotSupported where a kernel ahead should make the integers: more tokens take longer to make than to copy.
template <typename Out, bool kInt4, int kGroup, bool kZeros>
cudaError_t few_by_tokens(FixedProduct p, const MixedGemm& g, const Device& device, cudaStream_t stream) {
  if (g.m > 16) return cudaErrorNotSupported;
  p.x = g.x, p.x_scale = g.x_scale;
  // if there is room for the tokens, and no multiprocessor has more than one block to do; small tiles want most of them to have one
  auto good = [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t least = S::kTeams > 1 ? most_of(device) : 0;
    return [&device, least](const Streams& p) { return p.stages_a_split * S::kBlocks <= S::kMostBlocks && one_wave(p, least, device); };
  };
  auto share = [&](auto tag) {
    using S = typename decltype(tag)::type;
    return share_of<S>(few_product<S>, p, device, good(tag), kAdding);
  };
  auto run = [&](auto tag) {
    using S = typename decltype(tag)::type;
    return launch_streaming<S>(few_product<S>, p, g.weight, kInt4 ? g.k / 2 : g.k, nullptr, 0, device, stream, good(tag));
  };
  if (g.m > 8) return run(Tag<FewShape<Out, kInt4, kGroup, kZeros, 16, 1>>());
  const Tag<FewShape<Out, kInt4, kGroup, kZeros, 8, 1>> one;
  const Tag<FewShape<Out, kInt4, kGroup, kZeros, 8, 2>> two;
  const Tag<FewShape<Out, kInt4, kGroup, kZeros, 8, 3>> three;
  const Tag<FewShape<Out, kInt4, kGroup, kZeros, 8, 4>> four;
  return run_by_share(share, run, three, two, one, four);
}

}  // namespace qpass
