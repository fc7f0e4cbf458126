"""Integers with scales, as one array of floats: what DequantizeLinear makes of constants."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qpass.graph.dtypes import Array, DType
from qpass.graph.lazy import Lazy


class Dequantized(Lazy):
    """(q − zero) · scale, computed in float32 and rounded to `dtype`.

    The parts stay in sight, so that who wants the integers takes them as they are.

    Args:
        q: integers (or small floats) of any shape.
        scale: of as many dims as q. Along each dim it has 1, as many as q, or one for every `block` of q.
        zero: of scale's shape; None for 0.
        dtype: of the result.
        sources: what tells two of them apart: the tensors that `scale` and `zero` are made of.
    """

    def __init__(
        self, q: Lazy, scale: Lazy, zero: Lazy | None, dtype: DType, block: int = 1, sources: tuple[Lazy, ...] = ()
    ) -> None:
        self.q, self.scale, self.zero, self.block, self.sources = q, scale, zero, block, sources
        self.shape, self.dtype = q.shape, np.dtype(dtype)
        for part in (scale, *([zero] if zero is not None else [])):
            fits = part.ndim == q.ndim and all(
                p in (1, n, -(-n // block)) for p, n in zip(part.shape, q.shape, strict=True)
            )
            if not fits or part.shape != scale.shape:
                raise ValueError(f"scales of shape {scale.shape} in blocks of {block} do not fit {q.shape}")

    def rows(self, start: int, stop: int) -> Array:
        return self._part(0, start, stop)

    def columns(self, start: int, stop: int) -> Array:
        return self._part(1, start, stop)

    def load(self) -> Array:
        return self._part(0, 0, self.shape[0]) if self.ndim else self._compute(self.q, self.scale, self.zero)

    def _part(self, axis: int, start: int, stop: int) -> Array:
        q = _slice(self.q, axis, start, stop)
        scale = self._spread(self.scale, axis, start, stop)
        zero = None if self.zero is None else self._spread(self.zero, axis, start, stop)
        return self._compute(q, scale, zero)

    def _compute(self, q: Lazy | Array, scale: Lazy | Array, zero: Lazy | Array | None) -> Array:
        q, scale = _array(q), _array(scale)
        if zero is None:
            values = q.astype(np.float32)
        else:
            values = (q.astype(np.int32) - _array(zero).astype(np.int32)).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.multiply(values, scale.astype(np.float32)).astype(self.dtype, copy=False)

    def _spread(self, part: Lazy, axis: int, start: int, stop: int) -> Array:
        """What of scales or zero points belongs to a slice of q, blocks written out; broadcasts against the slice."""
        n, b = self.shape[axis], self.block
        if part.shape[axis] == 1:
            out = part.load()
        elif part.shape[axis] == n:
            out = _slice(part, axis, start, stop)
        else:
            first = start // b
            wide = np.repeat(_slice(part, axis, first, -(-stop // b)), b, axis)
            out = wide.take(range(start - first * b, stop - first * b), axis)
        for other in range(self.ndim):
            if other != axis and part.shape[other] not in (1, self.shape[other]):
                out = np.repeat(out, b, other).take(range(self.shape[other]), other)
        return out

    @property
    def T(self) -> Lazy:
        if self.ndim < 2:
            return self
        zero = None if self.zero is None else self.zero.T
        return Dequantized(self.q.T, self.scale.T, zero, self.dtype, self.block, self.sources)

    def _reshaped(self, shape: tuple[int, ...]) -> Lazy:
        """Dims of 1 may come and go; another shape is a view that has no scales of its own."""
        if [d for d in shape if d != 1] != [d for d in self.shape if d != 1]:
            return super()._reshaped(shape)
        dims = iter(s for s, d in zip(self.scale.shape, self.shape, strict=True) if d != 1)
        per = tuple(1 if d == 1 else next(dims) for d in shape)
        zero = None if self.zero is None else self.zero.reshape(*per)
        return Dequantized(
            self.q.reshape(*shape), self.scale.reshape(*per), zero, self.dtype, self.block, self.sources
        )

    def parts(self) -> Iterable[Lazy]:
        return [self.q, self.scale, *([self.zero] if self.zero is not None else [])]


def dequantized(q: Lazy, scale: Lazy, zero: Lazy | None, axis: int, block: int, dtype: DType) -> Dequantized | None:
    """What DequantizeLinear makes of constants; None where their shapes are not those of a valid node.

    Args:
        scale: one value; or [n], for each of q along `axis`; or with block > 0 of q's rank, for each block along it.
    """
    sources = (scale, *([zero] if zero is not None else []))
    if zero is not None and (zero.size != scale.size or q.dtype.kind == "f"):
        return None
    shape: tuple[int, ...]
    if scale.size == 1:
        shape = (1,) * q.ndim
    elif not -q.ndim <= axis < q.ndim:
        return None
    elif block:
        shape = tuple(-(-n // block) if i == axis % q.ndim else n for i, n in enumerate(q.shape))
    else:
        shape = tuple(n if i == axis % q.ndim else 1 for i, n in enumerate(q.shape))
    if scale.size > 1 and (scale.shape != shape if block else (scale.ndim, scale.size) != (1, max(shape))):
        return None
    scale, zero = scale.reshape(*shape), None if zero is None else zero.reshape(*shape)
    return Dequantized(q, scale, zero, dtype, block or 1, sources)


def _slice(a: Lazy, axis: int, start: int, stop: int) -> Array:
    return a.rows(start, stop) if axis == 0 else a.columns(start, stop)


def _array(a: Lazy | Array) -> Array:
    return a.load() if isinstance(a, Lazy) else a
