"""What every norm op shares: the sum before the norm, the norm, its gamma and beta; and the two kinds of statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from qpass.ops.base import EPSILON, Array, Attr, Attribute, Input, Op, Output, Tensors, When, flag
from qpass.ops.body import Body, Value


class Norm(Op):
    """y = norm(x + residual) · gamma + beta, statistics in float32."""

    inputs: ClassVar[tuple[Input, ...]] = (
        Input("x", "T", "... K"),
        Input("residual", "T", "~... K", When("has_residual")),
        Input("gamma", "T", "K"),
        Input("beta", "T", "K", When("has_beta")),
    )
    outputs: ClassVar[tuple[Output, ...]] = (
        Output("y", "T", "... K"),
        Output("sum", "T", "... K", When("has_sum"), needs="residual"),
    )
    attributes: ClassVar[tuple[Attribute, ...]] = (
        EPSILON,
        flag("has_residual", "a residual is added to x, broadcasting over the leading dims, before the norm"),
        flag("has_beta", "the norm adds a beta"),
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
        return [*self.build_results(b, y), *([x] if b.attrs["has_sum"] else [])]

    def compute(self, given: Tensors, attrs: Mapping[str, Attr]) -> Sequence[Array]:
        x = given["x"]
        if "residual" in given:
            x = (x + given["residual"]).astype(given.t).astype(np.float32)
        y = self.compute_norm(x, np.float32(attrs["epsilon"])) * given["gamma"]
        if "beta" in given:
            y = y + given["beta"]
        return [*self.compute_results(given, attrs, y), *([x] if attrs["has_sum"] else [])]

    def build_results(self, b: Body, y: Value) -> Sequence[Value]:
        """What becomes of the norm: the present outputs but for the sum."""
        return [y]

    def compute_results(self, given: Tensors, attrs: Mapping[str, Attr], y: Array) -> Sequence[Array]:
        """The same in NumPy."""
        return [y]


class Layernorm(Norm):
    """Ba, Kiros and Hinton 2016, "Layer Normalization", as ONNX's LayerNormalization has it over the last axis."""

    doc = "y = (x - mean(x)) / sqrt(var(x) + epsilon) · gamma + beta over the last axis"

    def build_norm(self, b: Body, x: Value) -> Value:
        d = x - b.over_last("ReduceMean", x)
        variance = b.over_last("ReduceMean", d * d)  # with a Pow ONNX Runtime would fuse a LayerNorm of its own
        return d / b.node("Sqrt", variance + b.attribute("epsilon"))

    def compute_norm(self, x: Array, epsilon: np.float32) -> Array:
        d = x - np.mean(x, axis=-1, keepdims=True)
        variance = np.mean(d * d, axis=-1, keepdims=True)
        return np.asarray(d / np.sqrt(variance + epsilon))


class Rmsnorm(Norm):
    """Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", as ONNX's RMSNormalization has it."""

    doc = "y = x / sqrt(mean(x²) + epsilon) · gamma + beta over the last axis"

    def build_norm(self, b: Body, x: Value) -> Value:
        mean_square = b.over_last("ReduceMean", x * x)  # with a Pow ONNX Runtime would fuse a norm of its own
        return x / b.node("Sqrt", mean_square + b.attribute("epsilon"))

    def compute_norm(self, x: Array, epsilon: np.float32) -> Array:
        return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon))
