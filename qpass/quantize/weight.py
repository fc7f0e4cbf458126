"""Weights to int8 and int4: scales, round-to-nearest, and a search for the scale of least squared error.

Every function takes a block `w` of logical shape [n, K], n output channels of K inputs, float16, bfloat16 or
float32 in any memory order, and returns C-contiguous arrays whose axis 0 is n. Rows are independent of each other,
so a weight may come in blocks of any height.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
- mse: the scale of least squared error, searched: the range and smaller ones that clip are tried, each with the best
  scale for the codes it gives, Σ w·q / Σ q². The range of a group is signed_max's, that of a long row amax's: there
  both ends get clipped.
"""

_GROUP_FACTORS = (1.0, 0.96, 0.85)
_CHANNEL_FACTORS = (1.0, 0.8, 0.65, 0.5)
_ZERO_POINT_FACTORS = (1.03, 1.0, 0.91)
"""Fractions of the whole range that "mse" tries: long rows have outliers worth clipping. Many more lower the error of
MiniLM's weights by 0.5 % at most. Of sets that do alike there (mean cosine of embeddings within 0.001) these were taken
because they also keep small random transformers, whose few outputs make the error a lottery, near plain rounding's."""


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
    scale = np.empty((len(w), 1), np.float32)

    def own(tile: Tile) -> Array:
        low, high = tile.extremes()
        s = scale_of(np.maximum(high, -low))
        tile.view(scale)[...] = s
        return s

    return _int8(w, own, smoother), scale[:, 0]


def int8_per_tensor(w: Array, scale: Array, smoother: Array | None = None) -> tuple[Array]:
    """Symmetric int8 with one scale for the whole weight, of which w is a block.

    Args:
        scale: float32 [1], the amax of the weight, or of weight · smoother, over 127.

    Returns:
        q int8 [n, K].

    Raises:
        NonFinite: the scale is not finite.
    """
    if not np.all(np.isfinite(scale)):
        raise NonFinite("NaN or infinite values in a weight")
    return (_int8(w, lambda _: scale, smoother),)


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


def amax(w: Array, axis: int | None = None, smoother: Array | None = None) -> Array:
    """Largest magnitudes of w [n, K], or of w · smoother.

    Returns:
        float32: of the whole block [1], or with axis 0 of its input channels [K], 1 of its output channels [n].

    Raises:
        NonFinite: w is not finite.
    """
    n, k = w.shape
    columns, rows = np.zeros((1, k), np.float32), np.zeros((n, 1), np.float32)
    for tile in tiles(w, k, smoother):
        low, high = tile.extremes()
        tile.view(rows)[...] = np.maximum(high, -low)
        if axis == 0:
            np.maximum(columns, np.abs(tile.x).max(axis=(0, 2)), out=columns)
    if axis is None:
        return np.asarray(rows.max(axis=0, initial=0))
    return columns[0] if axis == 0 else rows[:, 0]


def _int8(w: Array, scale_for: Callable[[Tile], Array], smoother: Array | None) -> Array:
    q = np.empty(w.shape, np.int8)
    for tile in tiles(w, w.shape[1], smoother):
        np.divide(tile.x, _unless_zero(scale_for(tile)), out=tile.x)
        _round(tile.x, np.float32(-128), np.float32(127), out=tile.x)
        np.copyto(tile.view(q), tile.x, casting="unsafe")
    return q


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
            tile.view(zero)[...] = z
        elif rounding == "amax" or (rounding == "mse" and factors is _CHANNEL_FACTORS):
            s = np.maximum(high, -low) / 7
        else:
            s = np.where(high >= -low, high, low) / -8
        np.divide(tile.x, _unless_zero(s), out=tile.x)
        if rounding == "mse":
            codes, fit = _search(tile, -8 - z, 7 - z, factors)
            s = s * fit
        else:
            codes = _round(tile.x, -8 - z, 7 - z, out=tile.x)
        tile.view(scale)[...] = s
        _write_int4(tile, codes, z, packed)
    return (packed.view(np.int8), scale, zero) if zero_point else (packed.view(np.int8), scale)


def _search(tile: Tile, low: Any, high: Any, factors: Sequence[float]) -> tuple[Array, Array]:
    """Of tile.x in units of a first scale: the codes of least squared error, and their scale in those units.

    With codes c and their best scale Σxc / Σc² the squared error is Σx² - (Σxc)² / Σc².
    """
    x, codes = tile.x, tile.spare

    def attempt(units: Array) -> tuple[Array, Array]:
        """Σxc and Σc² of the codes that `units` round to."""
        _round(units, low, high, out=codes)
        return _dot(x, codes), np.maximum(_dot(codes, codes), 1)

    def scaled(inverse: Any) -> Array:
        np.multiply(x, inverse, out=codes)
        return codes

    sums = [attempt(scaled(np.float32(1 / f)) if f != 1 else x) for f in factors]
    best = np.argmax(np.stack([xc * xc / cc for xc, cc in sums]), axis=0)
    _round(scaled(np.choose(best, [np.float32(1 / f) for f in factors])), low, high, out=codes)
    return codes, np.choose(best, [xc / cc for xc, cc in sums])


def _write_int4(tile: Tile, codes: Array, z: Any, packed: Array) -> None:
    codes += z + 8  # 0 to 15: two's complement but for the top bit of each nibble
    nibbles = codes.astype(np.uint8)
    pairs = nibbles[:, 1::2] << 4
    pairs |= nibbles[:, 0::2]
    pairs ^= 0x88
    tile.view(packed)[...] = pairs


def _dot(a: Array, b: Array) -> Array:
    """Sums of products over each group."""
    if a.shape[2] == 1:  # einsum is slow on an axis of one
        return np.asarray(np.einsum("ag,ag->a", a[..., 0], b[..., 0]))[:, None, None]
    return np.asarray(np.einsum("agb,agb->ab", a, b))[:, None]


def _round(x: Array, low: Any, high: Any, out: Array) -> Array:
    """clip(rint(x), low, high)."""
    np.rint(x, out=out)
    if np.ndim(low) == 0:
        np.clip(out, low, high, out=out)
    else:  # of which clip makes slow work
        np.minimum(np.maximum(out, low, out=out), high, out=out)
    return out


def _unless_zero(scale: Array) -> Array:
    """A divisor that makes 0 of everything where the scale is 0."""
    return np.asarray(np.where(scale == 0, np.float32(np.inf), scale))
