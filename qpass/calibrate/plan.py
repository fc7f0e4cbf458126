"""Decides how many samples are run at a time and which activations are looked at together.

What counts against the budget is the activations that statistics are made of, all of which ONNX Runtime holds
until they are handed over; what it needs for itself while it runs comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from qpass.calibrate.sources import Samples, Shapes
from qpass.runtime import Input


@dataclass(frozen=True)
class Tap:
    """A tensor to look at. `shape` as far as it is known, symbols included; None where the rank is not."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def bytes(self, dims: Mapping[str, int], tokens: int) -> int:
        """Its size where symbols stand for `dims`; dims that nothing tells are `tokens` together."""
        shape = (None,) if self.shape is None else self.shape
        bound = [dims.get(d) if isinstance(d, str) else d for d in shape]
        elements = prod(d for d in bound if d is not None)
        if None in bound:
            elements = max(elements, tokens * prod(d for d in shape if isinstance(d, int)))
        return elements * (4 if self.dtype.name == "bfloat16" else self.dtype.itemsize)  # it is run in fp32


@dataclass(frozen=True)
class Plan:
    """`groups` of activations are looked at one after the other, `limits[item]` samples at a time."""

    groups: tuple[tuple[str, ...], ...]
    limits: tuple[int, ...]


def plan(taps: Sequence[Tap], samples: Samples, memory: int) -> Plan:
    """Groups as few as can be and then batches as large as can be, such that no group exceeds `memory` bytes.

    A single activation of a single sample may, for there is nothing smaller.
    """
    sizes = [_sizes(taps, samples.one(item), samples) for item in range(len(samples.sizes))]
    worst = max(sizes, key=sum)
    groups: list[list[int]] = [[]]
    held = 0
    for i, size in enumerate(worst):
        if groups[-1] and held + size > memory:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += size
    largest = [max(sum(size[i] for i in group) for group in groups) for size in sizes]
    return Plan(
        tuple(tuple(taps[i].name for i in group) for group in groups),
        tuple(max(1, memory // max(size, 1)) for size in largest),
    )


def _sizes(taps: Sequence[Tap], shapes: Shapes, samples: Samples) -> list[int]:
    dims: dict[str, int] = {}
    for name, shape in shapes.items():
        named = samples.inputs[name].shape or ()
        dims |= {d: n for d, n in zip(named, shape, strict=False) if isinstance(d, str)}
    tokens = max((_tokens(samples.inputs[n], s) for n, s in shapes.items()), default=1)
    return [tap.bytes(dims, tokens) for tap in taps]


def _tokens(wanted: Input, shape: tuple[int, ...]) -> int:
    """How many tokens an input may become: each id, vector or frame is one, and each 8 × 8 pixels of an image."""
    if wanted.dtype.kind in "iu" or len(shape) < 3:
        return prod(shape)
    return prod(shape[:2]) if len(shape) == 3 else shape[0] * prod(shape[2:]) // 64
