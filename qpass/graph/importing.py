"""From a proto to the graphsurgeon graph that rules see.

graphsurgeon's own importer loses models over attributes, types and names that it does not know (GRAPHS,
optional types, bytes that are no text, an initializer that is an input too). The written file comes from the
protos anyway, so what graphsurgeon has no form for is kept here as its proto.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto

from qpass.errors import QpassError
from qpass.graph.dtypes import DType, to_numpy
from qpass.graph.ir import Const, Node, Shape, Value
from qpass.graph.load import Weights, default_opset
from qpass.graph.stand_ins import stand_in
from qpass.graph.wire import SMALL

Scope = Mapping[str, Value | Const]


def infer_shapes(proto: ModelProto) -> ModelProto:
    """A copy of the model with all shapes that onnx can infer, and without the bytes of its weights.

    In memory: inference by path rewrites the input file. What cannot be inferred stays unknown.
    """
    stub = ModelProto()
    stub.CopyFrom(proto)
    _strip(stub.graph)
    stand_in(stub)
    for data_prop in (True, False):  # some models make data propagation throw
        try:
            return onnx.shape_inference.infer_shapes(stub, strict_mode=False, data_prop=data_prop)
        except Exception:  # onnx throws several types; unknown shapes are no error
            continue
    return stub


def _strip(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _strip_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _strip_tensor(attribute.t)
            elif attribute.type == AttributeProto.GRAPH:
                _strip(attribute.g)


def _strip_tensor(tensor: TensorProto) -> None:
    if tensor.ByteSize() > SMALL or tensor.data_location == TensorProto.EXTERNAL:
        tensor.CopyFrom(_stub(tensor.name, tensor.dims, tensor.data_type))


def _stub(name: str, dims: Iterable[int], data_type: int) -> TensorProto:
    """A tensor without its values."""
    return TensorProto(name=name, dims=dims, data_type=data_type, data_location=TensorProto.EXTERNAL)


def import_model(path: Path, proto: ModelProto, weights: Weights) -> gs.Graph:
    """The graph of a model: our Node, Value and Const, each with its proto. Raises QpassError for a broken graph."""
    importer = _Importer(path, proto, weights)
    return importer.graph(proto.graph, infer_shapes(proto).graph, {})


class _Importer:
    def __init__(self, path: Path, proto: ModelProto, weights: Weights) -> None:
        self.path, self.proto, self.weights = path, proto, weights
        self.opset = default_opset(proto)

    def graph(self, proto: GraphProto, inferred: GraphProto, outer: Scope) -> gs.Graph:
        """`inferred` is the same graph with more value infos; `outer` are the tensors of the graphs around it."""
        types = {v.name: v.type for v in (*inferred.value_info, *inferred.output, *inferred.input)}
        here: dict[str, Value | Const] = {}
        constants = {t.name: t for t in proto.initializer}
        if len(constants) != len(proto.initializer):
            raise self._broken(f"two initializers are called '{_repeated(t.name for t in proto.initializer)}'")
        inputs = [self._value(v.name, v.type) for v in proto.input if not self._constant_input(v, constants)]
        for value in inputs:
            here[value.name] = value
            if value.name in constants:
                value.default = self.weights.of(constants[value.name])
        for name, tensor in constants.items():
            if name not in here:
                here[name] = Const(name, self.weights.of(tensor), proto=tensor)
        for sparse in proto.sparse_initializer:
            name = sparse.values.name
            here[name] = self._value(name, types.get(name))
        for node in proto.node:
            for name in filter(None, node.output):
                if name in here:
                    raise self._broken(f"two things are called '{name}', one of them an output of {_label(node)}")
                here[name] = self._value(name, types.get(name))
        scope = {**outer, **here} if outer else here
        nodes = [self._node(n, i, scope) for n, i in zip(proto.node, inferred.node, strict=True)]
        outputs = [self._lookup(v.name, scope, "the graph's outputs") for v in proto.output]
        return gs.Graph(
            nodes=nodes,
            inputs=inputs,
            outputs=outputs,
            name=proto.name,
            doc_string=proto.doc_string,
            opset=self.opset,
            import_domains=self.proto.opset_import,
            producer_name=self.proto.producer_name,
            producer_version=self.proto.producer_version,
            ir_version=self.proto.ir_version,
        )

    def _constant_input(self, value: ValueInfoProto, constants: dict[str, TensorProto]) -> bool:
        """Before ir_version 4 every initializer had to be an input too and was constant; since then it is a default."""
        return value.name in constants and self.proto.ir_version < 4

    def _node(self, proto: NodeProto, inferred: NodeProto, scope: Scope) -> Node:
        attrs = {a.name: self._attribute(a, i, scope) for a, i in zip(proto.attribute, inferred.attribute, strict=True)}
        node = Node(
            op=proto.op_type,
            name=proto.name,
            attrs=attrs,
            inputs=[self._lookup(name, scope, _label(proto)) for name in proto.input],
            outputs=[scope[name] if name else Value("") for name in proto.output],
            domain=proto.domain if proto.HasField("domain") else None,
        )
        node.proto = proto
        node.overload = proto.overload
        return node

    def _attribute(self, proto: AttributeProto, inferred: AttributeProto, scope: Scope) -> Any:
        match proto.type:
            case AttributeProto.FLOAT:
                return proto.f
            case AttributeProto.INT:
                return proto.i
            case AttributeProto.STRING:
                return _text(proto.s)
            case AttributeProto.TENSOR:
                return Const(proto.t.name, self.weights.of(proto.t), proto=proto.t)
            case AttributeProto.GRAPH:
                return self.graph(proto.g, inferred.g, scope)
            case AttributeProto.FLOATS:
                return list(proto.floats)
            case AttributeProto.INTS:
                return list(proto.ints)
            case AttributeProto.STRINGS:
                return [_text(s) for s in proto.strings]
            case _:
                return proto

    def _lookup(self, name: str, scope: Scope, reader: str) -> Value | Const:
        if not name:
            return Value("")
        if name not in scope:
            raise self._broken(f"{reader} needs '{name}', which nothing makes")
        return scope[name]

    def _value(self, name: str, type_: TypeProto | None) -> Value:
        dtype, shape, kind = _type(type_)
        return Value(name, dtype=dtype, shape=shape, type=kind)

    def _broken(self, what: str) -> QpassError:
        return QpassError(f"{self.path} is no valid model: {what}; export it again (onnx.checker tells more)")


def _type(proto: TypeProto | None) -> tuple[DType | None, Shape | None, str]:
    kind = proto.WhichOneof("value") if proto is not None else None
    if proto is None or kind != "tensor_type":
        return None, None, kind or "tensor_type"
    tensor = proto.tensor_type
    shape = tuple(_dim(d) for d in tensor.shape.dim) if tensor.HasField("shape") else None
    try:
        return to_numpy(tensor.elem_type) if tensor.elem_type else None, shape, kind
    except ValueError:  # a type newer than the installed onnx: nothing that a rule would touch
        return None, shape, kind


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _label(node: NodeProto) -> str:
    return f"{node.op_type} '{node.name}'" if node.name else f"the {node.op_type} that makes {list(node.output)}"


def _repeated(names: Iterable[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)
