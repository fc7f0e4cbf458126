"""What is known of a graph's tensors before it runs: types, as far as onnx infers them, and small constant values."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
    shape_inference,
)
from onnx.reference import ReferenceEvaluator

from qpass.graph.importing import infer_shapes
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


def infer_types(model: ModelProto) -> None:
    """Write down the types of all tensors: those that onnx infers, and what a model tells beyond, if that is true.

    A model may tell shapes of another batch than its inputs', or of a time before it was changed, and a Shape of them
    would become a wrong constant. Where one contradicts what onnx infers without them, none counts, but those of nodes
    that onnx knows nothing of.
    """
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    for t in model.graph.initializer:  # onnx infers on a copy, which needs no weights
        small = prod(t.dims) <= SMALL
        light.graph.initializer.append(t if small else TensorProto(name=t.name, data_type=t.data_type, dims=t.dims))
    told = [_told(g) for g in _graphs(model.graph)]
    _forget_shapes(light)
    symbols = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}  # open ones
    inferred = infer_shapes(light).graph
    pairs = [(t, known) for t, g in zip(told, _graphs(inferred), strict=True) for known in (*g.value_info, *g.output)]
    if not any(_contradict(t[k.name], k.type, symbols) for t, k in pairs if k.name in t):
        for graph, types in zip(_graphs(light.graph), told, strict=True):
            del graph.value_info[:]
            graph.value_info.extend(ValueInfoProto(name=n, type=t) for n, t in types.items())
        inferred = infer_shapes(light).graph
    for graph, twin in zip(_graphs(model.graph), _graphs(inferred), strict=True):
        inner = () if graph is model.graph else twin.input
        del graph.value_info[:]
        graph.value_info.extend((*twin.value_info, *twin.output, *inner))


def _forget_shapes(model: ModelProto) -> None:
    """Take out the shapes of what nodes make, if onnx has a way to infer them."""
    known = {*DEFAULT, *(f.domain for f in model.functions)}
    for graph in _graphs(model.graph):
        kept = {o for n in graph.node if n.domain not in known for o in n.output} | {t.name for t in graph.initializer}
        inner = () if graph is model.graph else graph.input
        for value in (*graph.value_info, *graph.output, *inner):
            if value.name not in kept and value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")


def _contradict(told: TypeProto, inferred: TypeProto, symbols: set[str]) -> bool:
    """Whether shapes differ in rank or in a fixed dim, or a dim is told that is inferred to be one of `symbols`."""
    if not (told.tensor_type.HasField("shape") and inferred.tensor_type.HasField("shape")):
        return False
    mine, theirs = told.tensor_type.shape.dim, inferred.tensor_type.shape.dim
    fixed = [
        (a.dim_value, b) for a, b in zip(mine, theirs, strict=False) if a.HasField("dim_value") and a.dim_value >= 0
    ]
    differ = (d.dim_value != size if d.HasField("dim_value") else d.dim_param in symbols for size, d in fixed)
    return len(mine) != len(theirs) or any(differ)


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
    infos = (*graph.input, *graph.output, *graph.value_info)  # the last are inferred
    return {v.name: v.type for v in infos if v.HasField("type")}


def _array(tensor: TensorProto) -> NDArray[Any] | None:
    if is_external(tensor) or prod(tensor.dims) > SMALL or not tensor.data_type:
        return None
    return numpy_helper.to_array(tensor)


def has_input(node: NodeProto, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def get_attribute(node: NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
