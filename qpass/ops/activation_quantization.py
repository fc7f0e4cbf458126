"""ActivationQuantization: an MLP's activation, gated or not, and the quantization of its result in one op."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np

from qpass.ops import quantized_result
from qpass.ops.base import Array, Attr, Attribute, Input, Op, When, flag
from qpass.ops.body import Body, Value


class Activation(IntEnum):
    """What `activation` may be. In a formula sigmoid(x) is 1 / (1 + exp(-x))."""

    GELU = 0
    """x · (1 + erf(x / √2)) / 2 (Hendrycks and Gimpel 2016)."""
    GELU_TANH = 1
    """x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2, the same paper's approximation."""
    QUICK_GELU = 2
    """x · sigmoid(1.702 · x), their coarser one."""
    RELU = 3
    """max(x, 0)"""
    SILU = 4
    """x · sigmoid(x), also called swish (Ramachandran et al. 2017)."""
    RELU2 = 5
    """max(x, 0)² (So et al. 2021, "Primer")."""
    SIGMOID = 6
    """sigmoid(x): as the gate of a GLU (Dauphin et al. 2016)."""


ROOT_HALF = float(np.float32(math.sqrt(0.5)))
ROOT_2_OVER_PI = float(np.float32(math.sqrt(2 / math.pi)))
CUBIC = float(np.float32(0.044715))
QUICK = float(np.float32(1.702))


class ActivationQuantization(Op):
    doc = "y = activation(x) (· up); q = clip(rint(y / smoother / scale) + zero, -128, 127); computed in float32"
    inputs = (
        Input("x", "T", "... K"),
        Input("up", "T", "... K", When("gated"), tag="gated"),
        *quantized_result.INPUTS,
    )
    outputs = quantized_result.OUTPUTS
    attributes = (
        Attribute(
            "activation",
            int,
            ", ".join(f"{a.value} {a.name.lower()}" for a in Activation),
            allowed=tuple(a.value for a in Activation),
            tags={a.value: a.name.lower() for a in Activation},
        ),
        flag("gated", "the activation of x is multiplied by up"),
        *quantized_result.FLAGS,
    )

    def build(self, b: Body) -> Sequence[Value]:
        y = _build(b, b.float32("x"))
        if b.get("up"):
            y = y * b.float32("up")
        return quantized_result.build(b, y)

    def compute(self, given: Mapping[str, Array], attrs: Mapping[str, Attr]) -> Sequence[Array]:
        y = activate(given["x"], Activation(int(attrs["activation"])))
        if "up" in given:
            y = y * given["up"]
        return quantized_result.compute(given, attrs, y)


def activate(x: Array, kind: Activation) -> Array:
    """An activation of x, float32, in float32."""
    one, half = np.float32(1), np.float32(0.5)
    if kind is Activation.GELU:
        erf = np.vectorize(math.erf, otypes=[np.float32])(x * np.float32(ROOT_HALF)) if x.size else x
        return np.asarray(x * (half + half * erf))
    if kind is Activation.GELU_TANH:
        inner = np.float32(ROOT_2_OVER_PI) * (x * (one + np.float32(CUBIC) * (x * x)))
        return np.asarray(x * (half + half * np.tanh(inner)))
    if kind in (Activation.RELU, Activation.RELU2):
        positive = np.maximum(x, np.float32(0))
        return np.asarray(positive if kind is Activation.RELU else positive * positive)
    factor = np.float32(QUICK) if kind is Activation.QUICK_GELU else one
    with np.errstate(over="ignore"):  # exp(-x) is infinite where the sigmoid is 0
        below = one + np.exp(-(x * factor))
    return np.asarray((one if kind is Activation.SIGMOID else x) / below)


def _build(b: Body, x: Value) -> Value:
    """The same in ONNX.

    Written so that ONNX Runtime sees no Gelu, FastGelu or QuickGelu of its own, nor a 1 / a · b to make b / a of: those
    round differently.
    """
    kind = Activation(int(b.attrs["activation"]))
    if kind is Activation.GELU:
        return x * (b.node("Erf", x * ROOT_HALF) * 0.5 + 0.5)
    if kind is Activation.GELU_TANH:
        inner = x * (x * x * CUBIC + 1.0) * ROOT_2_OVER_PI
        return x * (b.node("Tanh", inner) * 0.5 + 0.5)
    if kind in (Activation.RELU, Activation.RELU2):
        positive = b.node("Relu", x)
        return positive if kind is Activation.RELU else positive * positive
    scaled = x * QUICK if kind is Activation.QUICK_GELU else x
    below = b.node("Exp", b.node("Neg", scaled)) + 1.0
    return b.node("Reciprocal", below) if kind is Activation.SIGMOID else x / below
