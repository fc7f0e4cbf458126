"""Bodies: the meaning of an op in standard ONNX ops, valid at the opset of the model that it goes into.

A body computes in float32. It has no branches: what depends on an attribute or on which tensors are there is
decided when it is generated. Its few float constants (127, 16, 8, 1) are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

FLOATS: Mapping[np.dtype[Any], str] = {
    np.dtype(np.float32): "f32",
    np.dtype(np.float16): "f16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
}
"""Dtypes of activations, and what overloads call them."""

FIRST_OPSET = 13
"""The first with bfloat16, per-axis quantization and axes of Unsqueeze as an input."""
_REDUCE_AXES_AS_INPUT = 18
EVERYTHING = 2**31 - 1
"""As the end of a Slice that has none."""


@dataclass(frozen=True)
class Value:
    """A tensor of a body; arithmetic on it adds nodes."""

    body: Body
    name: str

    def __add__(self, other: Value | float) -> Value:
        return self.body.node("Add", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self.body.node("Sub", self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self.body.node("Mul", self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self.body.node("Div", self, other)


class Body:
    """The nodes of one body.

    Args:
        inputs: names of the inputs that are there; `body["x"]` is one, `body.get("bias")` one or None.
        attrs: the attributes of the op's node.
        opset: the model's version of the default domain.
        t: the dtype of the node's T, None where it has none.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        attrs: Mapping[str, int | float | str],
        opset: int,
        t: np.dtype[Any] | None = None,
    ) -> None:
        if not FIRST_OPSET <= opset <= onnx.defs.onnx_opset_version():
            raise ValueError(f"opset {opset} is not supported: {FIRST_OPSET} to {onnx.defs.onnx_opset_version()} are")
        self.attrs = attrs
        self.opset = opset
        self.t = t
        self._inputs = {name: Value(self, name) for name in inputs}
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def __getitem__(self, name: str) -> Value:
        return self._inputs[name]

    def get(self, name: str) -> Value | None:
        return self._inputs.get(name)

    def node(self, op_type: str, *inputs: Value | float, **attrs: Any) -> Value:
        """A standard node with one output. Numbers become float32 constants."""
        names = [(i if isinstance(i, Value) else self.constant(np.float32(i))).name for i in inputs]
        out = Value(self, f"{op_type.lower()}_{len(self._nodes)}")
        self._nodes.append(helper.make_node(op_type, names, [out.name], **attrs))
        return out

    def constant(self, value: NDArray[Any] | np.generic) -> Value:
        array = np.asarray(value)
        key = str(array.dtype), array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self.node("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def attribute(self, name: str) -> Value:
        """A float attribute of the node as a scalar, whatever its value."""
        out = self.node("Constant")
        self._nodes[-1].attribute.add(name="value_float", type=AttributeProto.FLOAT, ref_attr_name=name)
        return out

    def float32(self, name: str) -> Value:
        """A floating-point input, computed with in float32."""
        return self.node("Cast", self[name], to=TensorProto.FLOAT)

    def rounded(self, x: Value) -> Value:
        """x as the node's T can hold it, in float32."""
        if self.t is None or self.t == np.float32:
            return x
        narrow = self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(self.t))
        return self.node("Cast", narrow, to=TensorProto.FLOAT)

    def from_int8(self, x: Value) -> Value:
        """Integers as floats of the same value.

        By DequantizeLinear, since TensorRT casts no int8. Round changes no integer: behind it ONNX Runtime leaves
        the DequantizeLinear alone. It would move one forward through reshapes, by way of uint8, and before a
        MatMul make them a MatMulNBits, which quantizes the other operand (errors of 6e-3).
        """
        return self.node("Round", self.node("DequantizeLinear", x, 1.0))

    def to_int8(self, x: Value, scale: Value, zero: Value | None = None) -> Value:
        """clip(rint(x / scale) + zero, -128, 127), ties to even; zero, or 0, where scale is 0.

        The zero point is added by hand: TensorRT's own quantization has none.
        """
        unless_zero = self.node("Where", self.node("Equal", scale, 0.0), np.inf, scale)
        q = x / unless_zero
        if zero is not None:
            q = self.node("Round", q) + self.from_int8(zero)
        return self.node("QuantizeLinear", q, 1.0, self.constant(np.int8(0)))

    def over_last(self, reduce: str, x: Value) -> Value:
        """ReduceMax or ReduceMean over the last axis, which is kept."""
        if self.opset < _REDUCE_AXES_AS_INPUT:
            return self.node(reduce, x, axes=[-1], keepdims=1)
        return self.node(reduce, x, self.constant(np.array([-1])), keepdims=1)

    def per_token(self, x: Value) -> tuple[Value, Value]:
        """x as int8 with one scale per token, and the scales."""
        scale = self.over_last("ReduceMax", self.node("Abs", x)) / 127.0
        return self.to_int8(x, scale), scale

    def column(self, x: Value) -> Value:
        """[…] → […, 1]"""
        return self.node("Unsqueeze", x, self.constant(np.array([-1])))

    def reshape(self, x: Value, *shape: int) -> Value:
        return self.node("Reshape", x, self.constant(np.array(shape)))

    def unpack_int4(self, packed: Value) -> Value:
        """Packed int4 [N, K/2] as floats [N, K]."""
        return self.reshape(self.int4_pairs(packed), 0, -1)

    def int4_pairs(self, packed: Value) -> Value:
        """Two's complement pairs [..., K/2], the even element in the low nibble, as floats [..., K/2, 2].

        byte = 16·high + (low mod 16) with low in [-8, 7], so high = floor(byte / 16), and
        low = byte - 16·floor((byte + 8) / 16).
        """
        byte = self.from_int8(packed)
        low = byte - self.node("Floor", (byte + 8.0) / 16.0) * 16.0
        high = self.node("Floor", byte / 16.0)
        return self.node("Concat", self.column(low), self.column(high), axis=-1)

    def dims(self, x: Value, start: int, stop: int | None = None) -> Value:
        """Dims start..stop of x, int64."""
        bounds = (self.constant(np.array([i])) for i in (start, EVERYTHING if stop is None else stop))
        return self.node("Slice", self.node("Shape", x), *bounds)

    def times_transposed(self, x: Value, w: Value) -> Value:
        """x [..., K] · wᵀ of w [N, K]."""
        return self.node("MatMul", x, self.node("Transpose", w, perm=[1, 0]))

    def function(
        self,
        domain: str,
        name: str,
        overload: str,
        doc: str,
        attributes: Sequence[str],
        outputs: Mapping[str, Value],
    ) -> FunctionProto:
        """The finished function; `outputs` in order, each of a value of its own."""
        names = {value.name: output for output, value in outputs.items()}
        for node in self._nodes:
            node.input[:] = [names.get(n, n) for n in node.input]
            node.output[:] = [names.get(n, n) for n in node.output]
        return helper.make_function(
            domain,
            name,
            list(self._inputs),
            list(outputs),
            self._nodes,
            [helper.make_opsetid("", self.opset)],
            attributes=attributes,
            overload=overload,
            doc_string=doc,
        )
