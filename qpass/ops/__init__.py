"""The plugin ops: one declaration each, and from it the node, the ONNX body and the NumPy reference."""

from __future__ import annotations

from qpass.ops.activation_quantization import ActivationQuantization
from qpass.ops.base import DOMAIN, OPSET_VERSION, PLUGIN, Attribute, Input, Op, Output, When
from qpass.ops.dequantize import Dequantize
from qpass.ops.dequantize_weight import DequantizeWeight
from qpass.ops.layernorm_quantization import LayernormQuantization
from qpass.ops.quantize_per_token import QuantizePerToken
from qpass.ops.quantize_tensor import QuantizeTensor
from qpass.ops.rmsnorm_quantization import RmsnormQuantization
from qpass.ops.smooth_quant_gemm import SmoothQuantGemm
from qpass.ops.weight_only_groupwise_quant_matmul import WeightOnlyGroupwiseQuantMatmul
from qpass.ops.weight_only_quant_matmul import WeightOnlyQuantMatmul

REGISTRY: dict[str, Op] = {
    op.name: op
    for op in (
        QuantizeTensor(),
        QuantizePerToken(),
        Dequantize(),
        DequantizeWeight(),
        LayernormQuantization(),
        RmsnormQuantization(),
        ActivationQuantization(),
        SmoothQuantGemm(),
        WeightOnlyQuantMatmul(),
        WeightOnlyGroupwiseQuantMatmul(),
    )
}
"""Every op by its name."""

__all__ = ["DOMAIN", "OPSET_VERSION", "PLUGIN", "REGISTRY", "Attribute", "Input", "Op", "Output", "When"]
