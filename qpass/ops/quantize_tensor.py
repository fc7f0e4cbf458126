"""QuantizeTensor: an activation to int8 with one scale known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpass.ops.base import Array, Attr, Input, Op, Output, When, flag
from qpass.ops.body import Body, Value
from qpass.quantize.activation import quantize


class QuantizeTensor(Op):
    doc = "q = clip(rint(x / smoother / scale) + zero, -128, 127)"
    inputs = (
        Input("x", "T", "... K"),
        Input("smoother", "float32", "K", When("has_smoother")),
        Input("scale", "float32", "1"),
        Input("zero", "int8", "1", When("has_zero")),
    )
    outputs = (Output("q", "int8", "... K"),)
    attributes = (
        flag("has_smoother", "x is divided by a smoother first"),
        flag("has_zero", "a zero point is added to the rounded values"),
    )

    def build(self, b: Body) -> Sequence[Value]:
        x = b.float32("x")
        if smoother := b.get("smoother"):
            x = x / smoother
        return [b.to_int8(x, b["scale"], b.get("zero"))]

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        x = given["x"]
        if "smoother" in given:
            x = x / given["smoother"]
        return [quantize(x, given["scale"], given.get("zero"))]
