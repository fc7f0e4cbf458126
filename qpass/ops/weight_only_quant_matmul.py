"""WeightOnlyQuantMatmul: int8 or int4 weights with a scale, and maybe a zero, per output channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpass.ops.base import Array, Attr, Attribute, Input, Op, Output, When, flag
from qpass.ops.body import Body, Value
from qpass.ops.shapes import Case
from qpass.quantize.pack import unpack_int4

INT8, INT4 = 1, 2


class WeightOnlyQuantMatmul(Op):
    doc = "y = x · ((weight - zero) · scale)ᵀ + bias"
    inputs = (
        Input("x", "T", "... K"),
        Input("weight", "int8", Case("weight_type_id", {INT8: "N K", INT4: "N K/2"})),
        Input("scale", "float32", "N"),
        Input("zero", "int8", "N", When("has_zero")),
        Input("bias", "T", "N", When("has_bias")),
    )
    outputs = (Output("y", "T", "... N"),)
    attributes = (
        Attribute("weight_type_id", int, "1: int8; 2: int4", None, (INT8, INT4), {INT8: "int8", INT4: "int4"}),
        flag("has_zero", "rows of the weight have zero points"),
        flag("has_bias", "a bias is added"),
    )

    def build(self, b: Body) -> Sequence[Value]:
        int4 = b.attrs["weight_type_id"] == INT4
        weight = b.unpack_int4(b["weight"]) if int4 else b.from_int8(b["weight"])
        if zero := b.get("zero"):
            weight = weight - b.column(b.from_int8(zero))
        y = b.times_transposed(b.float32("x"), weight * b.column(b["scale"]))
        return [y + b.float32("bias") if b.get("bias") else y]

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        weight = unpack_int4(given["weight"]) if attrs["weight_type_id"] == INT4 else given["weight"]
        weight = weight.astype(np.float32)
        if "zero" in given:
            weight = weight - given["zero"].astype(np.float32)[:, None]
        scaled = weight * given["scale"][:, None]
        y = (given["x"].astype(np.float64) @ scaled.astype(np.float64).T).astype(np.float32)
        return [y + given["bias"] if "bias" in given else y]
