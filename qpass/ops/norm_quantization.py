"""What LayernormQuantization and RmsnormQuantization share: everything but the norm's statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from qpass.ops import quantized_result
from qpass.ops.base import EPSILON, Array, Attr, Input, Op, Output, Tensors, When, flag
from qpass.ops.body import Body, Value


class NormQuantization(Op):
    """y = norm(x) · gamma + beta, statistics in float32; q = quantize(y / smoother)."""

    inputs = (
        Input("x", "T", "... K"),
        Input("residual", "T", "~... K", When("has_residual")),
        Input("gamma", "T", "K"),
        Input("beta", "T", "K", When("has_beta")),
        *quantized_result.INPUTS,
    )
    outputs = (
        *quantized_result.OUTPUTS,
        Output("sum", "T", "... K", When("has_sum"), needs="residual"),
    )
    attributes = (
        EPSILON,
        flag("has_residual", "a residual is added to x, broadcasting over the leading dims, before the norm"),
        flag("has_beta", "the norm adds a beta"),
        *quantized_result.FLAGS,
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
        return [*quantized_result.build(b, y), *([x] if b.attrs["has_sum"] else [])]

    def compute(self, given: Tensors, attrs: Mapping[str, Attr]) -> Sequence[Array]:
        x = given["x"]
        if "residual" in given:
            x = (x + given["residual"]).astype(given.t).astype(np.float32)
        y = self.compute_norm(x, np.float32(attrs["epsilon"])) * given["gamma"]
        if "beta" in given:
            y = y + given["beta"]
        return [*quantized_result.compute(given, attrs, y), *([x] if attrs["has_sum"] else [])]
