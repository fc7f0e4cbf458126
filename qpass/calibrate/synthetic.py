"""Made-up inputs for a model that there is no data for: fit to show that it runs, and that two models agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto

from qpass.calibrate.sources import Header
from qpass.runtime import Input, inputs_of

BATCH, SEQUENCE, PAST = 2, 16, 4

#: Ops that hand indices on as they are.
_CARRIERS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


class Synthetic:
    """A source of random samples, made from the names, dtypes and shapes of a model's inputs.

    Ids stay within the rows of the embedding that they index, masks are ones, positions count up, floats are
    normal. A dim that the model leaves open is the batch (2), the past (4), the sequence (16), or past and
    sequence together, as its name says; an input of `shapes` has that shape.
    """

    def __init__(
        self,
        proto: ModelProto,
        batches: int = 4,
        seed: int = 0,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.inputs = {name: i for name, i in inputs_of(proto).items() if not i.optional}
        self.batches, self.seed = batches, seed
        self.shapes = dict(shapes or {})
        self._rows = {name: _table_rows(proto.graph, name) for name in self.inputs}
        symbols = {d for i in self.inputs.values() for d in i.shape or () if isinstance(d, str)}
        self._past = PAST if any("past" in s.lower() for s in symbols) else 0

    def __str__(self) -> str:
        tokens = f" × {SEQUENCE} tokens" if any(len(i.shape or ()) == 2 for i in self.inputs.values()) else ""
        past = f", {self._past} past" if self._past else ""
        if self.shapes:
            of = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in self.shapes.items())
            return f"{self.batches} made-up batches of {of} (seed {self.seed}); --data takes real ones"
        return f"{self.batches} made-up batches of {BATCH}{tokens}{past} (seed {self.seed}); --data takes real ones"

    def __len__(self) -> int:
        return self.batches

    def name(self, item: int) -> str:
        return f"made-up batch {item}"

    def headers(self, item: int) -> Mapping[str, Header]:
        return {name: Header(i.dtype, self._shape(i)) for name, i in self.inputs.items()}

    def read(self, item: int) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng((self.seed, item))
        return {name: self._values(i, rng).astype(i.dtype) for name, i in self.inputs.items()}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self} {self.inputs}".encode()).hexdigest()

    def _values(self, wanted: Input, rng: np.random.Generator) -> NDArray[Any]:
        shape, name = self._shape(wanted), wanted.name.lower()
        if wanted.dtype.kind == "b" or "mask" in name:
            return np.ones(shape)
        if wanted.dtype.kind == "f":
            return rng.standard_normal(shape)
        if "position" in name:
            return np.broadcast_to(self._past + np.arange(shape[-1] if shape else 1), shape or (1,)).reshape(shape)
        if "len" in name:
            return np.full(shape, SEQUENCE)
        return rng.integers(0, self._rows[wanted.name] or 2, shape)

    def _shape(self, wanted: Input) -> tuple[int, ...]:
        if wanted.name in self.shapes:
            return self.shapes[wanted.name]
        return tuple(self._dim(d, axis) for axis, d in enumerate(wanted.shape or ()))

    def _dim(self, dim: int | str | None, axis: int) -> int:
        if isinstance(dim, int):
            return dim
        name = (dim or ("sequence" if axis else "batch")).lower()
        if "+" in name:  # as in "past_sequence + sequence"
            return sum(int(p) if p.strip().isdigit() else self._dim(p, axis) for p in name.split("+"))
        if "batch" in name:
            return BATCH
        if "total" in name:
            return self._past + SEQUENCE
        if "past" in name:
            return self._past
        if "height" in name or "width" in name:
            return 224
        return 3 if "channel" in name else SEQUENCE


def _table_rows(graph: GraphProto, name: str) -> int | None:
    """How many rows the constant tables have at least that an input looks up in; None where it does not."""
    tables = {t.name: tuple(t.dims) for t in graph.initializer}
    carried = {name}
    rows: list[int] = []
    for node in graph.node:
        if node.op_type in _CARRIERS and node.input[0] in carried:
            carried.update(node.output)
        elif node.op_type in _CARRIERS and node.input[0] in tables and node.op_type != "Reshape":
            tables |= dict.fromkeys(node.output, tables[node.input[0]])
        elif node.op_type == "Gather" and node.input[1] in carried and node.input[0] in tables:
            rows += _axis_length(tables[node.input[0]], {a.name: a.i for a in node.attribute})
    return min(rows, default=None)


def _axis_length(dims: tuple[int, ...], attributes: Mapping[str, int]) -> Iterator[int]:
    axis = attributes.get("axis", 0)
    if -len(dims) <= axis < len(dims):
        yield dims[axis]
