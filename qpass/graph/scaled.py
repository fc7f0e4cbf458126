"""What QuantizeLinear and DequantizeLinear make of constants: integers from floats, and floats from integers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np

from qpass.graph.dtypes import Array, DType
from qpass.graph.lazy import Lazy


class Scaled(Lazy):
    """An array with scales and zero points, whose parts stay in sight.

    Args:
        base: of any shape.
        scale: of as many dims as base. Along each it has 1, as many as base, or one for every `block` of base.
        zero: of scale's shape; None for 0.
        dtype: of the result.
        sources: what tells two of them apart: the tensors that `scale` and `zero` are made of.
    """

    def __init__(
        self, base: Lazy, scale: Lazy, zero: Lazy | None, dtype: DType, block: int = 1, sources: tuple[Lazy, ...] = ()
    ) -> None:
        self.base, self.scale, self.zero, self.block, self.sources = base, scale, zero, block, sources
        self.shape, self.dtype = base.shape, np.dtype(dtype)
        for part in (scale, *([zero] if zero is not None else [])):
            fits = part.ndim == base.ndim and all(
                p in (1, n, -(-n // block)) for p, n in zip(part.shape, base.shape, strict=True)
            )
            if not fits or part.shape != scale.shape:
                raise ValueError(f"scales of shape {scale.shape} in blocks of {block} do not fit {base.shape}")

    @abstractmethod
    def compute(self, values: Array, scale: Array, zero: Array | None) -> Array:
        """The result for a part of base; scale (float32) and zero broadcast against it."""

    def rows(self, start: int, stop: int) -> Array:
        return self._part(0, start, stop)

    def columns(self, start: int, stop: int) -> Array:
        return self._part(1, start, stop)

    def load(self) -> Array:
        if self.ndim:
            return self._part(0, 0, self.shape[0])
        zero = None if self.zero is None else self.zero.load()
        return self.compute(self.base.load(), self.scale.load().astype(np.float32), zero)

    def _part(self, axis: int, start: int, stop: int) -> Array:
        scale = self._spread(self.scale, axis, start, stop).astype(np.float32)
        zero = None if self.zero is None else self._spread(self.zero, axis, start, stop)
        return self.compute(_slice(self.base, axis, start, stop), scale, zero)

    def _spread(self, part: Lazy, axis: int, start: int, stop: int) -> Array:
        """What of scales or zero points belongs to a slice of base, blocks written out."""
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
        return self.transpose(1, 0) if self.ndim == 2 else super().T

    def transpose(self, *perm: int) -> Lazy:
        if perm == tuple(range(self.ndim)):
            return self
        zero = None if self.zero is None else self.zero.transpose(*perm)
        parts = self.base.transpose(*perm), self.scale.transpose(*perm), zero
        return type(self)(*parts, self.dtype, self.block, self.sources)

    def _reshaped(self, shape: tuple[int, ...]) -> Lazy:
        """Dims of 1 may come and go; another shape is a view that has no scales of its own."""
        if [d for d in shape if d != 1] != [d for d in self.shape if d != 1]:
            return super()._reshaped(shape)
        dims = iter(s for s, d in zip(self.scale.shape, self.shape, strict=True) if d != 1)
        per = tuple(1 if d == 1 else next(dims) for d in shape)
        zero = None if self.zero is None else self.zero.reshape(*per)
        return type(self)(
            self.base.reshape(*shape), self.scale.reshape(*per), zero, self.dtype, self.block, self.sources
        )

    def parts(self) -> Iterable[Lazy]:
        return [self.base, self.scale, *([self.zero] if self.zero is not None else [])]


class Dequantized(Scaled):
    """(base − zero) · scale, computed in float32 and rounded to `dtype`; base holds integers or small floats."""

    def compute(self, values: Array, scale: Array, zero: Array | None) -> Array:
        floats = values.astype(np.float32)
        if zero is not None:
            floats -= zero.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.multiply(floats, scale).astype(self.dtype, copy=False)


class Quantized(Scaled):
    """base / scale rounded to even, + zero, clipped to what the integers of `dtype` can be."""

    def compute(self, values: Array, scale: Array, zero: Array | None) -> Array:
        low, high = LIMITS[self.dtype.name]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            q = np.rint(np.divide(values.astype(np.float32), scale))
        if zero is not None:
            q += zero.astype(np.float32)
        whole: Array = np.nan_to_num(np.clip(q, low, high)).astype(np.int32)
        return whole.astype(self.dtype)


LIMITS = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}
"""Integers that a weight is quantized to, and their range."""


def scales_of(
    base: Lazy, scale: Lazy, zero: Lazy | None, axis: int, block: int
) -> tuple[Lazy, Lazy | None, int, tuple[Lazy, ...]] | None:
    """A node's scales as `Scaled` has them, its `block` and `sources`; None where their shapes are not of a valid node.

    Args:
        scale: one value; or [n], for each of base along `axis`; or with block > 0 of base's rank, for each block.
    """
    sources = (scale, *([zero] if zero is not None else []))
    if zero is not None and zero.size != scale.size:
        return None
    shape: tuple[int, ...]
    if scale.size == 1:
        shape = (1,) * base.ndim
    elif not -base.ndim <= axis < base.ndim:
        return None
    elif block:
        shape = tuple(-(-n // block) if i == axis % base.ndim else n for i, n in enumerate(base.shape))
    else:
        shape = tuple(n if i == axis % base.ndim else 1 for i, n in enumerate(base.shape))
    if scale.size > 1 and (scale.shape != shape if block else (scale.ndim, scale.size) != (1, max(shape))):
        return None
    return scale.reshape(*shape), None if zero is None else zero.reshape(*shape), block or 1, sources


def _slice(a: Lazy, axis: int, start: int, stop: int) -> Array:
    return a.rows(start, stop) if axis == 0 else a.columns(start, stop)
