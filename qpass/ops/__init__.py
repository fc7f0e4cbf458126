"""The plugin ops: one declaration each, and from it the node, the ONNX body and the NumPy reference."""

from __future__ import annotations

from qpass.ops.activation_quantization import ActivationQuantization
from qpass.ops.base import DOMAIN, OPSET_VERSION, PLUGIN, Attribute, Input, Op, Output, When
from qpass.ops.dequantize import Dequantize
from qpass.ops.dequantize_weight import DequantizeWeight
from qpass.ops.norm import Layernorm, Rmsnorm
from qpass.ops.norm_quantization import LayernormQuantization, RmsnormQuantization
from qpass.ops.quantize_per_token import QuantizePerToken
from qpass.ops.quantize_tensor import QuantizeTensor
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
        Layernorm(),
        Rmsnorm(),
        LayernormQuantization(),
        RmsnormQuantization(),
        ActivationQuantization(),
        SmoothQuantGemm(),
        WeightOnlyQuantMatmul(),
        WeightOnlyGroupwiseQuantMatmul(),
    )
}
"""Every op by its name."""


def register(op: Op) -> Op:
    """Make an op of your own known to rules (`new.MyOp(…)`), bodies, engines and tests, and return it.

    Its plugin is compiled in by `qpass plugins build --with my_op.cu`.

    Raises:
        ValueError: another op has this name.
    """
    there = REGISTRY.setdefault(op.name, op)
    if type(there).__qualname__ != type(op).__qualname__ or type(there).__module__ != type(op).__module__:
        raise ValueError(f"there is an op {op.name} already; an op is named by its class")
    return there


__all__ = ["DOMAIN", "OPSET_VERSION", "PLUGIN", "REGISTRY", "Attribute", "Input", "Op", "Output", "When", "register"]
