"""Chooses, for one activation, the smoother and the static scale that err least on the calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate import ActivationStats
from qpass.graph import Const
from qpass.quantize import smoothing
from qpass.quantize.weight import amax as largest
from qpass.rules.weights import blocks, naming
from qpass.spec import LinearSpec

Array = NDArray[Any]

GRID = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Smoothing strengths that a search tries."""

CHANNELS = 256
"""Output channels of each weight that the error is measured on: enough to rank candidates, cheap for any model."""


@dataclass(frozen=True)
class Choice:
    """What was chosen: float32 smoother [K] or None, static scale or None, and why."""

    smoother: Array | None
    scale: float | None
    note: str


def choose(stats: ActivationStats, weights: Sequence[Const], spec: LinearSpec) -> Choice:
    """The candidate with the least relative error of the Linears' outputs on the sampled rows.

    Candidates are no smoothing and each strength that the spec names (Xiao et al. 2022, eq. 4), each with every static
    range that it allows.

    Args:
        stats: of the activation [.., K].
        weights: [K, N] each, all of the Linears that read it.
    """
    error_of = smoothing.OutputError(stats.rows.astype(np.float32), [_some_channels(w) for w in weights])
    strengths: tuple[float, ...] = ()
    if spec.smoothing is not None:
        strengths = GRID if spec.smoothing == "search" else (float(spec.smoothing),)
    weight_amax = np.max([channel_amax(w) for w in weights], axis=0) if strengths else np.empty(0)
    static = spec.needs_calibration
    best: tuple[float, Array | None, float | None, str] | None = None
    errors: dict[str, float] = {}
    for alpha in (None, *strengths):
        smoother = None if alpha is None else smoothing.smoother(stats.amax, weight_amax, alpha)
        name = "unsmoothed" if alpha is None else f"smoothing {alpha:g}"
        for label, scale in _ranges(stats, smoother, spec) if static else (("", None),):
            error = error_of.of(smoother, scale)
            full = f"{name}{label}"
            errors[full] = error
            if best is None or error < best[0]:
                best = (error, smoother, scale, full)
    assert best is not None
    error, smoother, scale, name = best
    note = f"{name}, error {error:.4f} on the calibration data"
    if smoother is None and strengths:
        rival = min((e, n) for n, e in errors.items() if not n.startswith("unsmoothed"))
        note += f"; {rival[1]} has {rival[0]:.4f}"
    return Choice(smoother, scale, note)


def _ranges(stats: ActivationStats, smoother: Array | None, spec: LinearSpec) -> list[tuple[str, float]]:
    """Static scales to try: the amax of the smoothed activation, and a percentile of it."""
    amax = float(np.max(stats.amax if smoother is None else stats.amax / smoother))
    out = []
    if spec.activation_range != "percentile":
        out.append((", range amax", amax / 127))
    if spec.activation_range != "amax":
        rows = stats.rows.astype(np.float32)
        seen = np.abs(rows if smoother is None else rows / smoother)
        cut = stats.percentile(spec.percentile) if smoother is None else float(np.percentile(seen, spec.percentile))
        out.append((f", range {spec.percentile:g} %", min(cut, amax) / 127))
    return out


def channel_amax(w: Const) -> Array:
    """max |w| of each input channel of a weight [K, N], float32 [K]."""
    with naming(w):
        return np.asarray(np.max([largest(b, axis=0) for b in blocks(w)], axis=0, initial=0))


def _some_channels(w: Const) -> Array:
    """CHANNELS output channels of a weight [K, N] as float32 [n, K], in runs spread over N."""
    n = w.shape[1]
    run = max(1, min(CHANNELS, n) // 8)
    starts = sorted({int(s) for s in np.linspace(0, n - run, 8)}) if n > run else [0]
    return np.concatenate([w.array.T.rows(s, min(s + run, n)).astype(np.float32) for s in starts])
