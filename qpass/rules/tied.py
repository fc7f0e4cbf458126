"""Tied heads: Linears whose weight is the embedding's, be it by the same initializer or by an equal copy of it.

TorchScript's exporter folds the transposed embedding into a second initializer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from qpass.graph import Const, Lazy
from qpass.rewriter import Rewriter
from qpass.rewriter.view import domain_of

_TABLES = {
    ("", "Gather"): (0,),
    ("com.microsoft", "EmbedLayerNormalization"): (2, 3, 4),
    ("com.microsoft", "GatherBlockQuantized"): (0,),
}
"""Where operators take the tables that they look rows up in."""

_FIRST, _BLOCK = 1 << 14, 1 << 20
"""Elements compared at a time: a few at first, since most weights differ at once."""


class Embeddings:
    """The tables of a model that rows are looked up in."""

    def __init__(self, graphs: Iterable[Rewriter]) -> None:
        tables = [c for r in graphs for c in _tables(r) if len(c.shape) == 2]  # of three dims they are experts
        self._roots = {id(c.root) for c in tables}
        self._matrices = list({id(c.root): c for c in tables}.values())

    def tied(self, w: Const) -> bool:
        """Whether the weight [K, N] of a Linear is an embedding [N, K]."""
        if id(w.root) in self._roots:
            return True
        if len(w.shape) != 2:
            return False
        forms = [w.array.T]
        if isinstance(w.root, Const) and len(w.root.shape) == 2 and w.root.array is not w.array:
            forms += [w.root.array, w.root.array.T]  # before a factor was folded into it
        return any(c.shape == f.shape and equal(c.array, f) for c in self._matrices for f in forms)


def _tables(r: Rewriter) -> Iterator[Const]:
    for n in r.position:
        if all(r.view.constant(v) is not None for v in n.inputs if v.name):
            continue  # no lookup: a part of a constant
        for i in _TABLES.get((domain_of(n), n.op), ()):
            if i < len(n.inputs) and (c := r.view.constant(n.inputs[i])) is not None and _may_be_table(c):
                yield c


def _may_be_table(c: Const) -> bool:
    """Whether it holds floats, or what a weight is quantized to; the rest is shapes and indices."""
    return c.dtype.kind in "fV" or (c.dtype.itemsize == 1 and len(c.shape) == 2)


def equal(a: Lazy, b: Lazy) -> bool:
    """Whether two matrices of one shape hold the same values; reads them in blocks, and stops where they differ."""
    return all(np.array_equal(a.rows(i, j), b.rows(i, j)) for i, j in _blocks(a.shape))


def _blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Row ranges, the first a small one."""
    rows, width = shape
    start, step = 0, max(1, _FIRST // max(1, width))
    while start < rows:
        yield start, min(start + step, rows)
        start, step = start + step, max(1, _BLOCK // max(1, width))
