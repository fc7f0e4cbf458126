"""RmsnormQuantization: RMSNorm and the quantization of its result in one op."""

from __future__ import annotations

import numpy as np

from qpass.ops.base import Array
from qpass.ops.body import Body, Value
from qpass.ops.norm_quantization import NormQuantization


class RmsnormQuantization(NormQuantization):
    doc = (
        "y = x / sqrt(mean(x²) + epsilon) · gamma + beta over the last axis; "
        "q = clip(rint(y / smoother / scale) + zero, -128, 127)"
    )

    def build_norm(self, b: Body, x: Value) -> Value:
        mean_square = b.over_last("ReduceMean", x * x)  # with a Pow ONNX Runtime would fuse a norm of its own
        return x / b.node("Sqrt", mean_square + b.attribute("epsilon"))

    def compute_norm(self, x: Array, epsilon: np.float32) -> Array:
        return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon))
