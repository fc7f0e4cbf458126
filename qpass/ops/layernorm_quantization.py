"""LayernormQuantization: LayerNorm and the quantization of its result in one op."""

from __future__ import annotations

import numpy as np

from qpass.ops.base import Array
from qpass.ops.body import Body, Value
from qpass.ops.norm_quantization import NormQuantization


class LayernormQuantization(NormQuantization):
    doc = (
        "y = (x - mean(x)) / sqrt(var(x) + epsilon) · gamma + beta over the last axis; "
        "q = clip(rint(y / smoother / scale) + zero, -128, 127)"
    )

    def build_norm(self, b: Body, x: Value) -> Value:
        d = x - b.over_last("ReduceMean", x)
        variance = b.over_last("ReduceMean", d * d)  # with a Pow ONNX Runtime would fuse a LayerNorm of its own
        return d / b.node("Sqrt", variance + b.attribute("epsilon"))

    def compute_norm(self, x: Array, epsilon: np.float32) -> Array:
        d = x - np.mean(x, axis=-1, keepdims=True)
        variance = np.mean(d * d, axis=-1, keepdims=True)
        return np.asarray(d / np.sqrt(variance + epsilon))
