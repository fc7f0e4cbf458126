// Few tokens of 16 bits beside integer weights on Hopper, in one kernel: tokens stream beside the weights as they are, and warps that
// multiply nothing make a stage's integers of them while stages before are multiplied. Where blocks have room for all of their tokens
// (few_sm90.cuh) does better with eight of them; and a kernel ahead (fixed_sm90.cuh), where K is so long that what it costs to begin
// matters less than the instructions here, which every block repeats.
#pragma once

#include "few_sm90.cuh"

namespace qpass {

// kWide of the warpgroups that multiply are a team: these are four, or three. Two more make integers, and one copies.
template <typename Out, bool kInt4, int kGroup, int kTokens, int kWide>
struct MadeShape : SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>, FixedOf<kInt4, kGroup, false, kTokens> {
  using Sums = SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>;
  using Of = FixedOf<kInt4, kGroup, false, kTokens>;
  static constexpr int kLanes = kFixedLanes / 2;  // that make a block of a token
  static constexpr int kSets = 2, kMakers = 128;  // a set makes every other stage
  static constexpr int kCopier = Sums::kConsumers + kSets * kMakers, kThreads = kCopier + 128;
  // A block's values take as many bytes as their integers: the latter take their place.
  static constexpr int kBoxes = Of::kBlocks, kSideBytes = 0, kMostStages = kWide == 2 ? 6 : 4;
  static constexpr int kStagesAhead = 1;  // whose weights do not wait for the tokens: more would delay these
  using Scales = GroupStream<2, Sums::kConsumers, std::min(5, fours_of(Of::kGroups, kMostStages / Sums::kTeams)), false>;
  // The integers' scales are never written twice, so that nobody needs to tell that they were read.
  static constexpr int kStageScales = Of::kBlocks * kTokens * 4, kScalesBytes = 8192, kStagesMade = kScalesBytes / kStageScales;
  static constexpr int kGroupsAt = kScalesBytes, kBarriersAt = kGroupsAt + Scales::kBytes;
  static constexpr int kBytesBeside = kBarriersAt + 2 * kMostStages * int(sizeof(Barrier));
};

// The larger magnitudes of two pairs, which may have any sign.
template <typename T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
  uint32_t most;
  if constexpr (std::is_same_v<T, half>) asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  else asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

template <typename T>
__device__ __forceinline__ float largest_of(const Bits<T, kFixedV> (&raw)[2]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = larger_pair<T>(raw[0].x[i], raw[1].x[i]);
  const Bits<T, 2> pair{larger_pair<T>(larger_pair<T>(pairs[0], pairs[1]), larger_pair<T>(pairs[2], pairs[3]))};
  float two[2];
  to_floats(pair, two);
  return Max()(fabsf(two[0]), fabsf(two[1]));
}

// Makes the integers of a stage, in the place of its tokens. By kMakers threads: eight lanes a block of a token, each of sixteen
// neighbours, four of these lanes its first half. Those eight that read at once have two tokens' halves, which fall on different banks.
//
// These are as few instructions as could be: what is left to the multiplying warps is what this does not take.
template <typename S>
__device__ __forceinline__ void make_stage(char* tokens, float* scales) {
  using T = typename S::Out;
  constexpr int kTeams = S::kMakers / S::kLanes, kAll = S::kBlocks * S::kTokens, kPlane = S::kTokens * kBoxBytes;
  constexpr int kJobs = (kAll + kTeams - 1) / kTeams;  // of a lane, none of which waits for another
  const int lane = threadIdx.x % 32, half_of_block = lane / 8 % 2, quarter = lane % 4;
  const int team = threadIdx.x % S::kMakers / 32 * 4 + lane / 16 * 2 + lane / 4 % 2;
  Bits<T, kFixedV> raw[kJobs][2];
  float largest[kJobs];
  auto each = [&](auto f) {  // f(which, block of the stage and token as one number, the token, its row of the block's first plane)
#pragma unroll
    for (int r = 0; r < kJobs; ++r) {
      const int job = r * kTeams + team, token = job % S::kTokens;
      if (kAll % kTeams == 0 || job < kAll) f(r, job, token, tokens + job / S::kTokens * S::kPlanes * kPlane + token * kBoxBytes);
    }
  };
#pragma unroll
  for (int r = 0; r < kJobs; ++r) raw[r][0] = raw[r][1] = {};
  each([&](int r, int, int token, const char* row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      raw[r][i] = read<kFixedV>(reinterpret_cast<const T*>(row + half_of_block * kPlane + ((quarter * 2 + i) ^ token % 8) * 16));
    }
  });
#pragma unroll
  for (int r = 0; r < kJobs; ++r) largest[r] = largest_of(raw[r]);
#pragma unroll
  for (int step : {1, 2, 8}) {
#pragma unroll
    for (int r = 0; r < kJobs; ++r) largest[r] = Max()(largest[r], __shfl_xor_sync(~0u, largest[r], step));
  }
  __syncwarp();  // all have read
  each([&](int r, int job, int token, char* row) {
    const FixedScale scale = fixed_scale<S::kInt4>(largest[r]);
    FixedCodes codes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float value[kFixedV];
      to_floats(raw[r][i], value);
      codes[i] = fixed_codes<S::kInt4>(value, scale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // where products of 32 meet them, as in put_fixed
      char* const at = row + ((half_of_block * 4 + quarter / 2 * 2 + half) ^ token % 8) * 16 + quarter % 2 * 8;
      auto of = [&](const uint2& two) { return half ? two.y : two.x; };
      *reinterpret_cast<uint2*>(at) = {of(codes[0].high), of(codes[1].high)};
      *reinterpret_cast<uint2*>(at + kPlane) = {of(codes[0].low), of(codes[1].low)};
    }
    if (half_of_block == 0 && quarter == 0) scales[job] = scale.scale;
  });
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) made_product(const __grid_constant__ FixedProduct p) {
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  static_assert(Ring<S>::kStages % S::kSets == 0);  // else a set would take a phase of the other's slot for its own
  constexpr int kWarps = S::kTeam / 32;
  const Block<S> own(p, start);
  const Ring<S>& ring = own.ring;
  float* const integers_scales = reinterpret_cast<float*>(ring.beside());  // [stages, blocks, tokens]
  Barrier* const raw = reinterpret_cast<Barrier*>(ring.beside() + S::kBarriersAt);  // a stage's tokens are there
  Barrier* const made = raw + Ring<S>::kStages;                                     // and its integers
  if (threadIdx.x == S::kThreads - 32) {
    for (int i = 0; i < Ring<S>::kStages; ++i) init(&raw[i], 1), init(&made[i], S::kMakers / S::kLanes);
  }
  ring.open(kWarps);
  const Tile<S> tile(0, blockIdx.x * S::kChannels);
  if (own.warp >= S::kCopier / 32) {
    limit_registers<24>();
    if (threadIdx.x != S::kCopier) return;
    copy_raw_stages(p, own, raw, [&](int i, int slot) {
      expect(&ring.full[slot], Ring<S>::kWeights);
      copy_box(ring.weights(slot), &p.weights, own.share.stage(i) * S::kRowBytes, tile.n0, &ring.full[slot]);
    });
    return;
  }
  if (own.warp >= S::kConsumers / 32) {
    limit_registers<48>();
    // all blocks together ask for all tokens, while the kernel ahead ends
    const int64_t at = (int64_t(blockIdx.y * gridDim.x + blockIdx.x) * (S::kCopier - S::kConsumers) + threadIdx.x - S::kConsumers) * 128;
    if (at < int64_t(p.m) * p.k * 2) prefetch(static_cast<const char*>(p.x) + at);
    const int set = (own.warp - S::kConsumers / 32) / (S::kMakers / 32);
    Turn<S> turn{set, 0};
    for (int i = set; i < own.share.count; i += S::kSets, turn.template next<S::kSets>()) {
      wait(&raw[turn.slot], turn.parity);
      make_stage<S>(ring.tokens(turn.slot), integers_scales + i * (S::kStageScales / 4));
      publish_writes();
      __syncwarp();
      if (threadIdx.x / 4 % 4 < 2 && threadIdx.x % 4 == 0) arrive<1>(&made[turn.slot], 0);  // those that wrote scales, for racecheck
    }
    return;
  }
  raise_registers<96>();
  const int team = own.warp / kWarps, line = line_of<S>(own.warp % kWarps, 0);
  const int first = own.share.first_of(team) * S::kGroups, count = own.share.count_of(team);
  const uint64_t matrix = matrix_at(ring.tokens(0));
  prefetch_finish(p.finish, p, tile);
  FixedScales<S> scales(ring.beside() + S::kGroupsAt, p, tile.n0 + line, first, first + count * S::kGroups);
  float sums[S::kSums] = {};
  add_stages<S>(sums, ring, Turn<S>{team, 0}, line, count, first, scales, [&](const Turn<S>& turn, int i, int block) {
    if (block == 0) wait(&made[turn.slot], turn.parity);
    return FixedBlock{matrix + turn.slot * (Ring<S>::kStage >> 4) + block * S::kPlanes * (Ring<S>::kBox >> 4),
        integers_scales + ((i * S::kTeams + team) * S::kBlocks + block) * S::kTokens, nullptr};
  });
  wait_for_kernel_before();
  leave(p.finish, p, own, tile, [&](int, int j, int c) { return sums[j * 4 + c]; });
}

// cudaErrorNotSupported where a kernel ahead should make the integers: of values that are multiplied by something first, or of which more
// than one sum is wanted.
template <typename Out, bool kInt4, int kGroup, bool kZeros>
cudaError_t made_by_tokens(FixedProduct p, const MixedGemm& g, const Device& device, cudaStream_t stream) {
  constexpr int kMostStages = kInt4 ? 32 : 1 << 20;  // of a block with 16 tokens
  if constexpr (kZeros) {
    return cudaErrorNotSupported;
  } else {
    if (g.m > 16 || g.x_scale || g.k % kFixedV || reinterpret_cast<uintptr_t>(g.x) % 16) return cudaErrorNotSupported;
    p.x = g.x;
    auto good = [&](auto tag) {
      using S = typename decltype(tag)::type;
      const int most = S::kTokens == 16 ? std::min(kMostStages, S::kStagesMade) : S::kStagesMade;
      return [&device, most](const Streams& p) { return one_wave(p, most_of(device), device) && p.stages_a_split <= most; };
    };
    auto share = [&](auto tag) {
      using S = typename decltype(tag)::type;
      return share_of<S>(made_product<S>, p, device, good(tag), kAdding);
    };
    auto run = [&](auto tag) {
      using S = typename decltype(tag)::type;
      if (cudaError_t e = map_matrix(&p.tokens, g.x, g.m, g.k * 2, g.k * 2, S::kTokens, kBoxBytes)) return e;
      return launch_streaming<S>(made_product<S>, p, g.weight, kInt4 ? g.k / 2 : g.k, nullptr, 0, device, stream, good(tag));
    };
    if (g.m <= 8) return run(Tag<MadeShape<Out, kInt4, kGroup, 8, 4>>());
    const Tag<MadeShape<Out, kInt4, kGroup, 16, 2>> two;
    const Tag<MadeShape<Out, kInt4, kGroup, 16, 3>> three;
    const Tag<MadeShape<Out, kInt4, kGroup, 16, 4>> four;
    return run_by_share(share, run, three, two, four);
  }
}

}  // namespace qpass
