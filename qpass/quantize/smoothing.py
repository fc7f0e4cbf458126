"""SmoothQuant's smoother, and the error that a choice of smoother and scale makes on sample rows.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.quantize.activation import quantize, quantize_per_token, scale_of

Array = NDArray[Any]

FLOOR = 1e-3
"""Channels that calibration saw at less than this part of the largest are smoothed as if they had it: text that was
not in the calibration may well wake them, and a tiny smoother would then blow them up."""


def smoother(activation_amax: Array, weight_amax: Array, strength: float) -> Array:
    """s = amax(x)^α / amax(w)^(1 − α) for each input channel (eq. 4), scaled so that its geometric mean is 1.

    The activation is divided by s and the weights are multiplied by it. A channel whose weights are all zero gets 1.

    Args:
        activation_amax: [K], largest |x| of each channel.
        weight_amax: [K], largest |w| of each input channel over all Linears that read x.
        strength: α in [0, 1]; 1 moves all of the difficulty into the weights.

    Returns:
        float32 [K], positive and finite.
    """
    x = activation_amax.astype(np.float64)
    w = weight_amax.astype(np.float64)
    x = np.maximum(x, FLOOR * x.max(initial=0))
    live = (x > 0) & (w > 0)
    s = np.ones(x.shape)
    s[live] = x[live] ** strength / w[live] ** (1 - strength)
    if live.any():
        s[live] /= np.exp(np.log(s[live]).mean())
    return np.clip(s, 1e-4, 1e4).astype(np.float32)


class OutputError:
    """‖X·Wᵀ − quantized(X)·quantized(W)ᵀ‖ / ‖X·Wᵀ‖ over several weights, for any smoother and scale.

    Args:
        rows: X, float32 [R, K], tokens of the activation.
        weights: float32 [n, K] each, output channels of every Linear that reads it.
    """

    def __init__(self, rows: Array, weights: Sequence[Array]) -> None:
        self.rows = rows
        self.weight = np.concatenate(list(weights))
        self.wanted = rows @ self.weight.T
        self.norm = float(np.linalg.norm(self.wanted)) or 1.0
        self._quantized: tuple[Array | None, Array] | None = None

    def of(self, smoother: Array | None = None, scale: float | None = None) -> float:
        """The relative error.

        Args:
            smoother: float32 [K] or None.
            scale: a static scale of the smoothed activation; None for one a token.
        """
        x = self.rows if smoother is None else self.rows / smoother
        if scale is None:
            q, scales = quantize_per_token(x)
        else:
            scales = np.array([scale], np.float32)
            q = quantize(x, scales)
        got = (q.astype(np.float32) * scales) @ self._weights(smoother).T
        return float(np.linalg.norm(got - self.wanted)) / self.norm

    def _weights(self, smoother: Array | None) -> Array:
        """The weights as int8 per output channel would have them, kept while the smoother stays."""
        if self._quantized is None or self._quantized[0] is not smoother:
            w = self.weight if smoother is None else self.weight * smoother
            scale = scale_of(np.abs(w).max(axis=1, keepdims=True))
            self._quantized = smoother, quantize(w, scale) * scale
        return self._quantized[1]
