"""The graph that rules see."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

from qpass.graph import Const, Model, Node, Value
from tests.graph.models import exotic_model, floats, linear_model, save


@pytest.fixture
def exotic(tmp_path: Path) -> Model:
    return Model.load(save(exotic_model(), tmp_path / "m.onnx"))


def test_our_classes_everywhere(exotic: Model) -> None:
    nodes = list(exotic.nodes())
    assert {type(n) for n in nodes} == {Node}
    assert {type(t) for n in nodes for t in (*n.inputs, *n.outputs)} == {Value, Const}
    assert [n.name for n in nodes if n.name.startswith("branch")] == ["branch2", "branch1"]
    assert isinstance(exotic.graph, gs.Graph)


def test_nodes_know_their_protos(exotic: Model) -> None:
    for node, proto in zip(exotic.graph.nodes, exotic.proto.graph.node, strict=True):
        assert node.proto is not None
        assert node.proto == proto
    choose = next(n for n in exotic.graph.nodes if n.op == "If")
    inner = choose.attrs["then_branch"].nodes[0]
    assert inner.proto.doc_string == ""
    assert inner.proto.name == "branch1"


def test_subgraphs_share_the_tensors_around_them(exotic: Model) -> None:
    inner = next(n for n in exotic.nodes() if n.name == "branch1")
    call = next(n for n in exotic.graph.nodes if n.name == "call1")
    assert inner.inputs[0] is call.outputs[0]
    assert inner in call.outputs[0].uses
    step = next(n for n in exotic.nodes() if n.name == "step")
    assert isinstance(step.inputs[1], Const)
    assert step.inputs[1].load() == 2.5


def test_attributes(exotic: Model) -> None:
    odd = next(n for n in exotic.graph.nodes if n.name == "odd")
    assert odd.attrs["empty"] == odd.attrs["none"] == []
    assert odd.inputs[1].is_empty()
    last = exotic.graph.nodes[-1]
    assert last.attrs["bytes"] == b"\xff\xfe\x00"
    assert last.attrs["strings"] == ["p", "q"]
    assert last.attrs["graphs"].name == "graphs"  # what graphsurgeon has no form for is its proto
    call = next(n for n in exotic.graph.nodes if n.name == "call0")
    assert (call.overload, call.attrs["by"], call.domain) == ("a", 2.0, "local")
    constant = next(n for n in exotic.graph.nodes if n.outputs[0].name == "big")
    np.testing.assert_array_equal(constant.attrs["value"].load(), floats(40, 30))


def test_identity_and_uses(tmp_path: Path) -> None:
    proto = linear_model()
    proto.graph.node.append(helper.make_node("Mul", ["m0", "m0"], ["square"], "mm0"))  # not the only mm0
    model = Model.load(save(proto, tmp_path / "m.onnx"))
    first, square = model.graph.nodes[0], model.graph.nodes[-1]
    assert first != square
    assert len({first, square, first}) == 2
    assert first.outputs[0].uses == [model.graph.nodes[1], square]
    assert first.outputs[0].producer is first
    assert model.graph.inputs[0].producer is None
    assert (first.inputs[0].shape, first.inputs[0].dtype) == (("batch", 64), np.float32)
    assert (first.inputs[1].shape, first.inputs[1].dtype) == ((64, 48), np.float32)


def test_many_uses_come_off_quickly(tmp_path: Path) -> None:
    proto = linear_model(1)
    for i in range(5000):
        proto.graph.node.append(helper.make_node("Relu", ["m0"], [f"r{i}"], f"r{i}"))
    model = Model.load(save(proto, tmp_path / "m.onnx"))
    value = model.graph.nodes[0].outputs[0]
    assert len(value.uses) == 5001
    start = time.perf_counter()
    for node in model.graph.nodes[:1:-1]:
        node.detach()
    assert time.perf_counter() - start < 1
    assert len(value.uses) == 1


def test_names_are_unique_and_the_same_each_time(exotic: Model) -> None:
    assert exotic.unique("brand new") == "brand new"
    assert exotic.unique("brand new") == "brand new_1"
    assert exotic.unique("branch1") == "branch1_1"  # a node of a subgraph
    assert exotic.unique("own3") == "own3_1"  # a tensor in a list of subgraphs
    assert exotic.unique("") == "_1"


def test_weight_bytes(tmp_path: Path) -> None:
    model = Model.load(save(linear_model(), tmp_path / "m.onnx"))
    assert model.weight_bytes == 4 * (2 * 64 * 48 + 64 + 48)


def test_sorting_moves_only_what_stands_wrong(tmp_path: Path) -> None:
    proto = linear_model(4)
    late = proto.graph.node.pop(2)
    proto.graph.node.append(late)
    model = Model.load(save(proto, tmp_path / "m.onnx"))
    model.sort()
    assert [n.name for n in model.graph.nodes] == ["mm0", "add0", "mm1", "add1", "mm2", "add2", "mm3", "add3"]
    before = list(model.graph.nodes)
    model.sort()
    assert model.graph.nodes == before


def test_sorting_looks_into_subgraphs(exotic: Model) -> None:
    names = [n.outputs[0].name for n in exotic.graph.nodes]
    exotic.graph.nodes.reverse()
    exotic.sort()
    order = {n.outputs[0].name: i for i, n in enumerate(exotic.graph.nodes)}
    assert order.keys() == set(names)
    assert order["f"] < order["g"] < order["h"]  # only a branch of the If reads f
    assert order["a"] < order["b"] < order["c"] < order["e"]


def test_a_cycle_is_named(tmp_path: Path) -> None:
    model = Model.load(save(linear_model(), tmp_path / "m.onnx"))
    first, last = model.graph.nodes[0], model.graph.nodes[-1]
    first.inputs[0] = last.outputs[0]
    with pytest.raises(ValueError, match="cycle: MatMul 'mm0' → Add 'add1' → MatMul 'mm1' → Add 'add0' → MatMul"):
        model.sort()
