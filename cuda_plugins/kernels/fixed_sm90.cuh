// Few tokens of 16 bits beside integer weights on Hopper: the tokens' integers come of a kernel ahead and stream beside the weights
// (prepare.cu).
#pragma once

#include "exact_sm90.cuh"
#include "made_sm90.cuh"

namespace qpass {

// kWide of the warpgroups are a team: these are four, or three.
template <typename Out, bool kInt4, int kGroup, bool kZeros, int kTokens, int kWide>
struct FixedShape : SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>, FixedOf<kInt4, kGroup, kZeros, kTokens> {
  using Sums = SumsOf<Out, float, kWide, 1, kTokens, 1, 4 / kWide>;
  using Of = FixedOf<kInt4, kGroup, kZeros, kTokens>;
  static constexpr int kThreads = Sums::kConsumers + 128, kBoxes = Of::kBlocks;
  static constexpr int kMostStages = kWide == 2 ? 6 : 4;
  // More would be a queue of microseconds in front of what the kernel that adds up splits, and then the one that makes tokens, read.
  // Of 32 tokens, and of 64 with zero points, a full ring was faster (benchmarks/results/products_profile_h100.json).
  static constexpr int kStagesAhead = kTokens <= 16 || (kTokens == 64 && !kZeros) ? 2 : kMostStages;
  // Whose scales of groups are there or on their way, of a team. Of many tokens stages take longer, and there is less room.
  static constexpr int kStagesOfScales = kTokens <= 16 ? kMostStages / Sums::kTeams : kTokens <= 32 ? 2 : 1;
  using Scales = GroupStream<2, Sums::kConsumers, std::min(5, fours_of(Of::kGroups, kStagesOfScales)), kZeros>;
  static constexpr int kBytesBeside = Scales::kBytes;
  static constexpr int kSideRow = kTokens * 4, kSumsAt = 512;  // copies go to multiples of 128
  static constexpr int kSideBytes = (kSumsAt + Of::kBlocks * Of::kSpans * kSideRow + 1023) / 1024 * 1024;
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) fixed_product(const __grid_constant__ FixedProduct p) {
  extern __shared__ __align__(128) char start[];
  let_next_kernel_start();
  constexpr int kWarps = S::kTeam / 32;
  const Block<S> own(p, start, kWarps);
  if (own.warp >= S::kConsumers / 32) {
    limit_registers<32>();
    if (threadIdx.x == S::kConsumers) {
      const int bytes_beside = S::kBlocks * S::kSideRow * (S::kZeros ? 1 + S::kSpans : 1);
      copy_stages(p, own, bytes_beside, [&](const Tile<S>& tile, int stage, int slot) {
        const int block = stage * S::kBlocks, x = tile.m0 * 4;
        copy_box(own.ring.side(slot), &p.act_scale, x, block, &own.ring.full[slot]);
        if (S::kZeros) copy_box(own.ring.side(slot) + S::kSumsAt, &p.act_sum, x, block * S::kSpans, &own.ring.full[slot]);
      });
    }
    return;
  }
  raise_registers<112>();
  const int team = own.warp / kWarps, line = line_of<S>(own.warp % kWarps, 0);
  const int first = own.share.first_of(team) * S::kGroups, count = own.share.count_of(team);
  const uint64_t matrix = matrix_at(own.ring.tokens(0));
  own.each_piece(p, [&](const Tile<S>& tile, const Pieces<S>&) {
    prefetch_finish(p.finish, p, tile);
    FixedScales<S> scales(own.ring.beside(), p, tile.n0 + line, first, first + count * S::kGroups);
    float sums[S::kSums] = {};
    add_stages<S>(sums, own.ring, Turn<S>{team, 0}, line, count, first, scales, [&](const Turn<S>& turn, int, int block) {
      const char* side = own.ring.side(turn.slot);
      return FixedBlock{matrix + turn.slot * (Ring<S>::kStage >> 4) + block * S::kPlanes * (Ring<S>::kBox >> 4),
          reinterpret_cast<const float*>(side + block * S::kSideRow),
          reinterpret_cast<const float*>(side + S::kSumsAt + block * S::kSpans * S::kSideRow)};
    });
    wait_for_kernel_before();
    leave(p.finish, p, own, tile, [&](int, int j, int c) { return sums[j * 4 + c]; });
  });
}

template <typename Out, bool kInt4, int kGroup, bool kZeros>
cudaError_t fixed_by_tokens(FixedProduct p, const MixedGemm& g, const FixedActivations* x, const Device& device, cudaStream_t stream) {
  if (!x) {
    cudaError_t e = few_by_tokens<Out, kInt4, kGroup, kZeros>(p, g, device, stream);
    if (e == cudaErrorNotSupported) e = made_by_tokens<Out, kInt4, kGroup, kZeros>(p, g, device, stream);
    if (e == cudaErrorNotSupported) e = exact_by_tokens<Out, kInt4, kGroup, kZeros>(g, device, stream);
    return e;
  }
  auto good = [&](const Streams& p) { return one_wave(p, most_of(device), device); };
  auto share = [&](auto tag) {
    using S = typename decltype(tag)::type;
    return share_of<S>(fixed_product<S>, p, device, good, kAdding);
  };
  auto run = [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t blocks = x->padded / kBlockK, row = x->side * 4, spans = S::kBlocks * S::kSpans;
    if (cudaError_t e = map_matrix(&p.act_scale, x->scale, blocks, row, row, S::kBlocks, S::kSideRow, false)) return e;
    if (cudaError_t e = map_matrix(&p.act_sum, x->sum, blocks * S::kSpans, row, row, int(spans), S::kSideRow, false)) return e;
    return launch_streaming<S>(fixed_product<S>, p, g.weight, kInt4 ? g.k / 2 : g.k, x->high, x->padded, device, stream);
  };
  if (g.m <= 8) return run(Tag<FixedShape<Out, kInt4, kGroup, kZeros, 8, 4>>());
  if (g.m <= 16) {
    const Tag<FixedShape<Out, kInt4, kGroup, kZeros, 16, 2>> two;  // whose splits are a cluster that adds them up
    const Tag<FixedShape<Out, kInt4, kGroup, kZeros, 16, 3>> three;
    const Tag<FixedShape<Out, kInt4, kGroup, kZeros, 16, 4>> four;
    return run_by_share(share, run, three, two, four);
  }
  if (g.m <= 32) return run(Tag<FixedShape<Out, kInt4, kGroup, kZeros, 32, 4>>());
  return run(Tag<FixedShape<Out, kInt4, kGroup, kZeros, 64, 4>>());
}

template <typename Out, bool kInt4>
cudaError_t fixed_sm90(const MixedGemm& g, const FixedActivations* x, const Device& device, cudaStream_t stream) {
  FixedProduct p{};
  p.m = int(g.m), p.n = int(g.n), p.k = int(g.k);
  p.scale = g.scale, p.zero = g.zero;
  p.scales = g.group_size ? int(g.k / g.group_size) : 1;
  p.follows = true;
  p.finish = {nullptr, g.group_size ? nullptr : g.scale, g.bias, g.y, true, true, g.workspace};
  auto by_zeros = [&](auto group) {
    return g.zero ? fixed_by_tokens<Out, kInt4, group(), true>(p, g, x, device, stream)
                  : fixed_by_tokens<Out, kInt4, group(), false>(p, g, x, device, stream);
  };
  switch (g.group_size) {
    case 0: return by_zeros(std::integral_constant<int, 0>());
    case 32: return by_zeros(std::integral_constant<int, 32>());
    case 64: return by_zeros(std::integral_constant<int, 64>());
    case 128: return by_zeros(std::integral_constant<int, 128>());
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace qpass
