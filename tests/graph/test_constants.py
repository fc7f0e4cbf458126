"""Constants seen through the nodes that move or convert them, as ONNX Runtime computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qpass.graph import Const, Model, Value, rows_of
from tests.graph.models import exotic_model, floats, linear_model, save, values

F16, F32 = TensorProto.FLOAT16, TensorProto.FLOAT


def chain_model(folder: Path, weight: Any, nodes: list[NodeProto], **integers: Any) -> Path:
    """w → nodes (w → t0 → t1 → …), the last one an output; `integers` are more initializers."""
    tensors = [numpy_helper.from_array(weight, "w")]
    tensors += [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in integers.items()]
    output = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    graph = helper.make_graph(nodes, "chain", [], [output], tensors)
    return save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        folder / "chain.onnx",
    )


def seen(path: Path) -> Const | None:
    model = Model.load(path)
    return model.constant(model.graph.outputs[0])


def agrees_with_onnxruntime(path: Path) -> Const:
    const = seen(path)
    assert const is not None
    (expected,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})
    got = const.load()
    assert got.shape == const.shape == expected.shape
    assert got.dtype == const.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    if const.array.ndim:
        half = const.shape[0] // 2
        np.testing.assert_array_equal(const.array.rows(half, const.shape[0]), expected[half:])
    return const


def step(op: str, i: int, *more: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, ["w" if i == 0 else f"t{i - 1}", *more], [f"t{i}"], f"n{i}", **attributes)


def test_an_initializer_is_itself(tmp_path: Path) -> None:
    model = Model.load(save(linear_model(), tmp_path / "m.onnx"))
    tensor = model.graph.nodes[0].inputs[1]
    const = model.constant(tensor)
    assert const is tensor
    assert isinstance(const, Const)
    assert (const.origin, const.via, const.root) == ("w0", (), tensor)


def test_a_chain(tmp_path: Path) -> None:
    nodes = [step("Identity", 0), step("Transpose", 1), step("Cast", 2, to=F16), step("Reshape", 3, "shape")]
    const = agrees_with_onnxruntime(chain_model(tmp_path, floats(6, 4), nodes, shape=[2, -1, 3]))
    assert (const.name, const.origin, const.root.name) == ("t3", "w", "w")
    assert [n.name for n in const.via] == ["n0", "n1", "n2", "n3"]
    assert const.uses == []


STEPS: dict[str, list[tuple[str, list[str], dict[str, Any]]]] = {
    "identity": [("Identity", [], {})],
    "transpose": [("Transpose", [], {})],
    "permute": [("Reshape", ["three"], {}), ("Transpose", [], {"perm": [2, 0, 1]})],
    "to fp16": [("Cast", [], {"to": F16})],
    "to fp32": [("Cast", [], {"to": F32})],
    "flatten": [("Reshape", ["flat"], {})],
    "keep the first": [("Reshape", ["keep"], {})],
    "squeeze all": [("Squeeze", [], {})],
    "there and back": [("Unsqueeze", ["ends"], {}), ("Squeeze", ["first"], {})],
    "unsqueeze": [("Unsqueeze", ["first"], {})],
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6))
def test_any_chain(tmp_path: Path, names: list[str]) -> None:
    flat = [part for name in names for part in STEPS[name]]
    nodes = [step(op, i, *inputs, **attributes) for i, (op, inputs, attributes) in enumerate(flat)]
    integers = {"three": [2, -1, 3], "flat": [-1], "keep": [0, -1], "first": [0], "ends": [-1, 0]}
    agrees_with_onnxruntime(chain_model(tmp_path, floats(6, 4), nodes, **integers))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("value", numpy_helper.from_array(floats(3, 4))),
        ("value_float", 2.5),
        ("value_floats", [1.0, 2.0]),
        ("value_int", 7),
        ("value_ints", [1, 2, 3]),
    ],
)
def test_constant_nodes(tmp_path: Path, attribute: str, value: Any) -> None:
    constant = helper.make_node("Constant", [], ["c"], **{attribute: value})
    nodes = [constant, helper.make_node("Identity", ["c"], ["y"])]
    const = agrees_with_onnxruntime(chain_model(tmp_path, floats(1), nodes))
    assert (const.origin, [n.op for n in const.via]) == ("c", ["Identity"])
    assert isinstance(const.root, Value)
    assert const.root.producer is not None
    assert const.root.producer.op == "Constant"


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16", "int32", "float64", "bool"])
@pytest.mark.parametrize("to", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "INT64", "BOOL"])
def test_casts_are_exact(tmp_path: Path, source: str, to: str) -> None:
    dtype = getattr(ml_dtypes, source) if source == "bfloat16" else np.dtype(source)
    weight = (floats(50, 20) * 40).astype(dtype)
    if to in ("FLOAT16", "BFLOAT16") and source in ("float32", "float64"):
        weight[0, :3] = np.inf, 1e30, -1e30
    nodes = [step("Cast", 0, to=getattr(TensorProto, to)), step("Cast", 1, to=F32)]
    agrees_with_onnxruntime(chain_model(tmp_path, weight, nodes))


@pytest.mark.parametrize("to", ["FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "STRING", "COMPLEX64"])
def test_casts_that_saturate_or_spell_are_left_alone(tmp_path: Path, to: str) -> None:
    path = chain_model(tmp_path, floats(4, 4), [step("Cast", 0, to=getattr(TensorProto, to))])
    assert seen(path) is None


def test_small_types_are_seen_as_what_they_are_cast_to(tmp_path: Path) -> None:
    for dtype in (ml_dtypes.int4, ml_dtypes.float8_e4m3fn):
        path = chain_model(tmp_path, values(dtype, (6, 5)), [step("Cast", 0, to=F32), step("Transpose", 1)])
        agrees_with_onnxruntime(path)


def test_a_default_of_an_input_is_not_constant(tmp_path: Path) -> None:
    model = Model.load(save(exotic_model(), tmp_path / "m.onnx"))
    value = next(n for n in model.graph.nodes if n.name == "add").inputs[1]
    assert isinstance(value, Value)
    assert value in model.graph.inputs
    assert model.constant(value) is None
    assert value.default is not None
    np.testing.assert_array_equal(value.default.load(), floats(16, seed=3))


def test_before_ir_version_4_weights_are_inputs_and_constant(tmp_path: Path) -> None:
    proto = linear_model()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, F32, tensor.dims))
    model = Model.load(save(proto, tmp_path / "m.onnx"))
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert model.constant(model.graph.nodes[0].inputs[1]) is model.graph.nodes[0].inputs[1]


@pytest.mark.parametrize(
    "node",
    [
        step("Relu", 0),
        step("DequantizeLinear", 0, "w"),
        step("Identity", 0, domain="other"),
        step("Transpose", 0, perm=[0, 1, 2]),
        step("Reshape", 0, "bad"),
        step("Reshape", 0, "zero"),
        step("Squeeze", 0, "bad"),
        step("Unsqueeze", 0, "bad"),
        step("Cast", 0),
    ],
    ids=lambda n: n.op_type,
)
def test_what_is_no_view(tmp_path: Path, node: NodeProto) -> None:
    """Other ops, and views that the model gets wrong."""
    assert seen(chain_model(tmp_path, floats(6, 4), [node], bad=[7], zero=[6, 4, 0])) is None


def test_the_answer_is_remembered_and_follows_the_graph(tmp_path: Path) -> None:
    model = Model.load(chain_model(tmp_path, floats(6, 4), [step("Transpose", 0)]))
    output = model.graph.outputs[0]
    const = model.constant(output)
    assert const is not None
    assert model.constant(output) is const
    model.graph.nodes[0].detach()
    assert model.constant(output) is None


class TestRows:
    """What takes rows of axis 0: constant too, and reads no others."""

    @pytest.mark.parametrize(
        ("node", "integers", "rows"),
        [
            (step("Gather", 0, "i"), {"i": 2}, (2, 3)),
            (step("Gather", 0, "i", axis=0), {"i": -1}, (3, 4)),
            (step("Gather", 0, "i", axis=-3), {"i": [1]}, (1, 2)),
            (step("Slice", 0, "a", "b"), {"a": [1], "b": [3]}, (1, 3)),
            (step("Slice", 0, "a", "b", "c", "d"), {"a": [-3], "b": [1000], "c": [-3], "d": [1]}, (1, 4)),
            (step("Slice", 0, "a", "b", "", "d"), {"a": [3], "b": [1], "d": [1]}, (3, 3)),
        ],
        ids=str,
    )
    def test_taken(self, node: NodeProto, integers: dict[str, Any], rows: tuple[int, int], tmp_path: Path) -> None:
        const = agrees_with_onnxruntime(chain_model(tmp_path, floats(4, 3, 5), [node], **integers))
        assert rows_of(const) == rows
        assert const.origin == "w"

    @pytest.mark.parametrize(
        ("node", "integers"),
        [
            (step("Gather", 0, "i"), {"i": [0, 2]}),
            (step("Gather", 0, "i", axis=1), {"i": 1}),
            (step("Slice", 0, "a", "b", "c"), {"a": [1], "b": [3], "c": [1]}),
            (step("Slice", 0, "a", "b", "c", "d"), {"a": [0], "b": [3], "c": [0], "d": [2]}),
            (step("Slice", 0, "a", "b"), {"a": [1, 0], "b": [3, 2]}),
        ],
        ids=str,
    )
    def test_not_taken(self, node: NodeProto, integers: dict[str, Any], tmp_path: Path) -> None:
        assert seen(chain_model(tmp_path, floats(4, 3, 5), [node], **integers)) is None

    @pytest.mark.parametrize("part", [0, 1, 2])
    @pytest.mark.parametrize("sizes", [None, [1, 4, 2]])
    def test_split(self, part: int, sizes: list[int] | None, tmp_path: Path) -> None:
        names = ["a", "b", "c"]
        more: dict[str, Any] = {"num_outputs": 3} if sizes is None else {}
        split = helper.make_node("Split", ["w"] if sizes is None else ["w", "sizes"], names, "s", axis=0, **more)
        last = helper.make_node("Identity", [names[part]], ["y"], "y")
        path = chain_model(tmp_path, floats(7, 3), [split, last], **({} if sizes is None else {"sizes": sizes}))
        const = agrees_with_onnxruntime(path)
        assert rows_of(const) == ([(0, 3), (3, 6), (6, 7)] if sizes is None else [(0, 1), (1, 5), (5, 7)])[part]

    def test_rows_of_rows(self, tmp_path: Path) -> None:
        nodes = [step("Slice", 0, "a", "b"), step("Cast", 1, to=F16), step("Gather", 2, "i"), step("Gather", 3, "i")]
        const = agrees_with_onnxruntime(chain_model(tmp_path, floats(4, 3, 5), nodes, a=[1], b=[4], i=1))
        assert rows_of(const) == (2, 3)  # of the stack; the last one takes a row of the matrix
        assert const.shape == (5,)
