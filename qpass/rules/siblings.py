"""Merging siblings: Linears on one input, such as q, k, v or gate, up, become one Linear, its result split after.

A wide GEMM keeps a GPU busier than three narrow ones. Every output channel has scales of its own, so the integers and
the results are those of the Linears apart. Weights that came quantized stay apart.
"""

from __future__ import annotations

import numpy as np

from qpass.graph import Const, Given, Joined, Lazy, Value
from qpass.rewriter import Emit, Replacement, emitting, keep, respelling, rule, uses
from qpass.rules.linears import Linear, unfit
from qpass.rules.quantizer import Quantizer


class Siblings(Linear):
    """A Linear and those on the same input."""

    heads: list[Linear] = uses(Linear.x)


@emitting("Linear")
@respelling
@rule
def merge_siblings(m: Siblings, new: Emit, cfg: Quantizer) -> Replacement:
    """Linears on one input that the spec quantizes alike become one; a Split gives each its result."""
    spec = cfg.spec(m)
    if not spec.merge_siblings:
        keep("the spec merges no siblings")
    beside = [h for h in m.heads if h.x is m.x and cfg.spec_of(h) == spec and _joins(h, m)]
    heads = cfg.in_order([h for h in beside if not cfg.came_quantized(h)])
    if len(heads) < 2:
        keep("it has no sibling to be merged with")
    first = new.at(heads[0])
    w = Joined(h.w.array.T for h in heads).T
    widths = [h.w.shape[1] for h in heads]
    lead = None if m.y.shape is None else m.y.shape[:-1]

    def shaped(n: int) -> Value:
        return Value("", dtype=m.y.dtype, shape=None if lead is None else (*lead, n))

    merged = first.lifted("Linear", m.x, Const(heads[0].w.name, w), _bias(heads), like=shaped(sum(widths)))
    parts = [(v.dtype, v.shape) for v in map(shaped, widths)]
    split = first.nodes("Split", [merged, np.array(widths, np.int64)], parts, axis=-1)
    return dict(zip((h.y for h in heads), split, strict=True))


def _joins(h: Linear, m: Linear) -> bool:
    """Whether a Linear has what it takes to stand beside another in one GEMM."""
    return unfit(h) is None and h.y.dtype == m.y.dtype and h.w.dtype == m.w.dtype


def _bias(heads: list[Linear]) -> Const | None:
    """The biases one behind another, zeros for a Linear that has none; None where all have none."""
    if all(h.b is None for h in heads):
        return None
    biases: list[Lazy] = []
    for h in heads:
        zeros = Given(np.zeros(h.w.shape[1], h.y.dtype))
        biases.append(zeros if h.b is None else h.b.array.astype(zeros.dtype))
    name = next(h.b.name for h in heads if h.b is not None)
    return Const(name, Joined(biases))


MERGE = (merge_siblings,)
