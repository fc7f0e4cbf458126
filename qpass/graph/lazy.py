"""Promises of arrays: shape and dtype are known at once, values are read or computed when somebody asks.

A weight of a large model is never held whole. What holds for every `Lazy`: `rows(a, b)` makes just these
rows, `columns(a, b)` just these columns, and neither keeps anything afterwards.
"""

from __future__ import annotations

import math
import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from qpass.graph.dtypes import Array, DType, file_bytes


class Lazy(ABC):
    """A promise of one array of `shape` and `dtype`.

    Arithmetic (`+ - * /` with another Lazy, an array or a number, numpy broadcasting), `T`, `astype`,
    `reshape` and `[:, None]` build new promises that stream like their operands.
    """

    __array_ufunc__ = None  # array * lazy: numpy leaves it to Lazy.__rmul__

    shape: tuple[int, ...]
    dtype: DType

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Rows start..stop of axis 0, [stop - start, *shape[1:]], in any memory order; nothing is kept."""

    def columns(self, start: int, stop: int) -> Array:
        """Columns start..stop of a 2-D array, [shape[0], stop - start], in any memory order."""
        return self.load()[:, start:stop]

    def load(self) -> Array:
        """The whole array: for small ones, or for those who know that it fits."""
        return self.rows(0, self.shape[0])

    def parts(self) -> Iterable[Lazy]:
        """The promises that this one is made of, as far as they are known."""
        return ()

    def leaves(self) -> Iterator[Lazy]:
        """What this promise reads or waits for in the end: those of its parts that have no parts."""
        parts = tuple(self.parts())
        if not parts:
            yield self
        for part in parts:
            yield from part.leaves()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in a file: sub-byte types count as packed."""
        return file_bytes(self.dtype, self.shape)

    @property
    def T(self) -> Lazy:
        """The transpose of a 2-D (or lower) array."""
        if self.ndim > 2:
            raise ValueError(f"T is for two dimensions, not shape {self.shape}")
        return self if self.ndim < 2 else Transposed(self)

    def cut(self, start: int, stop: int) -> Lazy:
        """Rows start..stop of axis 0 as a promise that reads no others."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} of {self.shape[0]}")
        return self if (start, stop) == (0, self.shape[0]) else self._cut(start, stop)

    def _cut(self, start: int, stop: int) -> Lazy:
        return Cut(self, start, stop)

    def astype(self, dtype: np.typing.DTypeLike) -> Lazy:
        """numpy's (ml_dtypes') cast; overflow to infinity is silent, as in ONNX Cast."""
        to = np.dtype(dtype)
        return self if to == self.dtype else Elementwise(_Cast(to), self)

    def reshape(self, *shape: int) -> Lazy:
        """C-order reshape; one dimension may be -1."""
        new = _resolve_shape(self.shape, shape)
        return self if new == self.shape else self._reshaped(new)

    def _reshaped(self, shape: tuple[int, ...]) -> Lazy:
        return Reshaped(self, shape)

    def transpose(self, *perm: int) -> Lazy:
        """Axes in the order `perm`, numpy's rules."""
        if sorted(perm) != list(range(self.ndim)):
            raise ValueError(f"{perm} is no permutation of the axes of shape {self.shape}")
        if perm == tuple(range(self.ndim)):
            return self
        return self.T if perm == (1, 0) else Permuted(self, perm)

    def __getitem__(self, index: object) -> Lazy:
        """Full slices and None only, such as `scale[:, None]`: a reshape, not a selection."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(p is not None and p != slice(None) for p in parts):
            raise TypeError(f"a Lazy takes only ':' and None as an index, not {index!r}; load() it to select values")
        dims = iter(self.shape)
        return self.reshape(*(1 if p is None else next(dims) for p in parts), *dims)

    def __add__(self, other: Lazy | Array | float) -> Lazy:
        return Elementwise(operator.add, self, other)

    def __radd__(self, other: Array | float) -> Lazy:
        return Elementwise(operator.add, other, self)

    def __sub__(self, other: Lazy | Array | float) -> Lazy:
        return Elementwise(operator.sub, self, other)

    def __rsub__(self, other: Array | float) -> Lazy:
        return Elementwise(operator.sub, other, self)

    def __mul__(self, other: Lazy | Array | float) -> Lazy:
        return Elementwise(operator.mul, self, other)

    def __rmul__(self, other: Array | float) -> Lazy:
        return Elementwise(operator.mul, other, self)

    def __truediv__(self, other: Lazy | Array | float) -> Lazy:
        return Elementwise(operator.truediv, self, other)

    def __rtruediv__(self, other: Array | float) -> Lazy:
        return Elementwise(operator.truediv, other, self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype}{list(self.shape)})"


class Given(Lazy):
    """An array that is in memory already."""

    def __init__(self, array: Array | float) -> None:
        self.array = np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def _cut(self, start: int, stop: int) -> Lazy:
        return Given(self.array[start:stop])

    def rows(self, start: int, stop: int) -> Array:
        return self.array[start:stop]

    def columns(self, start: int, stop: int) -> Array:
        return self.array[:, start:stop]

    def load(self) -> Array:
        return self.array


class Kept(Lazy):
    """A small computed array: `fn()` runs once, at the first use in whichever thread, and its result stays.

    `fn` may stream weights and use other Kept arrays. The lock is held while it runs, so a second thread
    waits for the result and does not compute it again; promises form no cycles, hence neither do the locks.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike, fn: Callable[[], Array]) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._fn: Callable[[], Array] | None = fn
        self._value: Array | None = None
        self._lock = threading.Lock()

    def load(self) -> Array:
        if self._value is None:
            with self._lock:
                if self._value is None:
                    assert self._fn is not None
                    value = np.asarray(self._fn())
                    _expect(value, self.shape, self.dtype, "a kept value")
                    self._value, self._fn = value, None  # lets go of what fn held
        assert self._value is not None
        return self._value

    def rows(self, start: int, stop: int) -> Array:
        return self.load()[start:stop]

    def columns(self, start: int, stop: int) -> Array:
        return self.load()[:, start:stop]


class Elementwise(Lazy):
    """`fn` of operands under numpy's broadcasting."""

    def __init__(self, fn: Callable[..., Array], *operands: Lazy | Array | float) -> None:
        self.fn = fn
        self.operands = [o if isinstance(o, Lazy | int | float) else Given(o) for o in operands]
        arrays = [o for o in self.operands if isinstance(o, Lazy)]
        self.shape = np.broadcast_shapes(*(o.shape for o in arrays))
        # numpy itself says the dtype: Python numbers stay weak, arrays of no elements cost nothing
        self.dtype = fn(*(np.empty(0, o.dtype) if isinstance(o, Lazy) else o for o in self.operands)).dtype
        # An operand that does not run along the sliced axis is needed whole by every slice: keep it.
        self._whole = {i: Kept(o.shape, o.dtype, o.load) for i, o in enumerate(self.operands) if isinstance(o, Lazy)}

    def _part(self, axis: int, start: int, stop: int) -> Array:
        args: list[Array | float] = []
        for i, operand in enumerate(self.operands):
            if not isinstance(operand, Lazy):
                args.append(operand)
            elif operand.ndim < self.ndim - axis or operand.shape[axis - self.ndim] != self.shape[axis]:
                args.append(self._whole[i].load())  # broadcast along the axis
            elif operand.ndim < self.ndim or axis == 0:
                args.append(operand.rows(start, stop))  # the sliced axis is this operand's first
            else:
                args.append(operand.columns(start, stop))
        return np.asarray(self.fn(*args))

    def rows(self, start: int, stop: int) -> Array:
        return self._part(0, start, stop)

    def columns(self, start: int, stop: int) -> Array:
        return self._part(1, start, stop)

    def load(self) -> Array:
        return np.asarray(self.fn(*(o.load() if isinstance(o, Lazy) else o for o in self.operands)))

    def _reshaped(self, shape: tuple[int, ...]) -> Lazy:
        if len(self.operands) == 1 and isinstance(self.operands[0], Lazy):
            return Elementwise(self.fn, self.operands[0].reshape(*shape))  # a cast: reshape what is stored
        return Reshaped(self, shape)

    def _cut(self, start: int, stop: int) -> Lazy:
        if len(self.operands) == 1 and isinstance(self.operands[0], Lazy):
            return Elementwise(self.fn, self.operands[0].cut(start, stop))
        return Cut(self, start, stop)

    def parts(self) -> Iterable[Lazy]:
        return [o for o in self.operands if isinstance(o, Lazy)]


class _View(Lazy):
    """A promise that holds the same elements as its base."""

    def __init__(self, base: Lazy, shape: tuple[int, ...]) -> None:
        self.base, self.shape, self.dtype = base, shape, base.dtype

    def parts(self) -> Iterable[Lazy]:
        return [self.base]


class Transposed(_View):
    def __init__(self, base: Lazy) -> None:
        super().__init__(base, base.shape[::-1])

    @property
    def T(self) -> Lazy:
        return self.base

    def rows(self, start: int, stop: int) -> Array:
        return self.base.columns(start, stop).T

    def columns(self, start: int, stop: int) -> Array:
        return self.base.rows(start, stop).T

    def load(self) -> Array:
        return self.base.load().T


class Permuted(_View):
    """Axes in another order. Streams where axis 0 stays first (stacked experts [E, K, N]); else it loads."""

    def __init__(self, base: Lazy, perm: tuple[int, ...]) -> None:
        super().__init__(base, tuple(base.shape[p] for p in perm))
        self.perm = perm

    def rows(self, start: int, stop: int) -> Array:
        if self.perm[0] == 0:
            return self.base.rows(start, stop).transpose(self.perm)
        return self.load()[start:stop]

    def load(self) -> Array:
        return self.base.load().transpose(self.perm)

    def _cut(self, start: int, stop: int) -> Lazy:
        return Permuted(self.base.cut(start, stop), self.perm) if self.perm[0] == 0 else Cut(self, start, stop)

    def _reshaped(self, shape: tuple[int, ...]) -> Lazy:
        if self.shape[:1] == (1,) and self.perm[0] == 0 and shape == self.shape[1:]:  # one expert of a stack
            return self.base.reshape(*self.base.shape[1:]).transpose(*(p - 1 for p in self.perm[1:]))
        return Reshaped(self, shape)


class Cut(_View):
    """Rows start..stop of another promise."""

    def __init__(self, base: Lazy, start: int, stop: int) -> None:
        super().__init__(base, (stop - start, *base.shape[1:]))
        self.start = start

    def rows(self, start: int, stop: int) -> Array:
        return self.base.rows(self.start + start, self.start + stop)

    def _cut(self, start: int, stop: int) -> Lazy:
        return self.base.cut(self.start + start, self.start + stop)


class Reshaped(_View):
    """The same elements in C order under another shape; rows read the base's rows that cover them."""

    def rows(self, start: int, stop: int) -> Array:
        per_row = math.prod(self.shape[1:])
        base_row = math.prod(self.base.shape[1:])
        if self.base.ndim == 0 or 0 in (per_row, base_row):
            return self.load()[start:stop]
        first, last = start * per_row // base_row, -(-stop * per_row // base_row)
        flat = self.base.rows(first, last).reshape(-1)
        begin = start * per_row - first * base_row
        return flat[begin : begin + (stop - start) * per_row].reshape(stop - start, *self.shape[1:])

    def load(self) -> Array:
        return self.base.load().reshape(self.shape)


class Joined(Lazy):
    """Arrays one behind another along axis 0, such as the weights [N, K] of Linears that become one."""

    def __init__(self, arrays: Iterable[Lazy]) -> None:
        self.arrays = tuple(arrays)
        first = self.arrays[0]
        if any(a.shape[1:] != first.shape[1:] or a.dtype != first.dtype for a in self.arrays):
            raise ValueError(f"these cannot be joined: {', '.join(map(repr, self.arrays))}")
        self.shape = (sum(a.shape[0] for a in self.arrays), *first.shape[1:])
        self.dtype = first.dtype

    def rows(self, start: int, stop: int) -> Array:
        found, top = [], 0
        for a in self.arrays:
            low, high = max(start - top, 0), min(stop - top, a.shape[0])
            if low < high:
                found.append(a.rows(low, high))
            top += a.shape[0]
        return found[0] if len(found) == 1 else np.concatenate(found or [self.arrays[0].rows(0, 0)])

    def columns(self, start: int, stop: int) -> Array:
        return np.concatenate([a.columns(start, stop) for a in self.arrays])

    def parts(self) -> Iterable[Lazy]:
        return self.arrays


class _Cast:
    """`astype` as a value, so that an Elementwise names what it does."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype

    def __call__(self, array: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return array.astype(self.dtype)


def is_cast(array: Lazy) -> bool:
    """Whether it is made by `astype`."""
    return isinstance(array, Elementwise) and isinstance(array.fn, _Cast)


def _resolve_shape(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    known = math.prod(d for d in new if d != -1)
    if new.count(-1) == 1 and known:
        new = tuple(math.prod(old) // known if d == -1 else d for d in new)
    if -1 in new or math.prod(new) != math.prod(old):
        raise ValueError(f"cannot reshape {old} to {new}")
    return tuple(new)


def _expect(value: Array, shape: tuple[int, ...], dtype: DType, what: str) -> None:
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"{what} was promised as {dtype}{list(shape)} but came as {value.dtype}{list(value.shape)}")
