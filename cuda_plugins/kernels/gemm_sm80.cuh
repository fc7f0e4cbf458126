// CUTLASS 2.x for Ampere and what came after it but Hopper: mma.sync fed by cp.async, scales and bias in an epilogue visitor
// tree. One instantiation a translation unit (gemm_sm80_*.cu).
#pragma once

// the visitors' header relies on what these bring
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cutlass_type.cuh"
#include "gemm_kernels.h"
#include "prepared.h"

namespace qpass {

template <typename In, typename Out>
struct GemmSm80 {
  using A = typename CutlassType<In>::type;
  using D = typename CutlassType<Out>::type;
  static constexpr bool kInt8 = std::is_same_v<In, int8_t>;
  using Accumulator = std::conditional_t<kInt8, int32_t, float>;

  static constexpr int kTileK = 64 / sizeof(In), kStages = 4, kEpilogueStages = 1;
  static constexpr int kAlignmentA = 16 / sizeof(In), kAlignmentD = 16 / sizeof(Out);
  using Tile = cutlass::gemm::GemmShape<128, 128, kTileK>;
  using Warp = cutlass::gemm::GemmShape<64, 64, kTileK>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, 32 / sizeof(In)>;
  using Map = cutlass::epilogue::threadblock::OutputTileThreadLayout<Tile, Warp, D, kAlignmentD, kEpilogueStages>;

  template <typename T>
  using AlongM =
      cutlass::epilogue::threadblock::VisitorColBroadcast<Map, T, cute::Stride<cute::_1, cute::_0, int64_t>>;
  template <typename T>
  using AlongN =
      cutlass::epilogue::threadblock::VisitorRowBroadcast<Map, T, cute::Stride<cute::_0, cute::_1, int64_t>>;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  template <template <class> class Op, typename To>
  using Compute = cutlass::epilogue::threadblock::VisitorCompute<Op, To, float, kRound>;
  using Scaled = cutlass::epilogue::threadblock::Sm80EVT<Compute<cutlass::multiplies, float>, AlongM<float>,
      cutlass::epilogue::threadblock::VisitorAccFetch>;
  using ScaledTwice =
      cutlass::epilogue::threadblock::Sm80EVT<Compute<cutlass::multiplies, float>, AlongN<float>, Scaled>;
  using Biased = cutlass::epilogue::threadblock::Sm80EVT<Compute<cutlass::plus, float>, AlongN<D>, ScaledTwice>;
  using Store = cutlass::epilogue::threadblock::VisitorAuxStore<Map, D, kRound, cute::Stride<int64_t, cute::_1, int64_t>>;
  using Tree = cutlass::epilogue::threadblock::Sm80EVT<Store, Biased>;

  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<A, cutlass::layout::RowMajor,
      cutlass::ComplexTransform::kNone, kAlignmentA, A, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone,
      kAlignmentA, D, cutlass::layout::RowMajor, kAlignmentD, Accumulator, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, Tile, Warp, Instruction, Tree, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>,
      kStages, std::conditional_t<kInt8, cutlass::arch::OpMultiplyAddSaturate, cutlass::arch::OpMultiplyAdd>,
      kEpilogueStages>::GemmKernel;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

// Scales must be null or vectors: the visitors know no single value on the device.
template <typename In, typename Out>
cudaError_t gemm_sm80(const Gemm& g, const Device& device, cudaStream_t stream) {
  using Traits = GemmSm80<In, Out>;
  static thread_local Prepared<typename Traits::Device> prepared;
  auto* launch = prepared.of({g, device.id}, [&]() -> std::optional<typename Traits::Device> {
    using D = typename Traits::D;
    typename Traits::Scaled::Arguments scaled{{g.row_scale, 1.f, {}}, {}, {}};
    typename Traits::ScaledTwice::Arguments twice{{g.col_scale, 1.f, {}}, scaled, {}};
    typename Traits::Biased::Arguments biased{{static_cast<const D*>(g.bias), D(0), {}}, twice, {}};
    typename Traits::Tree::Arguments tree{biased, {static_cast<D*>(g.d), {g.ldd, cute::_1{}, 0}}};
    typename Traits::Device::Arguments args(cutlass::gemm::GemmUniversalMode::kGemm, {int(g.m), int(g.n), int(g.k)}, 1,
        tree, g.a, g.b, nullptr, nullptr, 0, 0, 0, 0, g.lda, g.ldb, 0, 0);
    if (Traits::Device::can_implement(args) != cutlass::Status::kSuccess) return std::nullopt;
    if (Traits::Device::get_workspace_size(args)) return std::nullopt;
    typename Traits::Device made;  // what the kernel needs once on a device is asked for here, once a device and thread
    if (made.initialize(args, nullptr, stream) != cutlass::Status::kSuccess) return std::nullopt;
    return made;
  });
  if (!launch) return cudaErrorNotSupported;
  if (launch->run(stream) == cutlass::Status::kSuccess) return cudaSuccess;
  cudaError_t e = cudaGetLastError();
  return e ? e : cudaErrorLaunchFailure;
}

}  // namespace qpass
