"""How a Linear reads the rows of a value: as they are, or regrouped by Reshapes, which its result then needs too.

A Linear works on each row alone, so it may take the value itself and have its result regrouped in place of the value.
"""

from __future__ import annotations

import numpy as np

from qpass.graph import Const, Node, Value
from qpass.rewriter import Emit
from qpass.rewriter.view import KEEPS_LAST
from qpass.rules.linears import Linear

_OF_DIMS = frozenset({"Cast", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
"""Ops that make of the dims of tensors dims that are 0 only where one of those is."""


def readable(x: Value, h: Linear) -> bool:
    """Whether a Linear that reads a view of x's rows can take `x` itself, its result reshaped where that is needed."""
    return same_rows(x, h.x) or _lead(h.x) is not None or _target(x, h.x) is not None


def as_read(y: Value, x: Value, h: Linear, new: Emit) -> Value:
    """`y`, the Linear's result over the rows of `x`, with its rows as those of the view that the Linear reads."""
    if same_rows(x, h.x):
        return y
    n = h.w.shape[1]
    if (lead := _lead(h.x)) is not None:
        return new.onnx("Reshape", y, _integers(*lead, n), like=h.y)
    ints, rank = np.dtype(np.int64), len(h.x.shape or ())
    dims = new.onnx("Slice", _target(x, h.x), _integers(0), _integers(-1), dtype=ints, shape=(rank - 1,))
    target = new.onnx("Concat", dims, _integers(n), dtype=ints, shape=(rank,), axis=0)
    return new.onnx("Reshape", y, target, like=h.y)


def same_rows(x: Value, view: Value) -> bool:
    """Whether a view of x's rows has x's leading dims: nothing between them regroups, or all dims are known."""
    v: Value | None = view
    while v is not None and v is not x:
        maker = v.producer
        v = maker.inputs[0] if maker is not None and maker.op not in KEEPS_LAST else None
    return v is x or (x.shape is not None and x.shape == view.shape and None not in x.shape)


def _lead(view: Value) -> list[int] | None:
    """The leading dims of a view as a Reshape's target has them; None where two of them are unknown."""
    if view.shape is None:
        return None
    lead = [d if isinstance(d, int) else -1 for d in view.shape[:-1]]
    return lead if lead.count(-1) <= 1 else None


def _target(x: Value, view: Value) -> Value | None:
    """The target of the one Reshape that makes `view` of x's rows: with another last dim it makes those of x · w.

    A 0 in it copies a dim of x. None where that may be x's last dim, which is another in x · w.
    """
    if x.shape is None or view.shape is None:
        return None
    reshape: Node | None = None
    v = view
    while v is not x:
        maker = v.producer
        if maker is None:
            return None
        if maker.op in KEEPS_LAST:
            if reshape is not None or maker.op != "Reshape" or maker.attrs.get("allowzero"):
                return None
            reshape = maker
        v = maker.inputs[0]
    if reshape is None:
        return None
    target = reshape.inputs[1]
    copies = range(len(x.shape) - 1, len(view.shape) - 1)
    return target if not copies or _nonzero(target, copies, len(view.shape)) else None


def _nonzero(target: Value, at: range, rank: int) -> bool:
    """Whether entries of a Reshape's target are constants other than 0, or dims of tensors that are not empty."""
    maker = target.producer
    if maker is None or maker.op != "Concat" or len(maker.inputs) != rank:
        return False
    return all(v.shape == (1,) for v in maker.inputs) and all(_is_dim(maker.inputs[i]) for i in at)


def _is_dim(v: Value | Const) -> bool:
    if isinstance(v, Const):
        return v.array.size == 1 and v.load().item() != 0
    maker = v.producer
    if maker is None:
        return False
    if maker.op == "Constant":
        value = maker.attrs.get("value")
        return isinstance(value, Const) and _is_dim(value)
    if maker.op == "Shape":
        return True
    return maker.op in _OF_DIMS and all(_is_dim(i) for i in maker.inputs[: 2 if maker.op == "Mul" else 1])


def _integers(*numbers: int) -> np.typing.NDArray[np.int64]:
    return np.array(numbers, np.int64)
