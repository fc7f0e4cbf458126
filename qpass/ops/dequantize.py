"""Dequantize: int8 activations back to floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpass.ops.base import OUTPUT_TYPE, Array, Attr, Input, Op, Output
from qpass.ops.body import Body, Value


class Dequantize(Op):
    doc = "x = q · scale, per token or per tensor"
    inputs = (
        Input("q", "int8", "... K"),
        Input("scale", "float32", "... 1 | 1"),
    )
    outputs = (Output("x", "output_type", "... K"),)
    attributes = (OUTPUT_TYPE,)

    def build(self, b: Body) -> Sequence[Value]:
        return [b.from_int8(b["q"]) * b["scale"]]

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        return [given["q"].astype(np.float32) * given["scale"]]
