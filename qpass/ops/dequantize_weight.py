"""DequantizeWeight: int8 or int4 weights back to floating point, such as those gathered for a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpass.ops.base import OUTPUT_TYPE, Array, Attr, Attribute, Input, Op, Output, When, flag
from qpass.ops.body import Body, Value
from qpass.ops.shapes import Case
from qpass.ops.weight_only_groupwise_quant_matmul import GROUP_SIZES
from qpass.ops.weight_only_quant_matmul import INT4, INT8
from qpass.quantize.pack import unpack_int4

PER_CHANNEL = 0
"""As the group size: a scale for each output channel."""

_SCALES = Case("group_size", {PER_CHANNEL: "... N", **dict.fromkeys(GROUP_SIZES, "... N K/group_size")})


class DequantizeWeight(Op):
    doc = "w = (weight - zero) · scale, per output channel or per group of K values"
    inputs = (
        Input("weight", "int8", Case("weight_type_id", {INT8: "... N K", INT4: "... N K/2"})),
        Input("scale", "float32", _SCALES),
        Input("zero", "int8", _SCALES, When("has_zero")),
    )
    outputs = (Output("w", "output_type", "... N K"),)
    attributes = (
        OUTPUT_TYPE,
        Attribute("weight_type_id", int, "1: int8; 2: int4", None, (INT8, INT4), {INT8: "int8", INT4: "int4"}),
        Attribute(
            "group_size",
            int,
            "K values that share a scale; 0: one scale per output channel",
            PER_CHANNEL,
            (PER_CHANNEL, *GROUP_SIZES),
            {PER_CHANNEL: "channel", **{g: f"g{g}" for g in GROUP_SIZES}},
        ),
        flag("has_zero", "zero points are subtracted"),
    )

    def build(self, b: Body) -> Sequence[Value]:
        """Every Reshape keeps the leading dims in their places, so its zeros ("as it was") hold for empty ones too."""
        group = int(b.attrs["group_size"])
        if b.attrs["weight_type_id"] == INT4:
            codes = b.int4_pairs(b["weight"])  # [..., N, K/2, 2]
            k = b.node("Mul", b.dims(codes, -2, -1), b.constant(np.array([2])))
            full = b.node("Concat", b.dims(codes, 0, -2), k, axis=0)
        else:
            codes = b.from_int8(b["weight"])
            full = b.node("Shape", codes)
        scale, zero = b["scale"], b.get("zero")
        zero = None if zero is None else b.from_int8(zero)
        if group:
            grouped = b.node("Concat", b.node("Shape", scale), b.constant(np.array([group])), axis=0)
            codes = b.node("Reshape", codes, grouped)
        if group or b.attrs["weight_type_id"] == INT8:
            scale, zero = b.column(scale), None if zero is None else b.column(zero)
        else:
            scale, zero = b.column(b.column(scale)), None if zero is None else b.column(b.column(zero))
        w = (codes if zero is None else codes - zero) * scale
        flat = not group and b.attrs["weight_type_id"] == INT8
        return [w if flat else b.node("Reshape", w, full)]

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        codes, scale = given["weight"], given["scale"]
        codes = (unpack_int4(codes) if attrs["weight_type_id"] == INT4 else codes).astype(np.float32)
        shape, group = codes.shape, int(attrs["group_size"]) or codes.shape[-1]
        codes = codes.reshape(*shape[:-1], shape[-1] // group, group)
        scale = scale.reshape(*codes.shape[:-1], 1)
        if "zero" in given:
            codes = codes - given["zero"].astype(np.float32).reshape(scale.shape)
        return [(codes * scale).reshape(shape)]
