"""A model as it would be with activations in float16, all else being ONNX Runtime's: what is owed to rounding alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from qpass.graph import Model
from qpass.graph.walk import graphs_of
from qpass.ops import DOMAIN, REGISTRY


def rounded(path: Path, proto: ModelProto, of: Callable[[NodeProto], bool] = lambda _: True) -> ModelProto:
    """A copy of a model in which every float32 tensor that a node makes is rounded to float16 and back.

    Left as they are: outputs of the model, constants, what plugins hand on in float32 by their declaration (scales),
    and what onnx cannot tell the type of. A number beyond float16 becomes infinite, as in an engine.

    Args:
        path: its file, which types are read from.
        proto: the model, as `qpass.runtime.load` gives it; not changed.
        of: whether what a node makes is rounded; by default of every node.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    kinds: dict[str, set[np.dtype[np.generic] | None]] = {}  # branches may have two tensors of one name
    for value in (v for n in Model.load(path).nodes() for v in n.outputs):
        kinds.setdefault(value.name, set()).add(None if value.dtype is None else np.dtype(value.dtype))
    floats = {name for name, kind in kinds.items() if kind == {np.dtype(np.float32)}}
    _round(copy.graph, floats - {o.name for o in copy.graph.output}, of)
    return copy


def _round(graph: GraphProto, floats: set[str], of: Callable[[NodeProto], bool]) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        for inner in (g for a in node.attribute for g in graphs_of(a)):
            _round(inner, floats, of)
        nodes.append(node)
        for i in _rounded_outputs(node) if of(node) else ():
            if (name := node.output[i]) in floats:
                exact, half = f"{name}/exact", f"{name}/float16"
                node.output[i] = exact
                nodes.append(helper.make_node("Cast", [exact], [half], half, to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [half], [name], exact, to=TensorProto.FLOAT))
    copies = GraphProto(node=nodes).node  # before the originals are gone
    del graph.node[:]
    graph.node.extend(copies)


def _rounded_outputs(node: NodeProto) -> Iterator[int]:
    if node.op_type in ("Constant", "Cast"):
        return
    op = REGISTRY.get(node.op_type) if node.domain == DOMAIN else None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} if op else {}
    there = [o.kind for o in op.outputs if o.present(attributes)] if op else []
    yield from (i for i in range(len(node.output)) if there[i : i + 1] != ["float32"])
