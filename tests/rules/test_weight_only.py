"""Weight-only Linears: the right op for every spec, the right weights, one copy of a shared one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qpass.quant_mode import QuantMode
from qpass.quantize.weight import int8_per_channel
from qpass.rules.weight_only import weight_only
from qpass.spec import QuantSpec
from qpass.testing import check_rule, model
from tests.rules.kit import Graph, error, ops, recipe, run, site

HEAD = '<ir_version: 10, opset_import: ["" : 17]>\n'
LINEAR = (
    HEAD
    + """g (float[B, 3, 64] x) => (float[B, 3, 32] y) <float[64, 32] w, float[32] b> {
    m = MatMul(x, w)
    y = Add(m, b) }"""
)
COMPUTED = (
    HEAD
    + """g (float[B, 3, 64] x) => (float[B, 3, 32] y) <float[64, 32] w, float[32] b> {
    v = Sin(w)
    m = MatMul(x, v)
    y = Add(m, b) }"""
)

OPS = {
    "w8a16": ("WeightOnlyQuantMatmul", {"weight_type_id": 1}, 0.01),
    "w4a16": ("WeightOnlyQuantMatmul", {"weight_type_id": 2}, 0.15),
    "w4a16-g128": ("WeightOnlyGroupwiseQuantMatmul", {"group_size": 32, "quant_algo": 1}, 0.12),
    "w4a16-g128-zp": ("WeightOnlyGroupwiseQuantMatmul", {"group_size": 32, "quant_algo": 3}, 0.12),
}


def preset(name: str) -> QuantSpec:
    return QuantSpec.preset(name, 32 if "g128" in name else None)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("name", OPS)
def test_rule(name: str) -> None:
    op, attrs, rtol = OPS[name]
    done = check_rule(
        weight_only,
        model(LINEAR),
        emits={op: 1},
        removes={"MatMul": 1, "Add": 1},
        twin=model(COMPUTED),
        spec=preset(name),
        rtol=rtol,
    )
    linear = site(done, "linear")
    assert (linear.status, linear.rule, linear.op) == ("rewritten", "weight_only", op)
    _, result = run(model(LINEAR), preset(name))
    assert attrs.items() <= attributes(result.graph.node[0]).items()
    assert linear.new_nodes == [result.graph.node[0].name]


def test_the_stored_weight_is_the_quantized_one() -> None:
    _, result = run(model(LINEAR))
    stored = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    node = result.graph.node[0]
    original = next(numpy_helper.to_array(t) for t in model(LINEAR).graph.initializer if t.name == "w")
    q, scale = int8_per_channel(original.T)
    assert np.array_equal(stored[node.input[1]], q)
    assert np.array_equal(stored[node.input[2]], scale)
    assert node.input[3] == "b"  # the bias is the original's own tensor
    assert "w" not in stored


def test_names_come_from_the_original() -> None:
    proto = model(LINEAR)
    proto.graph.node[0].name, proto.graph.node[1].name = "fc/MatMul", "fc/Add"
    done, result = run(proto)
    assert result.graph.node[0].name == "fc/Add.WeightOnlyQuantMatmul"
    assert result.graph.node[0].output[0] == "y"
    assert site(done, "linear").nodes == ["fc/MatMul", "fc/Add"]


@pytest.mark.parametrize(
    ("k", "spec", "reason"),
    [
        (63, "w4a16", "K=63 is odd: int4 packs two weights of a row into a byte"),
        (63, "w4a16-g128", "K=63 is odd: int4 packs two weights of a row into a byte"),
        (48, "w4a16-g128", "K=48 is not a multiple of the group size 32"),
        (16, "w4a16-g128-zp", "K=16 is not a multiple of the group size 32"),
    ],
)
def test_declines(k: int, spec: str, reason: str) -> None:
    g = Graph()
    proto = g.model(g.op("MatMul", g.input("x", ["B", 2, k]), g.weight(k, 4), out="y"))
    done, result = run(proto, preset(spec))
    assert (site(done, "linear").status, site(done, "linear").reason) == ("declined", reason)
    assert ops(result) == ["MatMul"]
    assert result.graph.node == proto.graph.node


class TestSharing:
    """A weight that several Linears use is quantized once."""

    @pytest.mark.parametrize("name", OPS)
    @pytest.mark.parametrize("way", ["", "Identity", "Cast"])
    def test_one_copy(self, name: str, way: str) -> None:
        g = Graph()
        x, w = g.input("x", ["B", 64]), g.weight(64, 32, name="w")
        for y in ("a", "b"):
            seen = g.op("Cast", w, to=1) if way == "Cast" else g.op(way, w) if way else w
            g.op("MatMul", x, seen, out=y)
        proto = g.model("a", "b")
        done, result = run(proto, preset(name))
        first, second = result.graph.node
        assert first.input == second.input
        assert len(result.graph.initializer) == len(first.input) - 1
        assert error(proto, result) < 0.15
        assert [site(done, "linear", i).weight.name for i in (0, 1)] == ["w", "w"]

    def test_views_of_another_order_have_copies_of_their_own(self) -> None:
        g = Graph()
        x, w = g.input("x", ["B", 64]), g.weight(64, 64, name="w")
        g.op("MatMul", x, w, out="a")
        g.op("MatMul", x, g.op("Transpose", w, perm=[1, 0]), out="b")
        g.op("Gemm", x, w, transB=1, out="c")
        proto = g.model("a", "b", "c")
        _, result = run(proto)
        a, b, c = (n.input[1] for n in result.graph.node)
        assert a != b
        assert b == c
        assert error(proto, result) < 0.01

    def test_the_other_user_keeps_the_original(self) -> None:
        g = Graph()
        w = g.weight(64, 64, name="w")
        g.op("MatMul", g.input("x", ["B", 64]), w, out="a")
        g.op("Add", "a", g.op("Sin", w), out="y")
        g.inputs[0] = onnx.helper.make_tensor_value_info("x", 1, [64, 64])
        proto = g.model("y")
        _, result = run(proto)
        assert "w" in {t.name for t in result.graph.initializer}
        assert error(proto, result) < 0.01


class TestSpecs:
    """What the spec says of a Linear is in the ledger."""

    def test_kept_excluded_and_overridden(self) -> None:
        g = Graph()
        h = g.input("x", ["B", 64])
        for name in ("q", "k", "v", "head"):
            h = g.op("MatMul", h, g.weight(64, 64, name=f"{name}.w"), out=f"{name}_out", name=f"layer.{name}")
        proto = g.model("head_out")
        spec = recipe(
            QuantMode.use_weight_only(),
            exclude=["*.head"],
            overrides=[{"match": "*.k", "mode": "none"}, {"match": "v.w", "preset": "w4a16"}],
        )
        done, result = run(proto, spec)
        got = {s.name: (s.status, s.op, s.reason) for s in done.ledger.of("linear")}
        assert got["layer.q"] == ("rewritten", "WeightOnlyQuantMatmul", None)
        assert got["layer.k"] == ("kept", None, "the spec leaves it in full precision")
        assert got["layer.v"][0] == "rewritten"
        assert got["layer.head"][0] == "excluded"
        assert "*.head" in str(got["layer.head"][2])
        assert ops(result) == ["WeightOnlyQuantMatmul", "MatMul", "WeightOnlyQuantMatmul", "MatMul"]
        assert [attributes(n).get("weight_type_id") for n in result.graph.node] == [1, None, 2, None]
        assert done.ledger.coverage() == 2 / 3
