"""QuantizePerToken: an activation to int8 with a scale per token, taken from its own amax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpass.ops.base import Array, Attr, Input, Op, Output, When, flag
from qpass.ops.body import Body, Value
from qpass.quantize.activation import quantize_per_token


class QuantizePerToken(Op):
    doc = "scale = max|x / smoother| / 127 over the last axis; q = clip(rint(x / smoother / scale), -128, 127)"
    inputs = (
        Input("x", "T", "... K"),
        Input("smoother", "float32", "K", When("has_smoother")),
    )
    outputs = (
        Output("q", "int8", "... K"),
        Output("scale", "float32", "... 1"),
    )
    attributes = (flag("has_smoother", "x is divided by a smoother first"),)

    def build(self, b: Body) -> Sequence[Value]:
        x = b.float32("x")
        if smoother := b.get("smoother"):
            x = x / smoother
        return b.per_token(x)

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        x = given["x"]
        if "smoother" in given:
            x = x / given["smoother"]
        return quantize_per_token(x)
