"""Walks a weight block in tiles that stay in cache, as float32 [outer, group, inner].

The K values of a group lie along axis 1 of a tile, and memory runs along the last axis, whatever the block's order
is. So one piece of arithmetic serves [N, K] weights, [K, N] weights seen transposed, scales per channel and per
group, and NumPy's inner loops are long in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TILE = 1 << 18
"""Elements of a tile. In float32, twice, they fill 2 MB of cache; with fewer, threads wait for each other's GIL."""

RUN = 2048
"""Rows of a tile of a transposed block with short groups: what its inner loops run over."""

MIN_RUN = 64
"""The same where a group is a whole row; a tile may then be larger."""

_BEYOND_FLOAT16 = 2.0**16
"""What `to_float32` makes of float16 infinities; NaNs become more."""


class NonFinite(ValueError):
    """A weight holds NaN or infinite values."""


@dataclass(frozen=True)
class Tile:
    """A part of a block, of whole groups.

    Args:
        x: its values, float32 [outer, group, inner]; may be overwritten.
        spare: an array of the same shape, to be overwritten.
        limit: every finite value is below it.
    """

    x: Array
    spare: Array
    rows: slice
    columns: slice
    group: int
    transposed: bool
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

    def of(self, result: Array, per_group: int) -> Array:
        """This tile's part of a result with `per_group` columns for each group, as [outer, per_group, inner]."""
        first, last = (c // self.group * per_group for c in (self.columns.start, self.columns.stop))
        whole_rows = result.shape[1] == per_group
        return _grouped(result[self.rows, first:last], per_group, self.transposed, whole_rows)


def tiles(w: Array, group: int, smoother: Array | None = None) -> Iterator[Tile]:
    """The tiles of a block w [n, K], K a multiple of `group`. Each is valid until the next.

    Args:
        smoother: float32 [K], multiplied in.

    Raises:
        NonFinite: some value is not finite, and there is a smoother; else `Tile.extremes` finds it.
    """
    n, k = w.shape
    transposed = abs(w.strides[0]) < abs(w.strides[1])
    if not transposed:
        height, width = max(1, TILE // k), k
    elif group == k:
        height, width = max(MIN_RUN, TILE // k), k
    else:
        height = min(n, RUN)
        width = group * max(1, TILE // (height * group))
    buffers = np.empty((2, min(n, height) * min(k, width)), np.float32)
    limit = _BEYOND_FLOAT16 if w.dtype == np.float16 else np.inf
    for top in range(0, n, height):
        for left in range(0, k, width):
            rows, columns = slice(top, min(top + height, n)), slice(left, min(left + width, k))
            source = _grouped(w[rows, columns], group, transposed, group == k)
            x, spare = (b[: source.size].reshape(source.shape) for b in buffers)
            to_float32(source, x)
            tile = Tile(x, spare, rows, columns, group, transposed, limit)
            if smoother is not None:
                tile.extremes()
                block = np.broadcast_to(smoother[columns], w[rows, columns].shape)
                x *= _grouped(block, group, transposed, group == k)
            yield tile


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


def _grouped(a: Array, per_group: int, transposed: bool, whole_rows: bool) -> Array:
    """a [rows, columns] as [outer, per_group, inner]; a view, if a's rows lie one after the other."""
    if transposed:
        return a.T.reshape(-1, per_group, a.shape[0])
    if whole_rows:
        return a[:, :, None]
    return a.reshape(-1, per_group).T[None]  # groups are short: they must not be the inner loop
