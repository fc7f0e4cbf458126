"""Promises of new tensors: what a rule emits in place of arrays, computed in row blocks when the file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from qpass.graph.dtypes import Array, DType
from qpass.graph.lazy import Lazy, Reshaped, _expect


class Blockwise:
    """Several arrays made in one streamed walk over the rows of a source, such as a packed weight and its
    scales.

    `fn` maps `source.rows(a, b)` to one array per result, each the rows a..b of that result. It runs in
    several threads at once, on blocks of any size and order, and must not depend on either. `results` gives
    each result's whole shape (axis 0 as long as the source's) and dtype; `needs` are promises that `fn`
    loads, so that kept ones are ready.
    """

    def __init__(
        self,
        source: Lazy,
        fn: Callable[[Array], tuple[Array, ...]],
        results: Sequence[tuple[tuple[int, ...], np.typing.DTypeLike]],
        name: str,
        needs: Sequence[Lazy] = (),
    ) -> None:
        self.source, self.fn, self.name, self.needs = source, fn, name, tuple(needs)
        self.results = tuple(Result(self, i, tuple(shape), np.dtype(dtype)) for i, (shape, dtype) in enumerate(results))
        for result in self.results:
            if not result.shape or result.shape[0] != source.shape[0]:
                raise ValueError(f"{name}: a result of shape {result.shape} does not follow {source.shape[0]} rows")

    def block(self, start: int, stop: int) -> tuple[Array, ...]:
        """Rows start..stop of every result."""
        arrays = self.fn(self.source.rows(start, stop))
        if len(arrays) != len(self.results):
            raise ValueError(f"{self.name}: {len(self.results)} results promised but {len(arrays)} came")
        for result, array in zip(self.results, arrays, strict=True):
            _expect(array, (stop - start, *result.shape[1:]), result.dtype, self.name)
        return arrays


class Result(Lazy):
    """One result of a Blockwise, maybe under another shape: it is written by the walk that makes all of them."""

    def __init__(self, group: Blockwise, index: int, shape: tuple[int, ...], dtype: DType) -> None:
        self.group, self.index, self.shape, self.dtype = group, index, shape, dtype

    @property
    def made(self) -> Result:
        """The same result in the shape in which blocks of it are made."""
        return self.group.results[self.index]

    def rows(self, start: int, stop: int) -> Array:
        if self.made is not self:
            return Reshaped(self.made, self.shape).rows(start, stop)
        return self.group.block(start, stop)[self.index]

    def _reshaped(self, shape: tuple[int, ...]) -> Lazy:
        return self.made if shape == self.made.shape else Result(self.group, self.index, shape, self.dtype)

    def parts(self) -> Iterable[Lazy]:
        return [self.group.source, *self.group.needs]


class Promised(gs.ir.tensor.LazyValues):  # type: ignore[misc] # gs has no type hints
    """A Lazy as the values of a graphsurgeon constant."""

    def __init__(self, array: Lazy) -> None:
        self.array = array  # not super(): it wants a TensorProto
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes

    def load(self) -> Array:
        return self.array.load()

    def __str__(self) -> str:
        return repr(self.array)
