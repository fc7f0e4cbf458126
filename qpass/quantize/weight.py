"""Weights to int8 and int4: scales, round-to-nearest, and a search for the scale of least squared error.

Every function takes a block `w` of logical shape [n, K], n output channels of K inputs, float16, bfloat16 or
float32 in any memory order, and returns C-contiguous arrays whose axis 0 is n. Rows are independent of each other,
so a weight may come in blocks of any height.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.quantize.activation import scale_of
from qpass.quantize.tiles import NonFinite, Tile, tiles

__all__ = [
    "NonFinite",
    "Rounding",
    "amax",
    "int4_groupwise",
    "int4_per_channel",
    "int8_per_channel",
    "int8_per_tensor",
]

Array = NDArray[Any]

Rounding = Literal["amax", "signed_max", "mse"]
"""How int4 scales are found.

- amax: scale = amax / 7. Code -8 is never used.
- signed_max: the value of largest magnitude becomes code -8: scale = -value / 8, **negative** where that value is
  positive. w = q · scale holds as ever, and all 16 codes are used.
- mse: of several scales, signed_max and smaller ones that clip, the one of least squared error. Each is tried with
  its codes' best scale in the least-squares sense, Σ w·q / Σ q², which is also the one returned.
"""

_GROUP_FACTORS = (1.0, 0.92, 0.84)
_CHANNEL_FACTORS = (1.0, 0.87, 0.76, 0.66, 0.57, 0.5)
_ZERO_POINT_FACTORS = (1.05, 1.0, 0.92, 0.84)
"""Fractions of the whole range that "mse" tries: long rows have outliers worth clipping. On MiniLM's weights twice as
many lower the error by less than 0.5 %."""


def int8_per_channel(w: Array, smoother: Array | None = None) -> tuple[Array, Array]:
    """Symmetric int8 with a scale per output channel, of w · smoother where there is one.

    scale = amax / 127; q = clip(rint(w / scale), -128, 127), 0 where amax is 0.

    Args:
        smoother: float32 [K].

    Returns:
        q int8 [n, K], scale float32 [n].

    Raises:
        NonFinite: w is not finite.
    """
    n, k = w.shape
    q, scale = np.empty((n, k), np.int8), np.empty((n, 1), np.float32)
    for tile in tiles(w, k, smoother):
        low, high = tile.extremes()
        s = scale_of(np.maximum(high, -low))
        tile.of(scale, 1)[...] = s
        _write_int8(tile, s, q)
    return q, scale[:, 0]


def int8_per_tensor(w: Array, scale: Array, smoother: Array | None = None) -> tuple[Array]:
    """Symmetric int8 with one scale for the whole weight, of which w is a block.

    Args:
        scale: float32 [1], the amax of the weight (times its smoother) over 127.

    Returns:
        q int8 [n, K].

    Raises:
        NonFinite: w is not finite.
    """
    n, k = w.shape
    q = np.empty((n, k), np.int8)
    for tile in tiles(w, k, smoother):
        tile.extremes()
        _write_int8(tile, scale, q)
    return (q,)


def int4_per_channel(w: Array, rounding: Rounding = "mse") -> tuple[Array, Array]:
    """Symmetric int4 with a scale per output channel: q = clip(rint(w / scale), -8, 7).

    Returns:
        packed int8 [n, K/2] (see `qpass.quantize.pack`), scale float32 [n].

    Raises:
        NonFinite: w is not finite.
        ValueError: K is odd.
    """
    packed, scale = _int4(w, w.shape[1], rounding, zero_point=False, factors=_CHANNEL_FACTORS)
    return packed, scale[:, 0]


def int4_groupwise(
    w: Array, group_size: int, rounding: Rounding = "mse", zero_point: bool = False
) -> tuple[Array, ...]:
    """int4 with a scale, and maybe a zero point, for each `group_size` values of a row.

    Symmetric: q = clip(rint(w / scale), -8, 7). With zero points: scale = (max - min) / 15 over the group and 0,
    zero = rint(-8 - min / scale), q = clip(rint(w / scale) + zero, -8, 7), w ≈ (q - zero) · scale; `rounding` "mse"
    searches the range, the others take the whole.

    Returns:
        packed int8 [n, K/2] (see `qpass.quantize.pack`), scale float32 [n, K/group_size], and with zero points
        zero int8 [n, K/group_size].

    Raises:
        NonFinite: w is not finite.
        ValueError: K is not a multiple of the group size, or the group size is odd.
    """
    factors = _ZERO_POINT_FACTORS if zero_point else _GROUP_FACTORS
    return _int4(w, group_size, rounding, zero_point, factors)


def amax(w: Array, axis: int | None = None) -> Array:
    """Largest magnitude of w [n, K]: of the block ([1]), per input channel (axis 0: [K]) or output channel (1: [n]).

    Returns:
        float32.

    Raises:
        NonFinite: w is not finite.
    """
    n, k = w.shape
    rows, columns = np.zeros(n, np.float32), np.zeros(k, np.float32)
    for tile in tiles(w, k):
        low, high = tile.extremes()
        tile.of(rows[:, None], 1)[...] = np.maximum(high, -low)
        if axis == 0:
            np.abs(tile.x, out=tile.x)
            other = (0, 2)  # whole rows are [1, K, rows] or [rows, K, 1]
            np.maximum(columns, tile.x.max(axis=other), out=columns)
    if axis is None:
        return np.asarray(np.max(rows, keepdims=True, initial=0))
    return columns if axis == 0 else rows


def _write_int8(tile: Tile, scale: Array, q: Array) -> None:
    np.divide(tile.x, _unless_zero(scale), out=tile.x)
    _round(tile.x, np.float32(-128), np.float32(127))
    tile.of(q, tile.group)[...] = tile.x.astype(np.int8)


def _int4(w: Array, group: int, rounding: Rounding, zero_point: bool, factors: Sequence[float]) -> tuple[Array, ...]:
    n, k = w.shape
    if k % group or group % 2:
        raise ValueError(f"K={k} does not divide into groups of {group}, each an even number")
    packed, scale = np.empty((n, k // 2), np.uint8), np.empty((n, k // group), np.float32)
    zero = np.empty((n, k // group), np.int8)
    for tile in tiles(w, group):
        low, high = tile.extremes()
        z: Any = np.float32(0)
        if zero_point:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            s = high / 15 - low / 15
            z = np.clip(np.rint(-8 - low / _unless_zero(s)), -8, 7)
            tile.of(zero, 1)[...] = z
        elif rounding == "amax":
            s = np.maximum(high, -low) / 7
        else:
            s = np.where(high >= -low, high, low) / -8
        np.divide(tile.x, _unless_zero(s), out=tile.x)
        if rounding == "mse":
            codes, fit = _search(tile, -8 - z, 7 - z, factors)
            s = s * fit
        else:
            codes = _round(tile.x, -8 - z, 7 - z)
        tile.of(scale, 1)[...] = s
        _write_int4(tile, codes, z, packed)
    return (packed.view(np.int8), scale, zero) if zero_point else (packed.view(np.int8), scale)


def _search(tile: Tile, low: Any, high: Any, factors: Sequence[float]) -> tuple[Array, Array]:
    """Of tile.x in units of a first scale: the codes of least squared error, and their scale in those units.

    With codes c and their best scale Σxc / Σc² the squared error is Σx² - (Σxc)² / Σc².
    """
    x, codes = tile.x, tile.spare

    def attempt(inverse: Any) -> tuple[Array, Array]:
        """The gain (Σxc)² / Σc² and the scale of the codes that x · inverse rounds to."""
        _round(np.multiply(x, inverse, out=codes), low, high)
        xc, cc = _dot(x, codes), np.maximum(_dot(codes, codes), 1)
        return xc * xc / cc, xc / cc

    inverses = np.float32(1) / np.array(factors, np.float32)
    gains, fits = zip(*map(attempt, inverses), strict=True)
    best = np.argmax(np.stack(gains), axis=0)
    gain, fit, inverse = np.choose(best, gains), np.choose(best, fits), inverses[best]

    again = 1 / _unless_zero(fit)  # the codes that the best scale itself rounds to
    new_gain, new_fit = attempt(again)
    better = new_gain > gain
    inverse, fit = np.where(better, again, inverse), np.where(better, new_fit, fit)
    return _round(np.multiply(x, inverse, out=codes), low, high), fit


def _write_int4(tile: Tile, codes: Array, z: Any, packed: Array) -> None:
    codes += z + 8  # 0 to 15: two's complement but for the top bit of each nibble
    nibbles = codes.astype(np.uint8)
    pairs = nibbles[:, 1::2] << 4
    pairs |= nibbles[:, 0::2]
    pairs ^= 0x88
    tile.of(packed, tile.group // 2)[...] = pairs


def _dot(a: Array, b: Array) -> Array:
    """Sums of products over each group."""
    if a.shape[2] == 1:  # einsum is slow on an axis of one
        return np.asarray(np.einsum("ag,ag->a", a[..., 0], b[..., 0]))[:, None, None]
    return np.asarray(np.einsum("agb,agb->ab", a, b))[:, None]


def _round(x: Array, low: Any, high: Any) -> Array:
    """clip(rint(x), low, high) in place."""
    np.rint(x, out=x)
    if np.ndim(low) == 0:
        np.clip(x, low, high, out=x)
    else:  # of which clip makes slow work
        np.minimum(np.maximum(x, low, out=x), high, out=x)
    return x


def _unless_zero(scale: Array) -> Array:
    """A divisor that makes 0 of everything where the scale is 0."""
    return np.asarray(np.where(scale == 0, np.float32(np.inf), scale))
