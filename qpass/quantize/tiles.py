"""Walks a weight block in tiles that stay in cache, as float32 [outer, group, inner].

The K values of a group lie along axis 1 of a tile, and memory runs along the last axis, whatever the block's order
is. So one piece of arithmetic serves [N, K] weights, [K, N] weights seen transposed, scales per channel and per
group, and NumPy's inner loops are long in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TILE = 1 << 19
"""Elements of a tile: so many that two threads spend their time in NumPy, not in waiting for each other's GIL (the
work of one scales by 1.3 with a quarter of it, by 1.8 with this), though fewer would stay in a nearer cache."""

RUN = 4096
"""Rows of a tile of a transposed block with short groups: what its inner loops run over."""

LINE = 32
"""Least rows of a tile of a transposed block whose groups are whole rows: a cache line of float16."""

_BEYOND_FLOAT16 = 2.0**16
"""What `to_float32` makes of float16 infinities; NaNs become more."""


class NonFinite(ValueError):
    """A weight holds NaN or infinite values."""


@dataclass(frozen=True)
class Tile:
    """A part of a block.

    Args:
        x: its values, float32 [outer, group, inner]; may be overwritten.
        spare: an array of the same shape, to be overwritten.
        view: sees the part of a [n, columns] array that belongs to the tile as [outer, columns a group, inner].
        limit: every finite value is below it.
    """

    x: Array
    spare: Array
    view: Callable[[Array], Array]
    limit: float

    def extremes(self) -> tuple[Array, Array]:
        """Minimum and maximum of each group, float32 [outer, 1, inner].

        Raises:
            NonFinite: some value is not finite.
        """
        low, high = self.x.min(axis=1, keepdims=True), self.x.max(axis=1, keepdims=True)
        if not (np.all(high < self.limit) and np.all(low > -self.limit)):  # false for NaN too
            raise NonFinite("NaN or infinite values in a weight")
        return low, high


def tiles(w: Array, group: int, smoother: Array | None = None) -> Iterator[Tile]:
    """The tiles of a block w [n, K], K a multiple of `group`. Each is valid until the next.

    Args:
        smoother: float32 [K], multiplied in.

    Raises:
        NonFinite: some value is not finite and there is a smoother; else `Tile.extremes` finds it.
    """
    n, k = w.shape
    transposed = abs(w.strides[0]) < abs(w.strides[1])
    turned = transposed and group == k  # whole rows are read in memory order, then turned
    transposed = transposed and not turned
    if transposed:
        height = min(n, RUN)
        width = group * max(1, TILE // (height * group))
    else:
        height, width = max(LINE if turned else 1, TILE // k), k
    buffers = np.empty((2, min(n, height) * min(k, width)), np.float32)
    limit = _BEYOND_FLOAT16 if w.dtype == np.float16 else np.inf
    for top in range(0, n, height):
        for left in range(0, k, width):
            view = _view(slice(top, top + height), left, min(left + width, k), group, k, transposed)
            source = view(w)
            if turned:
                source = np.ascontiguousarray(source.T).T
            x, spare = (b[: source.size].reshape(source.shape) for b in buffers)
            to_float32(source, x)
            tile = Tile(x, spare, view, limit)
            if smoother is not None:
                tile.extremes()
                x *= view(np.broadcast_to(smoother, w.shape))
            yield tile


def _view(rows: slice, left: int, stop: int, group: int, k: int, transposed: bool) -> Callable[[Array], Array]:
    """Sees rows and columns left..stop of K, or what corresponds to them in an array of fewer columns."""

    def view(a: Array) -> Array:
        columns = a.shape[1]
        part = a[rows, left * columns // k : stop * columns // k]
        if transposed:
            return part.T.reshape(-1, group * columns // k, len(part))
        if group == k:
            return part[:, :, None]
        return part.reshape(-1, group * columns // k).T[None]  # groups are short: they must not be the inner loop

    return view


def to_float32(source: Array, out: Array) -> None:
    """Copy to float32, in any memory order.

    From float16 infinities and NaNs become 2^16 and more. NumPy's own conversion is not vectorised: it takes
    0.9 ns a value, this 0.3.
    """
    if source.dtype == np.float16:
        bits = out.view(np.int32)
        np.copyto(bits, source.view(np.int16))
        np.left_shift(bits, 13, out=bits)  # exponent and fraction in place, the sign four times
        np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # once
        np.multiply(out, np.float32(2.0**112), out=out)  # exponent bias 15 to 127; subnormals too
    elif source.dtype == ml_dtypes.bfloat16:
        bits = out.view(np.int32)
        np.copyto(bits, source.view(np.int16))
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, source, casting="same_kind")
