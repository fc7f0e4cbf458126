"""A pattern node's arguments beside a graph node's inputs and attributes, by the schema of the model's opset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qpass.graph import Node, Value
from qpass.rewriter.pattern import FLOAT, LAST, Op, Pat, Var
from qpass.rewriter.view import FLOATS, SMALL, View

ABSENT = object()


@dataclass(frozen=True)
class Arguments:
    """The inputs that a pattern names by position, and the attributes that it captures."""

    inputs: tuple[Value, ...]
    attributes: tuple[tuple[Var, Any], ...]


def arguments(p: Op, node: Node, view: View, bound: Mapping[Pat, Any]) -> Arguments | str:
    """What the pattern's arguments stand for at a node, or why they do not fit.

    A keyword may be an attribute or, where the opset made it one, an input. An attribute that the pattern does
    not mention must have its default.
    """
    schema = view.signature(node)
    inputs: list[Value | None] = list(node.inputs)
    while inputs and inputs[-1] is not None and not inputs[-1].name:
        inputs.pop()  # omitted optional inputs at the end
    captured: list[tuple[Var, Any]] = []
    for name, want in p.keywords.items():
        got: Any = ABSENT
        if name in node.attrs:
            got = node.attrs[name]
        elif schema is not None and name in schema.inputs:
            at = schema.inputs.index(name)
            given = inputs[at] if at < len(inputs) else None
            if at < len(inputs):
                inputs[at] = None
            got = None
            if given is not None and given.name:
                c = view.constant(given)
                if c is None:
                    return f"{name} is computed, wants a constant"
                if c.array.nbytes > SMALL:
                    return f"{name} has {c.array.size} elements, wants an attribute's worth"
                got = c.load().ravel().tolist()
        elif schema is not None and name in schema.defaults:
            got = schema.defaults[name]
        if got is ABSENT:
            return f"{node.op} has no attribute '{name}'"
        if isinstance(want, Var):
            if want in bound and bound[want] != got:
                return f"{name} is {got}, and {bound[want]} elsewhere in the match"
            captured.append((want, got))
        elif (why := _compare(name, want, got, node)) is not None:
            return why
    for name, got in node.attrs.items():
        if name not in p.keywords and schema is not None and got != schema.defaults.get(name):
            return f"attribute {name}={got} is not in the pattern"
    left = tuple(i for i in inputs if i is not None)
    if len(left) != len(p.args):
        return f"{node.op} has {len(left)} inputs, the pattern {len(p.args)}"
    return Arguments(left, tuple(captured))


def _compare(name: str, want: Any, got: Any, node: Node) -> str | None:
    """None where an attribute has the value that the pattern wants."""
    if want is FLOAT:
        return None if got in FLOATS else f"{name} is {got}, wants a floating-point type"
    if want is LAST:
        axes = [got] if isinstance(got, int) else got
        shape = node.inputs[0].shape
        if axes == [-1] or (shape is not None and axes == [len(shape) - 1]):
            return None
        rank = f" of {len(shape)}" if shape is not None else "; the rank of the input is not known"
        return f"{name} is {got if got is not None else 'absent, which means all'}, wants the last axis{rank}"
    if isinstance(want, float):
        same = isinstance(got, int | float) and bool(np.isclose(got, want, rtol=1e-6))
    else:
        same = got == want
    return None if same else f"{name} is {got}, wants {want}"
