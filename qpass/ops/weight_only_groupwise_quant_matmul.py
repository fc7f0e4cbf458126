"""WeightOnlyGroupwiseQuantMatmul: int4 or int8 weights with a scale, and maybe a zero, per group of K values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpass.ops.base import Array, Attr, Attribute, Input, Op, Output, When
from qpass.ops.body import Body, Value
from qpass.ops.shapes import Case
from qpass.ops.weight_only_quant_matmul import INT4, INT8
from qpass.quantize.pack import unpack_int4

GROUP_SIZES = (32, 64, 128)


class WeightOnlyGroupwiseQuantMatmul(Op):
    doc = "y = (x · pre_quant_scale) · ((weight - zero) · scale)ᵀ + bias"
    inputs = (
        Input("x", "T", "... K"),
        Input("pre_quant_scale", "float32", "K", When("quant_algo", 4)),
        Input("weight", "int8", Case("weight_type_id", {INT8: "N K", INT4: "N K/2"})),
        Input("scale", "float32", "N K/group_size"),
        Input("zero", "int8", "N K/group_size", When("quant_algo", 2)),
        Input("bias", "T", "N", When("quant_algo", 1)),
    )
    outputs = (Output("y", "T", "... N"),)
    attributes = (
        Attribute("quant_algo", int, "4 · pre_quant_scale + 2 · zero + 1 · bias", allowed=tuple(range(8))),
        Attribute(
            "group_size",
            int,
            "K values that share a scale",
            None,
            GROUP_SIZES,
            {g: f"g{g}" for g in GROUP_SIZES},
        ),
        Attribute("weight_type_id", int, "1: int8; 2: int4", INT4, (INT8, INT4), {INT8: "int8", INT4: "int4"}),
    )

    def build(self, b: Body) -> Sequence[Value]:
        x = b.float32("x")
        if pre_quant_scale := b.get("pre_quant_scale"):
            x = x * pre_quant_scale
        int4 = b.attrs["weight_type_id"] == INT4
        weight = b.unpack_int4(b["weight"]) if int4 else b.from_int8(b["weight"])
        groups = b.reshape(weight, 0, -1, int(b.attrs["group_size"]))
        if zero := b.get("zero"):
            groups = groups - b.column(b.from_int8(zero))
        weight = b.reshape(groups * b.column(b["scale"]), 0, -1)
        y = b.times_transposed(x, weight)
        return [y + b.float32("bias") if b.get("bias") else y]

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        x, scale = given["x"], given["scale"]
        if "pre_quant_scale" in given:
            x = x * given["pre_quant_scale"]
        weight = unpack_int4(given["weight"]) if attrs["weight_type_id"] == INT4 else given["weight"]
        groups = weight.astype(np.float32).reshape(*scale.shape, -1)
        if "zero" in given:
            groups = groups - given["zero"].astype(np.float32)[..., None]
        weight = (groups * scale[..., None]).reshape(len(scale), -1)
        y = (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)
        return [y + given["bias"] if "bias" in given else y]
