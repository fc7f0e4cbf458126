"""The graph as the matcher sees it: no-ops looked through, constants known, attributes by schema.

A view, not a change: nothing here touches the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from qpass.graph import Const, Model, Node, Value
from qpass.graph.dtypes import to_numpy
from qpass.rewriter.contrib import CONTRIB, Signature
from qpass.rewriter.pattern import LIFTED, MAY_BE_NOOP

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
"""What Cast's `to` may be for a cast that keeps a tensor floating-point."""

FLOAT_DTYPES = frozenset(to_numpy(t) for t in FLOATS)

SHAPE_OPS = frozenset({"Shape", "Size"})
"""Ops that read the shape of their input and none of its values."""

KEEPS_LAST = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Ops that leave rows as they are where the last dim comes out unchanged."""

MOVES_ONLY = KEEPS_LAST | {"Identity", "Cast", "Transpose", "QuantizeLinear", "DequantizeLinear"}
"""Ops that move or convert, whose result may stay for others when a match claims them: keeping one more costs nothing
worth a decline."""

RANDOM = frozenset({"Bernoulli", "Dropout", "Multinomial"}) | {
    f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")
}
"""Ops of which two with equal inputs do not give equal values."""

PRODUCTS = frozenset({"MatMul", "Gemm"})
"""Ops that count: two with equal inputs are two sites, though their values are equal."""

EVERYTHING = 2**31 - 1
"""What exporters write as the end of a Slice that has none, or more."""

SMALL = 4096
"""Bytes up to which two constants are compared by value."""


@cache
def signature(op_type: str, opset: int, domain: str) -> Signature | None:
    """The schema's signature, or None where neither onnx knows the operator nor CONTRIB does."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return CONTRIB.get((domain, op_type))
    defaults = {}
    for name, a in schema.attributes.items():
        value = onnx.helper.get_attribute_value(a.default_value) if a.default_value.name else None
        defaults[name] = value.decode() if isinstance(value, bytes) else value
    return Signature(tuple(i.name for i in schema.inputs), defaults)


class View:
    """One graph (the main one or a subgraph) of a model, read-only."""

    def __init__(self, model: Model, graph: Any) -> None:
        self.model = model
        self.graph = graph
        self.inside: Container[Node] = set(graph.nodes)
        """The nodes a match may hold: a match never reaches into an enclosing graph or a subgraph."""
        self.outputs: set[Value] = set(graph.outputs).union(*(g.outputs for _, _, g in subgraphs(graph)))
        self._opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.proto.opset_import}

    def opset(self, domain: str) -> int:
        """The model's version of a domain."""
        version: int = self._opsets.get(domain, 1)
        return version

    def signature(self, node: Node) -> Signature | None:
        """The node's schema at the model's opset of its domain."""
        domain = domain_of(node)
        return signature(node.op, self.opset(domain), domain)

    def constant(self, v: Value) -> Const | None:
        """The constant behind a value, seen through nodes that move or convert."""
        return self.model.constant(v)

    def is_output(self, v: Value) -> bool:
        """Whether `v` is an output of this graph or of one inside it, and so must keep its name and value."""
        return v in self.outputs

    # -- values that are the same

    def is_noop(self, node: Node) -> bool:
        """Whether a node gives what it takes, such as Identity, a Cast to the dtype it has, a Slice of everything."""
        if node.op not in MAY_BE_NOOP or domain_of(node):
            return False
        if node.op == "Cast":
            return node.inputs[0].dtype is not None and node.inputs[0].dtype == node.outputs[0].dtype
        if node.op == "Dropout":  # outside of training
            mask_is_used = any(v.outputs or self.is_output(v) for v in node.outputs[1:])
            return not mask_is_used and self._all(node, 2, lambda training: not training)
        before, after = node.inputs[0].shape, node.outputs[0].shape
        same_shape = before is not None and before == after and None not in before
        if node.op == "Slice":
            all_of_it = self._all(node, 1, lambda start: start == 0) and self._all(
                node, 2, lambda end: end >= EVERYTHING
            )
            fixed = same_shape and all(isinstance(d, int) for d in before or ())
            return (fixed or all_of_it) and self._all(node, 4, lambda step: step == 1)
        if node.op == "Expand":
            return same_shape
        return bool(node.op == "Identity")

    def _all(self, node: Node, index: int, holds: Callable[[Any], bool]) -> bool:
        """Whether an input is left out, or a small constant whose elements are all as wanted."""
        if index >= len(node.inputs) or not node.inputs[index].name:
            return True
        c = self.constant(node.inputs[index])
        return c is not None and c.array.nbytes <= SMALL and all(map(holds, c.load().ravel().tolist()))

    def through(self, v: Value) -> Value:
        """`v` with no-ops looked through."""
        while (node := producer(v)) is not None and self.is_noop(node):
            v = node.inputs[0]
        return v

    def uncast(self, v: Value) -> tuple[Value, list[Node]]:
        """`v` with no-ops and Casts between floating-point types looked through, and those Casts."""
        casts: list[Node] = []
        while (node := producer(v)) is not None:
            if is_float_cast(node) and node in self.inside:
                casts.append(node)
            elif not self.is_noop(node):
                break
            v = node.inputs[0]
        return v, casts

    def same(self, a: Value, b: Value, free_casts: bool = False, depth: int = 5) -> list[Node] | None:
        """Whether two values are equal by construction; the duplicate nodes behind `b` if so, else None.

        Exporters without common-subexpression elimination compute `x − mean` twice; such twins are one value.
        With `free_casts` values that differ by Casts between floating-point types are the same.
        """
        twins: list[Node] = []
        if free_casts:
            (a, _), (b, twins) = self.uncast(a), self.uncast(b)
        else:
            a, b = self.through(a), self.through(b)
        if a is b or (not a.name and not b.name):
            return twins
        ca, cb = self.constant(a), self.constant(b)
        if ca is not None and cb is not None:
            alike = ca.shape == cb.shape and ca.dtype == cb.dtype and ca.array.nbytes <= SMALL
            return twins if alike and np.array_equal(ca.load(), cb.load()) else None
        na, nb = producer(a), producer(b)
        if depth == 0 or na is None or nb is None or na.op != nb.op or domain_of(na) != domain_of(nb):
            return None
        if domain_of(na) or na.op in RANDOM or na.op in PRODUCTS:
            return None
        if na.attrs != nb.attrs or na.outputs.index(a) != nb.outputs.index(b):
            return None
        if len(na.inputs) != len(nb.inputs) or any(type(g) is type(self.graph) for g in na.attrs.values()):
            return None
        twins.append(nb)
        for x, y in zip(na.inputs, nb.inputs, strict=True):
            found = self.same(x, y, free_casts, depth - 1)
            if found is None:
                return None
            twins += found
        return twins

    # -- uses

    def keeps_rows(self, node: Node) -> bool:
        """Whether the node only regroups the leading dims, such as [B, S, K] → [B·S, K], or casts between floats."""
        if self.is_noop(node) or is_float_cast(node):
            return True
        if node.op not in KEEPS_LAST or domain_of(node):
            return False
        before, after = width(node.inputs[0]), width(node.outputs[0])
        return before is not None and before == after

    def uses(self, v: Value) -> Iterator[tuple[Node, Value]]:
        """(user, the value it takes) for every use of `v`, looking through views that keep rows; Shape is no use."""
        for node in v.outputs:
            if reads_shape(node):
                continue
            view = self.keeps_rows(node) and node.inputs[0] is v
            if not view or self.is_output(node.outputs[0]):
                yield node, v
            if view:
                yield from self.uses(node.outputs[0])


def producer(v: Value) -> Node | None:
    """The node that computes `v`; None for graph inputs and initializers."""
    return v.inputs[0] if v.inputs else None


def width(v: Value | Const) -> int | None:
    """The size of the last dim, where it is known: by the shape, or by the weight of the norm or Linear before."""
    if v.shape and isinstance(v.shape[-1], int):
        return v.shape[-1]
    maker = producer(v)
    if maker is None or maker.domain != LIFTED:
        return None
    return width(maker.inputs[1 if maker.op in ("Linear", "Norm") else 0])


def domain_of(node: Node) -> str:
    """The node's domain, the standard one as ''."""
    return node.domain if node.domain not in (None, "ai.onnx") else ""


def reads_shape(node: Node) -> bool:
    """Whether the node reads the shape of its input and none of its values."""
    return node.op in SHAPE_OPS and not domain_of(node)


def is_float_cast(node: Node) -> bool:
    """Whether the node casts from one floating-point type to another."""
    if node.op != "Cast" or domain_of(node):
        return False
    return node.attrs.get("to") in FLOATS and node.inputs[0].dtype in FLOAT_DTYPES


def subgraphs(graph: Any) -> Iterator[tuple[Node, str, Any]]:
    """(node, attribute, graph) of every graph inside this one, at any depth."""
    node: Node
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if type(value) is type(graph):
                yield node, name, value
                yield from subgraphs(value)


def named(node: Node) -> str:
    """How a message names a node: its op, and its name or that of its first output."""
    return f"{node.op} '{node.name or next((v.name for v in node.outputs if v.name), '')}'"


def describe(v: Value, view: View) -> str:
    """How a message names a value: its name and where it comes from."""
    node = producer(v)
    if node is not None and node.op != "Constant":
        return f"'{v.name}' from {named(node)}"
    return f"constant '{v.name}'" if view.constant(v) is not None else f"'{v.name}', a graph input"
