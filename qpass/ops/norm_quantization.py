"""What LayernormQuantization and RmsnormQuantization share: everything but the norm's statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from qpass.ops.base import EPSILON, Array, Attr, Input, Op, Output, Tensors, When, flag
from qpass.ops.body import Body, Value
from qpass.quantize.activation import quantize, quantize_per_token


class NormQuantization(Op):
    """y = norm(x) · gamma + beta, statistics in float32; q = quantize(y / smoother)."""

    inputs = (
        Input("x", "T", "... K"),
        Input("residual", "T", "~... K", When("has_residual")),
        Input("gamma", "T", "K"),
        Input("beta", "T", "K", When("has_beta")),
        Input("smoother", "float32", "K", When("has_smoother")),
        Input("scale", "float32", "1", When("dyn_act_scaling", on=False), tag="static"),
        Input("zero", "int8", "1", When("has_zero"), needs="scale"),
    )
    outputs = (
        Output("q", "int8", "... K"),
        Output("scale", "float32", "... 1", When("dyn_act_scaling"), tag="per_token"),
        Output("y", "T", "... K", When("has_y")),
        Output("sum", "T", "... K", When("has_sum"), needs="residual"),
    )
    attributes = (
        EPSILON,
        flag("has_residual", "a residual is added to x, broadcasting over the leading dims, before the norm"),
        flag("has_beta", "the norm adds a beta"),
        flag("has_smoother", "y is divided by a smoother before it is quantized"),
        flag("dyn_act_scaling", "1: a scale per token is an output; 0: one scale is an input"),
        flag("has_zero", "a zero point is added to the rounded values; for static scales"),
        flag("has_y", "the norm's result is an output too, without the smoother, for a residual"),
        flag("has_sum", "x + residual is an output too, for the next residual"),
    )

    @abstractmethod
    def build_norm(self, b: Body, x: Value) -> Value:
        """x normalized, before gamma."""

    @abstractmethod
    def compute_norm(self, x: Array, epsilon: np.float32) -> Array:
        """The same in NumPy, x in float32."""

    def build(self, b: Body) -> Sequence[Value]:
        x = b.float32("x")
        if b.get("residual"):  # rounded before the norm, as the Add that it stands for does
            x = b.rounded(x + b.float32("residual"))
        y = self.build_norm(b, x) * b.float32("gamma")
        if b.get("beta"):
            y = y + b.float32("beta")
        smoother, scale = b.get("smoother"), b.get("scale")
        smoothed = y / smoother if smoother else y
        quantized = [b.to_int8(smoothed, scale, b.get("zero"))] if scale else b.per_token(smoothed)
        return [*quantized, *([y] if b.attrs["has_y"] else []), *([x] if b.attrs["has_sum"] else [])]

    def compute(self, given: Tensors, attrs: Mapping[str, Attr]) -> Sequence[Array]:
        x = given["x"]
        if "residual" in given:
            x = (x + given["residual"]).astype(given.t).astype(np.float32)
        y = self.compute_norm(x, np.float32(attrs["epsilon"])) * given["gamma"]
        if "beta" in given:
            y = y + given["beta"]
        smoothed = y / given["smoother"] if "smoother" in given else y
        if "scale" in given:
            quantized = [quantize(smoothed, given["scale"], given.get("zero"))]
        else:
            quantized = list(quantize_per_token(smoothed))
        return [*quantized, *([y] if attrs["has_y"] else []), *([x] if attrs["has_sum"] else [])]
