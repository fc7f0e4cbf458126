"""SmoothQuantGemm: int8 activations × int8 weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpass.ops.base import OUTPUT_TYPE, Array, Attr, Attribute, Input, Op, Output, When, flag
from qpass.ops.body import Body, Value
from qpass.ops.shapes import Case


class SmoothQuantGemm(Op):
    doc = "y = (q · weightᵀ in int32) · scale_a · scale_w + bias"
    inputs = (
        Input("q", "int8", "... K"),
        Input("weight", "int8", "N K"),
        Input("scale_a", "float32", Case("has_per_token_scaling", {0: "1", 1: "... 1"})),
        Input("scale_w", "float32", Case("has_per_channel_scaling", {0: "1", 1: "N"})),
        Input("bias", "output_type", "N", When("has_bias")),
    )
    outputs = (Output("y", "output_type", "... N"),)
    attributes = (
        OUTPUT_TYPE,
        Attribute("has_per_token_scaling", int, "1: scale_a is per token; 0: one for all", 1, (0, 1)),
        Attribute("has_per_channel_scaling", int, "1: scale_w is per row of weight; 0: one for all", 1, (0, 1)),
        flag("has_bias", "a bias is added"),
    )

    def build(self, b: Body) -> Sequence[Value]:
        # Integers add up exactly in float32 up to 2^24, further than the sums of real layers go.
        sums = b.times_transposed(b.from_int8(b["q"]), b.from_int8(b["weight"]))
        y = sums * b["scale_a"] * b["scale_w"]
        return [y + b.float32("bias") if b.get("bias") else y]

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        # int32 sums, computed in float64 where they are exact and NumPy is fast
        sums = (given["q"].astype(np.float64) @ given["weight"].astype(np.float64).T).astype(np.int32)
        y = sums.astype(np.float32) * given["scale_a"] * given["scale_w"]
        return [y + given["bias"] if "bias" in given else y]
