"""What stands between a model's file and a parser that does not know all that is in it. The file stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner

from qpass.engine.opset import lower
from qpass.errors import QpassError
from qpass.graph import Model
from qpass.ops import DOMAIN
from qpass.plugins import OpInfo

VIEWS, FLOAT_TYPE = "int32_views", "float_type"
"""Attributes by which plugin_v2.cpp knows: bit i is set where input i is an int32 view of int8 weights; and what a
plugin's floats are."""
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
        QpassError: an op needs a later opset, or weights are not a multiple of four bytes wide.
    """
    model = onnx.load(path, load_external_data=False)
    _tell_types(model, path)
    kept = [f for f in model.functions if ops is None or f.domain != DOMAIN]
    del model.functions[:]
    if kept:
        model.functions.extend(kept)
        model = inliner.inline_local_functions(model)
    model = lower(model, 17)
    integers: set[str] = set()
    packed: dict[str, TensorProto] = {}
    for node, weights in _nodes(model.graph, {}):
        if ops is None or node.domain != DOMAIN:
            continue
        attributes = {a.name: a.i for a in node.attribute if a.type == AttributeProto.INT}
        written = [o for o in ops[node.op_type].outputs if _is_there(o, attributes)]
        integers |= {name for name, o in zip(node.output, written, strict=True) if o["kind"] == "int8"}
        read = {i: weights[n] for i, n in enumerate(node.input) if n in weights and _is_packed(weights[n])}
        packed |= {node.input[i]: weight for i, weight in read.items()}
        node.attribute.append(helper.make_attribute(FLOAT_TYPE, PRECISIONS[precision]))
        node.attribute.append(helper.make_attribute(VIEWS, sum(1 << i for i in read)))
        for i, weight in read.items():
            if weight.dims[-1] % 4:
                raise QpassError(
                    f"{node.name}: TensorRT 8.6 takes int8 weights four at a time, and the rows of {node.input[i]} "
                    f"{list(weight.dims)} are no multiple of it; exclude this layer from quantization"
                )
    for weight in packed.values():
        _view_as_int32(weight)
    return Lowered(model, frozenset(integers), precision)


def _tell_types(model: ModelProto, path: str) -> None:
    """Write down what plugin nodes return, so that onnx can infer types behind them without their functions."""
    told = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    for value in (v for n in Model.load(Path(path)).graph.nodes if n.domain == DOMAIN for v in n.outputs):
        if value.name not in told and value.dtype is not None:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
            model.graph.value_info.append(helper.make_tensor_value_info(value.name, kind, value.shape))


def _nodes(graph: GraphProto, outer: Weights) -> Iterator[tuple[NodeProto, Weights]]:
    """Every node with the weights that it can see."""
    constants = [n for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")]
    weights = {**outer, **{w.name: w for w in graph.initializer}, **{n.output[0]: n.attribute[0].t for n in constants}}
    for node in graph.node:
        yield node, weights
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inner, weights)


def _is_there(slot: Mapping[str, object], attributes: Mapping[str, int]) -> bool:
    when = slot["when"]
    if not isinstance(when, Mapping):
        return True
    return bool(attributes.get(when["attribute"], 0) & when["mask"]) == bool(when["on"])


def _is_packed(weight: TensorProto) -> bool:
    return weight.data_type == TensorProto.INT8 and len(weight.dims) > 0


def _view_as_int32(weight: TensorProto) -> None:
    """Four numbers in one. Their bytes stay where they are."""
    if weight.int32_data:  # one number each
        weight.raw_data = bytes(value & 0xFF for value in weight.int32_data)
        del weight.int32_data[:]
    weight.data_type = TensorProto.INT32
    weight.dims[-1] //= 4
