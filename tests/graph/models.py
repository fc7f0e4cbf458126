"""Models for the graph tests, made here: one with everything ONNX has, and small plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qpass.graph import Blockwise, Const, Model, Node
from qpass.graph.dtypes import Array

EXOTIC_DTYPES: tuple[Any, ...] = (
    ml_dtypes.bfloat16,
    ml_dtypes.int4,
    ml_dtypes.uint4,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float4_e2m1fn,
    np.float16,
    np.float64,
    np.bool_,
    np.int8,
    np.uint16,
    np.int64,
    np.complex64,
)


def values(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Small random numbers of any dtype."""
    numbers = np.random.default_rng(seed).integers(-3, 4, size=shape)
    return np.abs(numbers).astype(dtype) if np.dtype(dtype).name.startswith("u") else numbers.astype(dtype)


def floats(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def linear_model(
    count: int = 2, k: int = 64, n: int = 48, dtype: Any = np.float32, seed: int = 0, opset: int = 17
) -> ModelProto:
    """x → MatMul(w0) → Add(b0) → MatMul(w1) → …, with weights [K, N] and [N, K] in turn."""
    nodes, weights, x = [], [], "x"
    for i in range(count):
        shape = (k, n) if i % 2 == 0 else (n, k)
        weights.append(numpy_helper.from_array(floats(*shape, seed=seed + i, dtype=dtype), f"w{i}"))
        weights.append(numpy_helper.from_array(floats(shape[1], seed=seed + 100 + i, dtype=dtype), f"b{i}"))
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], f"mm{i}"))
        nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"y{i}"], f"add{i}"))
        x = f"y{i}"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", kind, ["batch", k])],
        [helper.make_tensor_value_info(x, kind, ["batch", n if count % 2 else k])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def save(model: ModelProto, path: Path, external: bool = False) -> Path:
    """Write a model, with its weights inside or in `<stem>.data`."""
    if external:
        copy = ModelProto()  # onnx.save changes what it is given
        copy.CopyFrom(model)
        location = f"{path.stem}.data"
        path.with_name(location).unlink(missing_ok=True)
        onnx.save(copy, path, save_as_external_data=True, location=location, size_threshold=256)
    else:
        onnx.save(model, path)
    return path


def replace(model: Model, node: Node, new: Node) -> None:
    """Put a new node in the place of another."""
    outputs = list(node.outputs)
    nodes = model.graph.nodes
    nodes[nodes.index(node)] = new
    node.detach()
    new.outputs.extend(outputs)


def int8_rows(block: Array) -> tuple[Array, ...]:
    """Round each row to int8: values and scales."""
    scale = np.abs(block.astype(np.float32)).max(axis=1) / np.float32(127)
    return np.rint(block.astype(np.float32) / scale[:, None]).astype(np.int8), scale


def quantize_all(model: Model, fn: Callable[[Array], tuple[Array, ...]] = int8_rows) -> dict[str, tuple[Array, ...]]:
    """Make every MatMul a `Quantized` node of domain qpass; returns what its new weights must be."""
    expected = {}
    for node in [n for n in model.graph.nodes if n.op == "MatMul"]:
        weight = model.constant(node.inputs[1])
        assert weight is not None
        k, n = weight.shape
        made = Blockwise(weight.array.T, fn, [((n, k), np.int8), ((n,), np.float32)], node.name)
        constants = [Const(model.unique(f"{node.name}_{i}"), r) for i, r in enumerate(made.results)]
        new = Node("Quantized", model.unique(f"{node.name}_q"), {"bits": 8}, [node.inputs[0], *constants])
        new.domain = "qpass"
        expected[node.name] = fn(weight.load().T)
        replace(model, node, new)
    return expected


def initializers(path: Path) -> dict[str, Array]:
    """The values of a model file's initializers."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def exotic_model() -> ModelProto:
    """A model with about everything that the format has and exporters seldom write. Not one to run."""
    f32 = TensorProto.FLOAT
    info = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(floats(40, 16, seed=1), "w"),
        numpy_helper.from_array(floats(16, 40, seed=2), "never used"),
        numpy_helper.from_array(floats(16, seed=3), "default"),
        numpy_helper.from_array(np.array(2.5, np.float32), "scalar"),
        numpy_helper.from_array(np.zeros((0, 4), np.float32), "empty"),
        numpy_helper.from_array(np.array(["a", "ü"], object), "text"),
        helper.make_tensor("typed", f32, [300], floats(300)),  # float_data
        helper.make_tensor("typed_half", TensorProto.FLOAT16, [700], floats(700)),  # int32_data
    ]
    weights += [
        numpy_helper.from_array(values(dtype, shape, i), f"{np.dtype(dtype).name}_{len(shape)}")
        for i, dtype in enumerate(EXOTIC_DTYPES)
        for shape in ((5, 3), (3, 31, 33))
    ]
    weights[0].doc_string = "a weight's own words"
    weights[0].metadata_props.add(key="origin", value="layer.0")
    weights[1].data_location = TensorProto.DEFAULT  # said, though it is the default

    matmul = helper.make_node("MatMul", ["x", "w"], ["a"], "mm", doc_string="a product")
    matmul.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['model', 'fc']")
    nodes = [
        matmul,
        helper.make_node("Add", ["a", "default"], ["b"], "add"),
        _empty_ints(helper.make_node("Odd", ["b", "", "scalar"], ["c", "", "d"], "odd", domain="other")),
        helper.make_node("twice", ["c"], ["e"], "call0", domain="local", overload="a", by=2.0),
        helper.make_node("twice", ["e"], ["f"], "call1", domain="local", overload="b"),
        helper.make_node("If", ["cond"], ["g"], "choose", then_branch=_branch(1), else_branch=_branch(2)),
        helper.make_node("Loop", ["", "cond", "g"], ["h"], "loop", body=_body()),
        helper.make_node("Optional", [], ["maybe"], type=helper.make_tensor_type_proto(f32, [3])),
        helper.make_node("SequenceConstruct", ["h", "h"], ["sequence"]),
        helper.make_node("Constant", [], ["sparse_const"], sparse_value=_sparse("")),
        helper.make_node("Constant", [], ["big"], value=numpy_helper.from_array(floats(40, 30))),
        helper.make_node("Odd", ["h", "sparse", "sparse_const", "big", "text"], ["y"], domain="other"),
    ]
    nodes[-1].attribute.append(helper.make_attribute("bytes", b"\xff\xfe\x00"))
    nodes[-1].attribute.append(helper.make_attribute("tensors", [numpy_helper.from_array(floats(300))]))
    nodes[-1].attribute.append(helper.make_attribute("graphs", [_branch(3), _branch(4)]))
    nodes[-1].attribute.append(helper.make_attribute("strings", ["p", "q"]))
    graph = helper.make_graph(
        nodes,
        "exotic",
        [info("x", f32, ["batch", 40]), info("cond", TensorProto.BOOL, []), info("default", f32, [16])],
        [info("y", f32, None), helper.make_empty_tensor_value_info("sequence")],
        weights,
        doc_string="all there is",
        value_info=[
            info("a", f32, ["batch", 16]),
            helper.make_tensor_sequence_value_info("sequence", f32, None),
            helper.make_value_info("maybe", helper.make_optional_type_proto(helper.make_tensor_type_proto(f32, [3]))),
        ],
        sparse_initializer=[_sparse("sparse")],
    )
    graph.metadata_props.add(key="graph", value="metadata")
    graph.quantization_annotation.add(tensor_name="a").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="scalar"
    )
    model = helper.make_model(
        graph,
        functions=[_twice("a"), _twice("b")],
        opset_imports=[helper.make_opsetid(d, v) for d, v in (("", 21), ("other", 3), ("local", 1))],
        ir_version=10,
        producer_name="somebody",
        producer_version="1.2",
        doc_string="a model",
    )
    model.domain, model.model_version = "org.example", 7
    helper.set_model_props(model, {"author": "me", "license": "none"})
    model.training_info.add().algorithm.name = "sgd"
    return model


def _empty_ints(node: NodeProto) -> NodeProto:
    node.attribute.append(AttributeProto(name="empty", type=AttributeProto.INTS))
    node.attribute.append(AttributeProto(name="none", type=AttributeProto.FLOATS))
    return node


def _branch(seed: int) -> onnx.GraphProto:
    """A subgraph that reads the graph around it and has initializers of its own, one of them large."""
    own = numpy_helper.from_array(floats(16, 20, seed=seed), f"own{seed}")
    out = helper.make_empty_tensor_value_info(f"out{seed}")
    node = helper.make_node("MatMul", ["f", f"own{seed}"], [f"out{seed}"], f"branch{seed}")
    return helper.make_graph([node], f"branch{seed}", [], [out], [own], doc_string="a branch")


def _body() -> onnx.GraphProto:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Identity", ["keep"], ["keep_out"]),
        helper.make_node("Mul", ["state", "scalar"], ["state_out"], "step"),
    ]
    inputs = [info("i", TensorProto.INT64, []), info("keep", TensorProto.BOOL, [])]
    inputs.append(helper.make_empty_tensor_value_info("state"))
    outputs = [helper.make_empty_tensor_value_info(n) for n in ("keep_out", "state_out")]
    return helper.make_graph(nodes, "body", inputs, outputs)


def _sparse(name: str) -> onnx.SparseTensorProto:
    picked = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), name)
    indices = numpy_helper.from_array(np.array([3, 9], np.int64))
    return helper.make_sparse_tensor(picked, indices, [16])


def _twice(overload: str) -> onnx.FunctionProto:
    scale = helper.make_node("Constant", [], ["by"])
    scale.attribute.append(AttributeProto(name="value_float", ref_attr_name="by", type=AttributeProto.FLOAT))
    function = helper.make_function(
        "local",
        "twice",
        ["t"],
        ["r"],
        [scale, helper.make_node("Mul", ["t", "by"], ["r"])],
        [helper.make_opsetid("", 21)],
        attribute_protos=[helper.make_attribute("by", 2.0)],
        overload=overload,
        doc_string="twice or more",
    )
    function.metadata_props.add(key="function", value="metadata")
    return function
