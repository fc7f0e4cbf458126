"""Nodes of every op with random inputs: what bodies, references and kernels are compared on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from qpass.ops.base import Attr, Op, Tensor
from qpass.ops.shapes import concrete

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One node to run, with its inputs in table order, None for those that are not there."""

    op: Op
    attrs: Mapping[str, Attr]
    inputs: Sequence[Array | None]

    @property
    def kinds(self) -> list[tuple[np.dtype[Any], tuple[int, ...]] | None]:
        return [None if x is None else (x.dtype, x.shape) for x in self.inputs]

    @property
    def outputs(self) -> list[Tensor]:
        return [o for o in self.op.outputs if o.present(self.attrs)]

    @cached_property
    def reference(self) -> list[Array]:
        return self.op.reference(self.inputs, self.attrs)

    @cached_property
    def unrounded(self) -> list[Array]:
        """The reference with its floats before they are rounded to 16 bits."""
        return list(self.op.compute(self.op.tensors(self.inputs, self.attrs), self.attrs))

    def __str__(self) -> str:
        x = next((x.dtype for x in self.inputs if x is not None), None)
        return f"{self.op.name} {x} {dict(self.attrs)}"


def signatures(op: Op) -> Iterator[dict[str, Attr]]:
    """The attributes of every combination of optional tensors and allowed values."""
    optional = [i.name for i in op.inputs if i.when]
    by_input = {i.when.attribute for i in op.inputs if i.when}
    alone = [o.name for o in op.outputs if o.when and o.when.attribute not in by_input]
    settled = by_input | {o.when.attribute for o in op.outputs if o.when}
    free = {a.name: a.allowed for a in op.attributes if a.allowed is not None and a.name not in settled}
    for there in _subsets(optional):
        if any(i.needs and i.name in there and i.needs not in there for i in op.inputs):
            continue
        inputs = {i.name for i in op.inputs if not i.when} | there
        for asked in _subsets(alone):
            outputs = {o.name for o in op.outputs if not o.when} | asked
            if any(o.needs and o.name in outputs and o.needs not in inputs for o in op.outputs):
                continue
            for values in itertools.product(*free.values()):
                yield op.attributes_for(inputs, outputs, dict(zip(free, values, strict=True)))


def _subsets(names: Sequence[str]) -> Iterator[set[str]]:
    for there in itertools.product((False, True), repeat=len(names)):
        yield set(itertools.compress(names, there))


def example(
    op: Op,
    attrs: Mapping[str, Attr],
    dtype: np.dtype[Any],
    lead: tuple[int, ...] = (2, 3),
    n: int = 24,
    k: int = 128,
    seed: int = 0,
) -> Case:
    """A case with random inputs of the declared shapes; `lead` stands for `...`."""
    rng = np.random.default_rng(seed)
    dims = {"N": n, "K": k}

    def array(tensor: Tensor) -> Array:
        shape = concrete(tensor.shape, attrs, dims, lead)
        if tensor.kind == "int8":
            low, high = (-8, 8) if tensor.name == "zero" else (-128, 128)
            return rng.integers(low, high, shape).astype(np.int8)
        if tensor.kind == "float32":
            about = 0.02 if tensor.name.startswith("scale") else 1.0
            return (rng.uniform(0.5, 2, shape) * about).astype(np.float32)
        t = dtype if tensor.kind == "T" else helper.tensor_dtype_to_np_dtype(int(attrs["output_type"]))
        return rng.normal(size=shape).astype(t)

    return Case(op, attrs, [array(i) if i.present(attrs) else None for i in op.inputs])
