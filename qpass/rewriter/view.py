"""The graph as the matcher sees it: no-ops looked through, constants known, attributes by schema.

A view, not a change: nothing here touches the graph.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx

from qpass.graph import Const, Model, Node, Value

FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE})
"""What Cast's `to` may be for a cast that keeps a tensor floating-point."""

SHAPE_OPS = frozenset({"Shape", "Size"})
"""Ops that read the shape of their input and none of its values."""

KEEPS_LAST = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Ops that leave rows as they are where the last dim comes out unchanged."""

MOVES_ONLY = KEEPS_LAST | {"Identity", "Cast", "Transpose"}
"""Ops whose result may stay for others when a match claims them: keeping one more costs nothing worth a decline."""


@dataclass(frozen=True)
class Signature:
    """Input names and attribute defaults of an operator at an opset."""

    inputs: tuple[str, ...]
    defaults: dict[str, Any]  # None where the attribute has no default


@cache
def signature(op_type: str, opset: int, domain: str) -> Signature | None:
    """The schema's signature, or None where onnx does not know the operator."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
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
        self.outputs: set[Value] = set(graph.outputs)
        self._opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.proto.opset_import}

    def signature(self, node: Node) -> Signature | None:
        """The node's schema at the model's opset of its domain."""
        domain = domain_of(node)
        return signature(node.op, self._opsets.get(domain, 1), domain)

    def constant(self, v: Value) -> Const | None:
        """The constant behind a value, seen through Identity, Transpose, Cast and Reshape."""
        return self.model.constant(v)

    def is_output(self, v: Value) -> bool:
        """Whether `v` is an output of this graph, and so must keep its name and value."""
        return v in self.outputs

    def through(self, v: Value) -> Value:
        """`v` with Identity nodes and Casts to its own dtype looked through."""
        while (node := producer(v)) is not None and is_noop(node):
            v = node.inputs[0]
        return v

    def same(self, a: Value, b: Value, depth: int = 3) -> list[Node] | None:
        """Whether two values are equal by construction; the duplicate nodes behind `b` if so, else None.

        Exporters without common-subexpression elimination compute `x − mean` twice; such twins are one value.
        """
        a, b = self.through(a), self.through(b)
        if a is b:
            return []
        if (ca := self.constant(a)) is not None and (cb := self.constant(b)) is not None:
            same_bytes = ca.shape == cb.shape and ca.dtype == cb.dtype and ca.array.nbytes <= 4096
            return [] if same_bytes and np.array_equal(ca.load(), cb.load()) else None
        na, nb = producer(a), producer(b)
        if depth == 0 or na is None or nb is None or na.op != nb.op or domain_of(na) != domain_of(nb):
            return None
        if len(na.inputs) != len(nb.inputs) or na.attrs != nb.attrs or na.outputs.index(a) != nb.outputs.index(b):
            return None
        twins = [nb]
        for x, y in zip(na.inputs, nb.inputs, strict=True):
            found = self.same(x, y, depth - 1)
            if found is None:
                return None
            twins += found
        return twins

    def keeps_rows(self, node: Node) -> bool:
        """Whether the node only regroups the leading dims: Identity, a Cast to the same dtype, [B, S, K] → [B·S, K]."""
        if is_noop(node):
            return True
        if node.op not in KEEPS_LAST or domain_of(node):
            return False
        before, after = node.inputs[0].shape, node.outputs[0].shape
        return bool(before and after and isinstance(before[-1], int) and before[-1] == after[-1])

    def uses(self, v: Value) -> Iterator[tuple[Node, Value]]:
        """(user, the value it takes) for every use of `v`, looking through views that keep rows; Shape is no use."""
        for node in v.outputs:
            if node.op in SHAPE_OPS and not domain_of(node):
                continue
            if self.keeps_rows(node) and not self.is_output(node.outputs[0]):
                yield from self.uses(node.outputs[0])
            else:
                yield node, v


def producer(v: Value) -> Node | None:
    """The node that computes `v`; None for graph inputs and initializers."""
    return v.inputs[0] if v.inputs else None


def domain_of(node: Node) -> str:
    """The node's domain, the standard one as ''."""
    return node.domain if node.domain not in (None, "ai.onnx") else ""


def is_noop(node: Node) -> bool:
    """Identity, or a Cast to the dtype its input already has."""
    if domain_of(node):
        return False
    if node.op == "Identity":
        return True
    return node.op == "Cast" and node.inputs[0].dtype is not None and node.inputs[0].dtype == node.outputs[0].dtype


def describe(v: Value, view: View) -> str:
    """How a message names a value: its name and where it comes from."""
    node = producer(v)
    if node is not None and node.op != "Constant":
        return f"'{v.name}' from {node.op} '{node.name or v.name}'"
    return f"constant '{v.name}'" if view.constant(v) is not None else f"'{v.name}', a graph input"
