"""What the ops share that quantize their own result y: the tensors, the flags, and the last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpass.ops.base import Array, Input, Output, When, flag
from qpass.ops.body import Body, Value
from qpass.quantize.activation import quantize, quantize_per_token

INPUTS = (
    Input("smoother", "float32", "K", When("has_smoother")),
    Input("scale", "float32", "1", When("dyn_act_scaling", on=False), tag="static"),
    Input("zero", "int8", "1", When("has_zero"), needs="scale"),
)
OUTPUTS = (
    Output("q", "int8", "... K"),
    Output("scale", "float32", "... 1", When("dyn_act_scaling"), tag="per_token"),
    Output("y", "T", "... K", When("has_y")),
)
FLAGS = (
    flag("has_smoother", "y is divided by a smoother before it is quantized"),
    flag("dyn_act_scaling", "1: a scale per token is an output; 0: one scale is an input"),
    flag("has_zero", "a zero point is added to the rounded values, for an asymmetric range; only with a static scale"),
    flag("has_y", "y is an output too, without the smoother, for whoever else needs it"),
)


def build(b: Body, y: Value) -> list[Value]:
    """The present OUTPUTS of y."""
    smoother, scale = b.get("smoother"), b.get("scale")
    smoothed = y / smoother if smoother else y
    quantized = [b.to_int8(smoothed, scale, b.get("zero"))] if scale else b.per_token(smoothed)
    return [*quantized, *([y] if b.attrs["has_y"] else [])]


def compute(given: Mapping[str, Array], attrs: Mapping[str, Any], y: Array) -> list[Array]:
    """The same in NumPy."""
    smoothed = y / given["smoother"] if "smoother" in given else y
    if "scale" in given:
        quantized = [quantize(smoothed, given["scale"], given.get("zero"))]
    else:
        quantized = list(quantize_per_token(smoothed))
    return [*quantized, *([y] if attrs["has_y"] else [])]
