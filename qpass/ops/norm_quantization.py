"""LayernormQuantization and RmsnormQuantization: a norm and the quantization of its result in one op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpass.ops import quantized_result
from qpass.ops.base import Array, Attr, Tensors
from qpass.ops.body import Body, Value
from qpass.ops.norm import Layernorm, Norm, Rmsnorm

_QUANTIZED = "q = clip(rint(y / smoother / scale) + zero, -128, 127)"


class NormQuantization(Norm):
    """A norm that gives q = quantize(y / smoother), and y itself where that is asked for."""

    inputs = (*Norm.inputs, *quantized_result.INPUTS)
    outputs = (*quantized_result.OUTPUTS, Norm.outputs[-1])
    attributes = (*Norm.attributes[:-1], *quantized_result.FLAGS, Norm.attributes[-1])

    def build_results(self, b: Body, y: Value) -> Sequence[Value]:
        return quantized_result.build(b, y)

    def compute_results(self, given: Tensors, attrs: Mapping[str, Attr], y: Array) -> Sequence[Array]:
        return quantized_result.compute(given, attrs, y)


class LayernormQuantization(NormQuantization, Layernorm):
    doc = f"{Layernorm.doc}; {_QUANTIZED}"


class RmsnormQuantization(NormQuantization, Rmsnorm):
    doc = f"{Rmsnorm.doc}; {_QUANTIZED}"
