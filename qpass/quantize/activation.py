"""Activations to int8: the arithmetic that reference, ONNX body and kernel share bit by bit.

q = clip(rint(x / scale) + zero, -128, 127) in float32, ties to even; a division, not a product with the reciprocal;
rounded before the zero point is added, as ONNX's QuantizeLinear has it. There is no zero point but where a model came
with one. A scale of 0 (nothing but zeros was seen) gives q = 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def scale_of(amax: Array) -> Array:
    """The scale that maps amax to 127, in float32."""
    return np.divide(amax, np.float32(127), dtype=np.float32)


def quantize(x: Array, scale: Array, zero: Array | None = None) -> Array:
    """x [..., K] float32 as int8, by scales and int8 zero points that broadcast against it."""
    unless_zero = np.where(scale == 0, np.float32(np.inf), scale)
    with np.errstate(over="ignore"):  # beyond float32 is beyond 127
        q = np.divide(x, unless_zero, dtype=np.float32)
    np.rint(q, out=q)
    if zero is not None:
        q += zero.astype(np.float32)
    np.clip(q, -128, 127, out=q)
    return q.astype(np.int8)


def quantize_per_token(x: Array) -> tuple[Array, Array]:
    """x [..., K] float32 as int8 [..., K] and a float32 scale [..., 1], amax / 127, per token."""
    scale = scale_of(np.max(np.abs(x), axis=-1, keepdims=True))
    return quantize(x, scale), scale
