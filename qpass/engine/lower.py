"""What stands between a model's file and a parser that does not know all that is in it. The file stays as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    helper,
    inliner,
)

from qpass.engine.opset import infer_types, lower
from qpass.errors import QpassError
from qpass.graph.load import default_opset, is_external
from qpass.graph.walk import graphs_of
from qpass.ops import DOMAIN
from qpass.plugins import OpInfo

DIMS, FLOAT_TYPE = "int8_dims", "float_type"
"""Attributes by which plugin_v2.cpp knows of each input the rank and dims of the int8 numbers that come as int32 (rank
0: it comes as it is), and what a plugin's floats are."""
PRECISIONS = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}

Weights = Mapping[str, TensorProto]


@dataclass(frozen=True)
class Lowered:
    """A model for a parser.

    Args:
        model: weights in other files are still there; None where the parser can take the file itself.
        integers: tensors that plugins write int8 numbers to.
        precision: of its floats, a key of `PRECISIONS`; None where the model's types say it.
    """

    model: ModelProto | None
    integers: frozenset[str] = frozenset()
    precision: str | None = None


def inlined(path: str) -> ModelProto | None:
    """A model without local functions, its weights left where they are, its nodes named uniquely.

    None where it has no functions.

    TensorRT expands functions by itself, but TensorRT-RTX refuses the second call of one that holds a DequantizeLinear:
    it gives the nodes of both the same names.
    """
    model = onnx.load(path, load_external_data=False)
    if not model.functions:
        return None
    model = inliner.inline_local_functions(model)
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}#{i}"
        seen.add(node.name)
    return model


def for_tensorrt8(path: str, ops: Mapping[str, OpInfo] | None, precision: str = "fp16") -> Lowered:
    """A model that TensorRT 8.6 can parse: at most opset 17, no local functions, packed weights as int32.

    Args:
        ops: of the plugin library; None expands the bodies of their nodes instead.
        precision: what plugins compute in, and TensorRT's own layers mostly.

    Raises:
        QpassError: an op needs a later opset than its parser knows, a plugin reads constants alone, or an int8
            weight is read where it takes none.
    """
    model = onnx.load(path, load_external_data=False)
    _fix_defaults(model)
    infer_types(model)  # while nodes have functions: behind plugins onnx knows no type
    kept = [f for f in model.functions if ops is None or f.domain != DOMAIN]
    del model.functions[:]
    if kept:
        model.functions.extend(kept)
        model = _inlined_at_one_opset(model)
    model = lower(model, 17)
    integers: set[str] = set()
    views: dict[int, TensorProto] = {}  # by identity: branches may have two weights of one name
    others = _read_by_others(model.graph)
    for node, graph, weights in list(_nodes(model.graph, {})):
        _check_integers(node, weights)
        if ops is None or node.domain != DOMAIN:
            continue
        if all(name in weights for name in node.input):
            raise QpassError(
                f"{node.name} ({node.op_type}) reads constants alone ({', '.join(node.input)}), at which TensorRT "
                "8.6 crashes; build with TensorRT 10 or later"
            )
        attributes = {a.name: a.i for a in node.attribute if a.type == AttributeProto.INT}
        written = [o for o in ops[node.op_type].outputs if _is_there(o, attributes)]
        integers |= {name for name, o in zip(node.output, written, strict=True) if o["kind"] == "int8"}
        node.attribute.append(helper.make_attribute(FLOAT_TYPE, PRECISIONS[precision]))
        dims: list[int] = []
        for i, name in enumerate(node.input):
            weight = weights.get(name)
            if weight is None or weight.data_type != TensorProto.INT8 or not weight.dims:
                dims.append(0)
                continue
            dims += [len(weight.dims), *weight.dims]
            if name in others:
                weight = _copy(weight, graph, f"{name}.int32")
                node.input[i] = weight.name
            views[id(weight)] = weight
        node.attribute.append(helper.make_attribute(DIMS, dims))
    for weight in views.values():
        _view_as_int32(weight, Path(path))
    return Lowered(model, frozenset(integers), precision)


def _fix_defaults(model: ModelProto) -> None:
    """Inputs that have a default become the constants that its parser takes them for; old files list all weights so."""
    defaults = {w.name for w in model.graph.initializer}
    needed = [v for v in model.graph.input if v.name not in defaults]
    if len(needed) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(needed)
        model.ir_version = max(model.ir_version, onnx.IR_VERSION_2019_1_22)  # before, a constant must be an input


def _inlined_at_one_opset(model: ModelProto) -> ModelProto:
    """The model without local functions, those of another opset brought to its own."""
    try:
        return inliner.inline_local_functions(model, convert_version=True)
    except RuntimeError as error:
        mine = default_opset(model)
        others = [f"{f.name} of {default_opset(f)}" for f in model.functions if default_opset(f) not in (None, mine)]
        raise QpassError(
            f"the model is of opset {mine}, its local functions are not ({', '.join(others)}), and onnx cannot bring "
            "them to it; export the model with one opset"
        ) from error


def _nodes(graph: GraphProto, outer: Weights) -> Iterator[tuple[NodeProto, GraphProto, Weights]]:
    """Every node with its graph and the weights that it can see."""
    constants = [n for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")]
    weights = {**outer, **{w.name: w for w in graph.initializer}, **{n.output[0]: n.attribute[0].t for n in constants}}
    for node in graph.node:
        yield node, graph, weights
        for attribute in node.attribute:
            for inner in graphs_of(attribute):
                yield from _nodes(inner, weights)


def _read_by_others(graph: GraphProto) -> set[str]:
    """The names that nodes which are no plugins read, and outputs."""
    nodes = [n for n, _, _ in _nodes(graph, {})]
    return {i for n in nodes if n.domain != DOMAIN for i in n.input} | {o.name for o in graph.output}


def _check_integers(node: NodeProto, weights: Weights) -> None:
    """Raise QpassError where an int8 weight is read by a node whose int8 its parser refuses, without a name."""
    if node.domain == DOMAIN or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return
    for name in node.input:
        if name in weights and weights[name].data_type == TensorProto.INT8:
            raise QpassError(
                f"{node.name} ({node.op_type}) reads the int8 weight {name}, which TensorRT 8.6 takes only where a "
                "plugin, QuantizeLinear or DequantizeLinear reads it; keep this weight in float"
            )


def _is_there(slot: Mapping[str, object], attributes: Mapping[str, int]) -> bool:
    when = slot["when"]
    if not isinstance(when, Mapping):
        return True
    return bool(attributes.get(when["attribute"], 0) & when["mask"]) == bool(when["on"])


def _copy(weight: TensorProto, graph: GraphProto, name: str) -> TensorProto:
    """The same numbers under another name, once a graph."""
    there: list[TensorProto] = [w for w in graph.initializer if w.name == name]
    if there:
        return there[0]
    fresh: TensorProto = graph.initializer.add()
    fresh.CopyFrom(weight)
    fresh.name = name
    return fresh


def _view_as_int32(weight: TensorProto, model: Path) -> None:
    """A vector of int32 with the bytes of int8 numbers, which stay where they are unless they must be padded."""
    count = math.prod(weight.dims)
    if weight.int32_data:  # one number each
        weight.raw_data = bytes(value & 0xFF for value in weight.int32_data)
        del weight.int32_data[:]
    if count % 4:
        if is_external(weight):
            external_data_helper.load_external_data_for_tensor(weight, str(model.parent))
            weight.ClearField("external_data")
            weight.ClearField("data_location")
        weight.raw_data += bytes(-count % 4)
    weight.data_type = TensorProto.INT32
    weight.dims[:] = [-(-count // 4)]
