// CUTLASS 3.x on Hopper: wgmma fed by TMA, scales and bias in an epilogue visitor tree. One instantiation a translation unit
// (gemm_sm90_*.cu): each takes a minute to compile.
#pragma once

// Its kernels wait for the one before them as ours do (launch.cuh), and let the next start when their last tile is multiplied.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cutlass_type.cuh"
#include "gemm_kernels.h"
#include "launch.cuh"
#include "prepared.h"

namespace qpass {

// Tokens × channels of a tile, bytes of K a stage, and how many blocks along the tokens share what they load of the weight, or, where
// tokens are an odd number of tiles, along the channels what they load of the tokens.
// Pingpong: each of two consumer warpgroups has a tile of its own, and multiplies while the other stores; else they share one.
template <int kM_, int kN_, int kBytes_, int kCluster_, bool kPingpong_>
struct Sm90TileOf {
  static constexpr int kM = kM_, kN = kN_, kBytes = kBytes_, kCluster = kCluster_;
  static constexpr bool kPingpong = kPingpong_;
};
template <qpass_variant>
struct Sm90Tile;
template <>
struct Sm90Tile<QPASS_SM90_64X64> : Sm90TileOf<64, 64, 256, 1, true> {};
template <>
struct Sm90Tile<QPASS_SM90_64X128> : Sm90TileOf<64, 128, 128, 1, true> {};
template <>
struct Sm90Tile<QPASS_SM90_128X128> : Sm90TileOf<128, 128, 128, 2, true> {};
template <>
struct Sm90Tile<QPASS_SM90_128X256> : Sm90TileOf<128, 256, 128, 2, false> {};

template <typename In, typename Out, qpass_variant kVariant, bool kAlongChannels>
struct GemmSm90 {
  using A = typename CutlassType<In>::type;
  using D = typename CutlassType<Out>::type;
  using Accumulator = std::conditional_t<std::is_same_v<In, int8_t>, int32_t, float>;

  using Of = Sm90Tile<kVariant>;
  using Tile = cute::Shape<cute::Int<Of::kM>, cute::Int<Of::kN>, cute::Int<Of::kBytes / int(sizeof(In))>>;
  static constexpr int kClusterM = kAlongChannels ? 1 : Of::kCluster, kClusterN = kAlongChannels ? Of::kCluster : 1;
  using Cluster = cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>;
  using Mainloop = std::conditional_t<Of::kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Epilogue = std::conditional_t<Of::kPingpong, cutlass::epilogue::TmaWarpSpecialized,
      cutlass::epilogue::TmaWarpSpecializedCooperative>;

  // strides of type bool: a vector, or one value for all, chosen at run time; a null pointer gives the default
  using AlongM = cute::Stride<bool, cute::_0, int64_t>;
  using AlongN = cute::Stride<cute::_0, bool, int64_t>;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using RowScale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float, float, AlongM>;
  using ColScale = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float, AlongN>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, D, float, AlongN>;
  template <template <class> class Op, typename To>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<Op, To, float, kRound>;
  using Scaled = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::multiplies, float>, RowScale,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using ScaledTwice = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::multiplies, float>, ColScale, Scaled>;
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::plus, D>, Bias, ScaledTwice>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<cutlass::arch::Sm90,
      cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, Accumulator, float,
      void, cutlass::layout::RowMajor, 128 / cutlass::sizeof_bits<D>::value, D, cutlass::layout::RowMajor,
      128 / cutlass::sizeof_bits<D>::value, Epilogue, Tree>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<cutlass::arch::Sm90,
      cutlass::arch::OpClassTensorOp, A, cutlass::layout::RowMajor, 16 / sizeof(In), A, cutlass::layout::ColumnMajor,
      16 / sizeof(In), Accumulator, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
      CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;

  static typename Kernel::Arguments arguments(const Gemm& g, int multiprocessors) {
    int m = int(g.m), n = int(g.n), k = int(g.k);
    typename Kernel::StrideA a{g.lda, cute::_1{}, 0};
    typename Kernel::StrideB b{g.ldb, cute::_1{}, 0};
    typename Kernel::StrideD d{g.ldd, cute::_1{}, 0};
    typename Kernel::Arguments args{cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k, 1},
        {static_cast<const A*>(g.a), a, static_cast<const A*>(g.b), b}, {{}, nullptr, {}, static_cast<D*>(g.d), d}};
    typename Scaled::Arguments scaled{{g.row_scale, 1.f, {g.per_row, {}, 0}}, {}, {}};
    typename ScaledTwice::Arguments twice{{g.col_scale, 1.f, {{}, g.per_column, 0}}, scaled, {}};
    args.epilogue.thread = {{static_cast<const D*>(g.bias), D(0), {{}, true, 0}}, twice, {}};
    args.hw_info.sm_count = multiprocessors;
    return args;
  }
};

template <typename In, typename Out, qpass_variant kVariant, bool kAlongChannels>
cudaError_t gemm_sm90(const Gemm& g, const Device& device, cudaStream_t stream) {
  using Traits = GemmSm90<In, Out, kVariant, kAlongChannels>;
  using Kernel = typename Traits::Kernel;
  struct Launch {
    typename Kernel::Params params;
    dim3 blocks;
  };
  static thread_local Prepared<Launch> prepared;
  Launch* launch = prepared.of({g, device.id}, [&]() -> std::optional<Launch> {
    auto args = Traits::arguments(g, device.multiprocessors);
    if (!Kernel::can_implement(args) || Kernel::get_workspace_size(args)) return std::nullopt;
    auto params = Kernel::to_underlying_arguments(args, nullptr);
    return Launch{params, Kernel::get_grid_shape(params)};
  });
  if (!launch) return cudaErrorNotSupported;

  const auto kernel = reinterpret_cast<const void*>(&cutlass::device_kernel<Kernel>);
  static OncePerDevice allowed;
  auto allow = [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  };
  if (cudaError_t e = allowed(device, allow)) return e;
  const Grid grid{launch->blocks, Kernel::get_block_shape(), Kernel::SharedStorageSize,
      dim3(Traits::kClusterM, Traits::kClusterN)};
  void* arguments[] = {&launch->params};  // they are large: not copied once more
  return launch_by(grid, device, stream, [&](auto* config) { return cudaLaunchKernelExC(config, kernel, arguments); });
}

}  // namespace qpass
