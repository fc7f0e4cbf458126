"""What is known of a graph's tensors before it runs: types, as far as onnx infers them, and small constant values."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from qpass.graph.load import is_external
from qpass.graph.walk import all_nodes, graphs_of

DEFAULT = ("", "ai.onnx")

SMALL = 1024
"""Elements of the largest tensor that may be one of axes, sizes or a shape."""

FOLDED = frozenset({"Add", "And", "Cast", "Concat", "Div", "Equal", "Gather", "Identity", "Mod", "Mul", "Not"})
FOLDED |= {"Range", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"}
"""What axes and sizes are computed by."""

FOLDED_OF_OWN = FOLDED | {"Exp", "Log", "Neg", "Pow", "Reciprocal", "Sqrt"}
"""What functions of onnx's compute their numbers by, such as the √2 of Gelu."""


class Scope:
    """What is known of the tensors in a graph and those around it: types, and the values of small constants."""

    def __init__(self, graph: GraphProto, outer: Scope | None = None, own: bool = False) -> None:
        self.outer = outer
        self.own = own  # whether this is a function of onnx's
        fed = {v.name for v in graph.input}
        self._tensors = {t.name: t for t in graph.initializer if t.name not in fed}
        self._types = {t.name: helper.make_tensor_type_proto(t.data_type, t.dims) for t in graph.initializer}
        self._types |= _told(graph)
        self._made = {o: n for n in graph.node for o in n.output}
        self._values: dict[str, NDArray[Any] | None] = {}

    def type(self, name: str) -> TypeProto:
        """Empty where it is not known."""
        if name in self._types:
            return self._types[name]
        return self.outer.type(name) if self.outer else TypeProto()

    def dims(self, name: str) -> list[int | None] | None:
        tensor = self.type(name).tensor_type
        if not tensor.HasField("shape"):
            return None
        known = (d.HasField("dim_value") and d.dim_value >= 0 for d in tensor.shape.dim)  # −1: some exporters' "open"
        return [d.dim_value if k else None for d, k in zip(tensor.shape.dim, known, strict=True)]

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value, where it is small and the same in every run."""
        if name not in self._values:
            if name in self._tensors:
                self._values[name] = _array(self._tensors[name])
            elif name in self._made:
                self._values[name] = self._computed(self._made[name])
            else:
                return self.outer.constant(name) if self.outer and name not in self._types else None
        return self._values[name]

    def integers(self, node: NodeProto, index: int) -> list[int] | None:
        """The values of an input; none where it is left out, None where it is not constant."""
        if not has_input(node, index):
            return []
        found = self.constant(node.input[index])
        return None if found is None else [int(v) for v in found.reshape(-1)]

    def _computed(self, node: NodeProto) -> NDArray[Any] | None:
        if node.domain not in DEFAULT:
            return None
        if node.op_type == "Constant":
            a = node.attribute[0]
            dtype = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32}.get(a.name)
            return np.array(helper.get_attribute_value(a), dtype) if dtype else _array(a.t)
        if node.op_type in ("Shape", "Size"):  # the type is enough
            dims = self.dims(node.input[0])
            part = None if dims is None else dims[get_attribute(node, "start") : get_attribute(node, "end")]
            if part is None or None in part:
                return None
            return np.array(part if node.op_type == "Shape" else prod(d or 0 for d in part), np.int64)
        if self.own and node.op_type == "CastLike":  # the value of the second input is no matter
            return self._cast(node)
        if node.op_type not in (FOLDED_OF_OWN if self.own else FOLDED):
            return None
        # a model's floats are the engine's: it may round in another way. TensorRT 8.6 computes those of a function
        # anew in every run, each by a kernel of its own
        kinds = "bif" if self.own else "bi"
        inputs = {i: self.constant(i) for i in node.input if i}
        if any(v is None or v.dtype.kind not in kinds for v in inputs.values()):
            return None
        try:
            results: Any = ReferenceEvaluator(node).run(None, inputs)
        except Exception:  # of a branch that never runs, such as an axis that is not there
            return None
        found = np.asarray(results[0])
        return found if found.dtype.kind in kinds and found.size <= SMALL else None

    def _cast(self, node: NodeProto) -> NDArray[Any] | None:
        value, kind = self.constant(node.input[0]), self.type(node.input[1]).tensor_type.elem_type
        if value is None or not kind:
            return None
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        return value.astype(dtype) if dtype.kind in "bif" else None


def complete_types(model: ModelProto) -> None:
    """Infer the types that a model does not tell."""
    if all(o in told for g in _graphs(model.graph) for told in [_told(g)] for n in g.node for o in n.output if o):
        return
    light = GraphProto(name=model.graph.name, node=model.graph.node)
    for field in ("input", "output", "value_info"):
        getattr(light, field).extend(getattr(model.graph, field))
    for t in model.graph.initializer:  # onnx infers on a copy, which needs no weights
        small = prod(t.dims) <= SMALL
        light.initializer.append(t if small else TensorProto(name=t.name, data_type=t.data_type, dims=t.dims))
    inferred = inferred_of(light, list(model.opset_import))
    for graph, twin in zip(_graphs(model.graph), _graphs(inferred), strict=True):
        told = _told(graph)
        graph.value_info.extend(v for v in (*twin.value_info, *twin.output) if v.name not in told)


def inferred_of(graph: GraphProto, opsets: list[Any]) -> GraphProto:
    """The graph with the types that onnx can tell; a node that needs more will say so."""
    try:
        return shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets), data_prop=True).graph
    except shape_inference.InferenceError:
        return graph


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in all_nodes(graph.node):
        for attribute in node.attribute:
            yield from graphs_of(attribute)


def _told(graph: GraphProto) -> dict[str, TypeProto]:
    infos = (*graph.value_info, *graph.output, *graph.input)
    return {v.name: v.type for v in infos if v.HasField("type")}


def _array(tensor: TensorProto) -> NDArray[Any] | None:
    if is_external(tensor) or prod(tensor.dims) > SMALL or not tensor.data_type:
        return None
    return numpy_helper.to_array(tensor)


def has_input(node: NodeProto, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def get_attribute(node: NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
