// Few tokens of 16 bits beside integer weights on Hopper, in one kernel: tokens stream beside the weights as they are, and warps that
// multiply nothing make a stage's integers of them while stages before are multiplied. Where blocks have room for all of their tokens
// (few_sm90.cuh) does better with eight of them; and a kernel ahead (fixed_sm90.cuh), where K is so long that what it costs to begin
// matters less than the instructions here, which every block repeats.
#pragma once

#include "few_sm90.cuh"

namespace qpass {

// kWide of the four warpgroups that multiply are a team. Two more make integers, of stages in turn, and one copies.
template <typename Out, bool kInt4, int kGroup, int kTokens, int kWide>
struct MadeShape : SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>, FixedOf<kInt4, kGroup, false, kTokens> {
  using Sums = SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>;
  using Of = FixedOf<kInt4, kGroup, false, kTokens>;
  static constexpr int kLanes = kFixedLanes / 2;  // that make a block of a token
  static constexpr int kMakers = 128, kSets = 2, kCopier = Sums::kConsumers + kSets * kMakers, kThreads = kCopier + 128;
  static constexpr int kBoxes = Of::kBlocks, kMostStages = kWide == 4 ? 4 : 6;
  static constexpr int kStagesAhead = 1;  // whose weights do not wait for the tokens: more would delay these
  using Scales = GroupStream<2, Sums::kConsumers, std::min(5, fours_of(Of::kGroups, kMostStages / Sums::kTeams)), false>;
  static constexpr int kBarriersAt = Scales::kBytes, kBytesBeside = kBarriersAt + 2 * kMostStages * int(sizeof(Barrier));
  // Beside a stage: its tokens as they are, kBlockK values of each after those of another, and their integers' scales.
  static constexpr int kRawRow = kBlockK * 2, kRawBytes = Of::kBlocks * kTokens * kRawRow;
  static constexpr int kSideBytes = (kRawBytes + Of::kBlocks * kTokens * 4 + 1023) / 1024 * 1024;
};

// What lies beside the weights, in the slot of a stage.
template <typename S>
struct MadeSlot {
  __device__ __forceinline__ MadeSlot(const Ring<S>& ring, int slot)
      : raw(ring.side(slot)), tokens(ring.tokens(slot)), scale(reinterpret_cast<float*>(raw + S::kRawBytes)) {}
  char *const raw, *const tokens;
  float* const scale;  // [blocks, tokens]
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

// Makes the integers of a stage. By kMakers threads: eight lanes a block of a token, each of sixteen neighbours.
//
// These are as few instructions as could be: what is left to the multiplying warps is what this does not take.
template <typename S>
__device__ __forceinline__ void make_stage(const MadeSlot<S>& slot) {
  using T = typename S::Out;
  constexpr int kLanes = S::kLanes, kTeams = S::kMakers / kLanes, kAll = S::kBlocks * S::kTokens;
  constexpr int kJobs = (kAll + kTeams - 1) / kTeams;  // of a lane, none of which waits for another
  const int lane = threadIdx.x % kLanes, team = threadIdx.x % S::kMakers / kLanes;
  Bits<T, kFixedV> raw[kJobs][2];
  float largest[kJobs];
  auto each = [&](auto f) {  // f(which, block of the stage and token, as one number)
#pragma unroll
    for (int r = 0; r < kJobs; ++r) {
      if (kAll % kTeams == 0 || r * kTeams + team < kAll) f(r, r * kTeams + team);
    }
  };
#pragma unroll
  for (int r = 0; r < kJobs; ++r) raw[r][0] = raw[r][1] = {};
  each([&](int r, int job) {
    const T* const from = reinterpret_cast<const T*>(slot.raw + job * S::kRawRow) + lane * 2 * kFixedV;
    raw[r][0] = read<kFixedV>(from), raw[r][1] = read<kFixedV>(from + kFixedV);
  });
#pragma unroll
  for (int r = 0; r < kJobs; ++r) largest[r] = largest_of(raw[r]);
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) {
#pragma unroll
    for (int r = 0; r < kJobs; ++r) largest[r] = Max()(largest[r], __shfl_xor_sync(~0u, largest[r], step));
  }
  each([&](int r, int job) {
    const int block = job / S::kTokens, token = job % S::kTokens;
    const FixedScale scale = fixed_scale<S::kInt4>(largest[r]);
    FixedCodes codes[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float value[kFixedV];
      to_floats(raw[r][h], value);
      codes[h] = fixed_codes<S::kInt4>(value, scale);
    }
    char* const row = slot.tokens + (block * S::kPlanes * S::kTokens + token) * kBoxBytes + lane % 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // where products of 32 meet them, as in put_fixed
      char* const at = row + ((lane / 2 * 2 + half) ^ token % 8) * 16;
      auto of = [&](const uint2& two) { return half ? two.y : two.x; };
      *reinterpret_cast<uint2*>(at) = {of(codes[0].high), of(codes[1].high)};
      *reinterpret_cast<uint2*>(at + S::kTokens * kBoxBytes) = {of(codes[0].low), of(codes[1].low)};
    }
    if (lane == 0) slot.scale[job] = scale.scale;
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
    prefetch_map(&p.weights), prefetch_map(&p.tokens);
    auto weights = [&](int i, int slot) {
      expect(&ring.full[slot], Ring<S>::kWeights);
      copy_box(ring.weights(slot), &p.weights, own.share.stage(i) * S::kRowBytes, tile.n0, &ring.full[slot]);
    };
    int ahead = min(own.share.count, S::kStagesAhead);
    for (int i = 0; i < ahead; ++i) weights(i, i);
    wait_for_kernel_before();
    Turn<S> turn{0, 1};  // at first, slots are free
    for (int i = 0; i < own.share.count; ++i, turn.next()) {
      wait(&ring.empty[turn.slot], turn.parity);
      expect(&raw[turn.slot], S::kRawBytes);
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) {
        char* const to = ring.side(turn.slot) + block * S::kTokens * S::kRawRow;
        copy_box(to, &p.tokens, (own.share.stage(i) * S::kBlocks + block) * S::kRawRow, 0, &raw[turn.slot]);
      }
      if (--ahead < 0) weights(i, turn.slot);
    }
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
      make_stage<S>(MadeSlot<S>(ring, turn.slot));
      publish_writes();
      __syncwarp();
      if (threadIdx.x % S::kLanes == 0) arrive<1>(&made[turn.slot], 0);  // those that wrote scales, for racecheck
    }
    return;
  }
  raise_registers<96>();
  const int team = own.warp / kWarps, line = line_of<S>(own.warp % kWarps, 0);
  const int first = own.share.first_of(team) * S::kGroups, count = own.share.count_of(team);
  const uint64_t matrix = matrix_at(ring.tokens(0));
  prefetch_finish(p.finish, p, tile);
  FixedScales<S> scales(ring.beside(), p, tile.n0 + line, first, first + count * S::kGroups);
  float sums[S::kSums] = {};
  add_stages<S>(sums, ring, Turn<S>{team, 0}, line, count, first, scales, [&](const Turn<S>& turn, int, int block) {
    if (block == 0) wait(&made[turn.slot], turn.parity);
    return FixedBlock{matrix + turn.slot * (Ring<S>::kStage >> 4) + block * S::kPlanes * (Ring<S>::kBox >> 4),
        MadeSlot<S>(ring, turn.slot).scale + block * S::kTokens, nullptr};
  });
  wait_for_kernel_before();
  leave(p.finish, p, own, tile, [&](int, int j, int c) { return sums[j * 4 + c]; });
}

// cudaErrorNotSupported where a kernel ahead should make the integers: of values that are multiplied by something first, of which more
// than one sum is wanted, or beside weights that take as many instructions themselves.
template <typename Out, bool kInt4, int kGroup, bool kZeros>
cudaError_t made_by_tokens(FixedProduct p, const MixedGemm& g, const Device& device, cudaStream_t stream) {
  constexpr int kMostStages = kInt4 ? 32 : 1 << 20;  // of a block with 16 tokens
  if constexpr (kZeros || kGroup != (kInt4 ? kBlockK : 0)) return cudaErrorNotSupported;
  else {
    if (g.m > 16 || g.x_scale || g.k % kFixedV || reinterpret_cast<uintptr_t>(g.x) % 16) return cudaErrorNotSupported;
    auto with = [&](auto tokens, auto wide, int most_stages) {
      using S = MadeShape<Out, kInt4, kGroup, tokens(), wide()>;
      static OncePerDevice allowed;
      p.x = g.x;
      if (cudaError_t e = map_matrix(&p.tokens, g.x, g.m, g.k * 2, g.k * 2, S::kTokens, S::kRawRow, false)) return e;
      // whose splits are a cluster that adds them up
      const auto good = [&](const FixedProduct& p) {
        return p.together && one_wave(p, most_of(device), device) && p.stages_a_split <= most_stages;
      };
      return launch_streaming<S>(
          made_product<S>, p, g.weight, kInt4 ? g.k / 2 : g.k, nullptr, 0, device, allowed, stream, good);
    };
    using std::integral_constant;
    if (g.m <= 8) return with(integral_constant<int, 8>(), integral_constant<int, 4>(), 1 << 20);
    return with(integral_constant<int, 16>(), integral_constant<int, 2>(), kMostStages);
  }
}

}  // namespace qpass
