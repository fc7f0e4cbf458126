"""From the graph back to protos: what no rule touched comes out as it came in, and in its order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from qpass.graph.dtypes import pack, to_onnx
from qpass.graph.ir import Const, Node, Value
from qpass.graph.lazy import Lazy
from qpass.graph.load import is_external, tensors
from qpass.graph.stored import Stored
from qpass.graph.walk import all_nodes, graphs_of

if TYPE_CHECKING:
    from qpass.graph.model import Model

_DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_FUNCTIONS, _OVERLOADS = 8, 10  # the ir_versions that brought functions and several of one name


@dataclass
class Tensor:
    """A tensor to be written: its proto, and its values unless the proto holds them.

    `outside`: the input has it in a data file, where it stays however small it is: same weights, same bytes.
    """

    proto: TensorProto
    array: Lazy | None
    outside: bool = False

    @property
    def nbytes(self) -> int:
        return self.proto.ByteSize() if self.array is None else self.array.nbytes

    def take(self) -> Lazy | None:
        """The values, taken out of the proto if they are in it; None for strings, which have no place elsewhere."""
        if self.array is None and self.proto.data_type != TensorProto.STRING:
            self.array = Stored.of(self.proto)
            for field in _DATA_FIELDS:
                self.proto.ClearField(field)
        return self.array

    def fill(self) -> None:
        """Put the values into the proto."""
        if self.array is not None:
            self.proto.ClearField("external_data")
            self.proto.ClearField("data_location")
            self.proto.raw_data = bytes(pack(self.array.load()))


@dataclass
class Emitted:
    """A model to be written: `proto` has no initializers in its main graph, these are `initializers`.

    `embedded` are tensors inside `proto` (in subgraphs, attributes and functions) whose values are elsewhere.
    """

    proto: ModelProto
    initializers: list[Tensor]
    embedded: list[Tensor]


def emit(model: Model) -> Emitted:
    """The protos of a model as its graph is now."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    emitter = _Emitter()
    emitter.graph(model.graph, model.proto.graph, proto.graph)
    constants = emitter.new_constants()
    initializers = []
    for tensor in proto.graph.initializer:
        if tensor.name in constants:  # an original whose values a rule has set
            initializers.append(_new_tensor(constants.pop(tensor.name)))
        elif not is_external(tensor):
            initializers.append(Tensor(tensor, None))
        else:
            header = TensorProto()
            header.CopyFrom(model.inside.get(tensor.name, tensor))
            outside = tensor.name not in model.inside
            if outside:
                header.ClearField("external_data")
                header.ClearField("data_location")
            initializers.append(Tensor(header, model.weights.of(tensor), outside))
    initializers += [_new_tensor(const) for const in constants.values()]
    proto.graph.ClearField("initializer")

    del proto.functions[:]
    proto.functions.extend(model.functions)
    _import_domains(proto)
    if proto.functions:
        needed = _OVERLOADS if any(f.overload for f in proto.functions) else _FUNCTIONS
        proto.ir_version = max(proto.ir_version, needed)
    _check(proto.graph, {t.proto.name for t in initializers}, set())

    embedded = [Tensor(t, model.weights.of(t)) for t in filter(is_external, tensors(proto))]
    return Emitted(proto, initializers, embedded)


def _new_tensor(const: Const) -> Tensor:
    return Tensor(TensorProto(name=const.name, data_type=to_onnx(const.dtype), dims=const.shape), const.array)


class _Emitter:
    def __init__(self) -> None:
        self._new: dict[str, Const] = {}

    def new_constants(self) -> dict[str, Const]:
        """Constants that have no proto, by name, in the order of first use. They go to the main graph."""
        return self._new

    def graph(self, graph: gs.Graph, original: GraphProto, out: GraphProto) -> None:
        """Bring `out`, a copy of `original`, to what the graph is now; adds no initializers."""
        names = [t.name for t in graph.outputs], [t.name for t in original.output]
        if names[0] != names[1]:
            raise ValueError(f"the graph's outputs were {names[1]} and are {names[0]}; they must keep their names")
        nodes = [self.node(node) for node in graph.nodes]
        if nodes == list(original.node):
            return  # nothing below has changed, so all the rest stays too
        del out.node[:]
        out.node.extend(nodes)

        given = {t.name for t in graph.inputs}  # an input whose default went would become a required one
        gone = set(_reads(original)) - set(_reads(out)) - given  # only what the rewrite made useless
        constant = {t.name for t in original.initializer}
        _keep(out.initializer, lambda t: t.name not in gone)
        _keep(out.sparse_initializer, lambda t: t.values.name not in gone)
        _keep(out.input, lambda v: v.name not in gone or v.name not in constant)

        new = {t.name: t for node in graph.nodes if node.proto is None for t in node.outputs}
        made = {name for node in nodes for name in node.output} | set(_defined(out))
        _keep(out.value_info, lambda v: v.name in made and _agrees(v, new.get(v.name)))
        _keep(out.quantization_annotation, lambda q: q.tensor_name in made)

    def node(self, node: Node) -> NodeProto:
        inputs, outputs = [t.name for t in node.inputs], [t.name for t in node.outputs]
        for tensor in node.inputs:
            if isinstance(tensor, Const) and tensor.proto is None:
                self._new.setdefault(tensor.name, tensor)
                if self._new[tensor.name] is not tensor:
                    raise ValueError(f"two constants are called '{tensor.name}'")
        if node.proto is None:
            proto = NodeProto(op_type=node.op, name=node.name, input=inputs, output=outputs)
            if node.domain:
                proto.domain = node.domain
            if node.overload:
                proto.overload = node.overload
            proto.attribute.extend(self.attribute(name, value) for name, value in node.attrs.items())
            return proto

        original = node.proto
        graphs = {n: a for n, a in node.attrs.items() if isinstance(a, gs.Graph)}
        same = list(original.input) == inputs and list(original.output) == outputs
        if same and original.name == node.name and not graphs:
            return original
        proto = NodeProto()
        proto.CopyFrom(original)
        proto.input[:], proto.output[:] = inputs, outputs
        if original.name != node.name:
            proto.name = node.name
        for attribute, before in zip(proto.attribute, original.attribute, strict=True):
            if attribute.name in graphs:
                self.graph(graphs[attribute.name], before.g, attribute.g)
        return proto

    def attribute(self, name: str, value: Any) -> AttributeProto:
        if isinstance(value, AttributeProto):
            return value
        if isinstance(value, Const):
            value = value.load()
        if isinstance(value, np.ndarray):
            value = onnx.numpy_helper.from_array(value)
        if isinstance(value, gs.Graph):
            raise ValueError(f"attribute {name}: a new node with a subgraph is not supported")
        return helper.make_attribute(name, value)


def _keep(repeated: Any, wanted: Any) -> None:
    kept = [item for item in repeated if wanted(item)]
    if len(kept) != len(repeated):
        del repeated[:]
        repeated.extend(kept)


def _reads(graph: GraphProto) -> Iterator[str]:
    """The names that a graph's nodes, their subgraphs and its outputs read."""
    yield from (v.name for v in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in graphs_of(attribute):
                yield from _reads(inner)


def _defined(graph: GraphProto) -> Iterator[str]:
    yield from (t.name for t in graph.initializer)
    yield from (t.values.name for t in graph.sparse_initializer)
    yield from (v.name for v in graph.input)


def _agrees(info: ValueInfoProto, now: Value | None) -> bool:
    """Whether an original value info still tells the truth of a tensor that a new node makes."""
    return now is None or now.dtype is None or to_onnx(now.dtype) == info.type.tensor_type.elem_type


def _import_domains(proto: ModelProto) -> None:
    """Import the domains of nodes that nothing imports yet, such as qpass: version 1."""
    known = {o.domain for o in proto.opset_import} | {"", "ai.onnx"}
    for domain in sorted({node.domain for node in all_nodes(proto.graph.node)} - known):
        proto.opset_import.add(domain=domain, version=1)


def _check(graph: GraphProto, initializers: set[str], outer: set[str]) -> None:
    """What a rewrite may not break: every name is made, and made once. ValueError: a rule's fault, not the user's."""
    made = initializers | set(_defined(graph))
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made:
                raise ValueError(f"'{name}' is made twice, the second time by {node.op_type} '{node.name}'")
            made.add(name)
    visible = outer | made
    for node in graph.node:
        for name in filter(None, node.input):
            if name not in visible:
                raise ValueError(f"{node.op_type} '{node.name}' reads '{name}', which nothing makes")
        for attribute in node.attribute:
            for inner in graphs_of(attribute):
                _check(inner, set(), visible)
    for output in graph.output:
        if output.name not in visible:
            raise ValueError(f"nothing makes the graph's output '{output.name}'")
