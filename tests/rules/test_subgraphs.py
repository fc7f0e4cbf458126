"""If, Loop and Scan bodies are rewritten like the main graph; bodies of local functions are named and left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.testing import model
from tests.rules.kit import Graph, check_lift, error, ops, run, site
from tests.rules.spelling import Spelling, write

F32 = TensorProto.FLOAT
K = 16


def info(name: str, dims: Any, dtype: int = F32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def branch(
    name: str, result: str, nodes: list[onnx.NodeProto], *weights: onnx.TensorProto, dims: Any = ("B", K)
) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [info(result, dims)], list(weights))


def tensor(name: str, *dims: int, seed: int = 0) -> onnx.TensorProto:
    values = np.random.default_rng(seed).standard_normal(dims) / max(1, dims[0]) ** 0.5
    return numpy_helper.from_array(values.astype(np.float32), name)


def choice(then: onnx.GraphProto, otherwise: onnx.GraphProto, g: Graph | None = None) -> onnx.ModelProto:
    """A model whose one If takes the flag `cond`; its branches read x."""
    g = g or Graph()
    if not any(i.name == "x" for i in g.inputs):
        g.input("x", ["B", K])
    g.input("cond", [], TensorProto.BOOL)
    return g.model(g.op("If", "cond", out="y", name="pick", then_branch=then, else_branch=otherwise), dims=["B", K])


def linear(x: str, w: str, y: str, b: str = "") -> list[onnx.NodeProto]:
    nodes = [helper.make_node("MatMul", [x, w], [y if not b else f"{y}_mm"], f"{y}/MatMul")]
    return [*nodes, helper.make_node("Add", [f"{y}_mm", b], [y], f"{y}/Add")] if b else nodes


def both(proto: onnx.ModelProto, result: onnx.ModelProto) -> float:
    x = np.random.default_rng(3).standard_normal((5, K)).astype(np.float32)
    return max(error(proto, result, {"x": x, "cond": np.array(c)}) for c in (True, False))


@pytest.mark.parametrize("spec", ["w8a16", "w4a16", "w8a8"])
def test_if(spec: str) -> None:
    then = branch("then", "t", linear("x", "w1", "t", "b1"), tensor("w1", K, K), tensor("b1", K))
    otherwise = branch("else", "e", linear("x", "w2", "e"), tensor("w2", K, K, seed=1))
    proto = choice(then, otherwise)
    done, result = run(proto, spec)
    assert [(s.status, s.nodes) for s in done.ledger.of("linear")] == [
        ("rewritten", ["pick/else_branch/e/MatMul"]),  # attributes are in the order of their names
        ("rewritten", ["pick/then_branch/t/MatMul", "pick/then_branch/t/Add"]),
    ]
    assert both(proto, result) < (0.3 if spec == "w4a16" else 0.02)
    kinds = {n.op_type for a in result.graph.node[0].attribute for n in a.g.node}
    assert kinds == ({"QuantizePerToken", "SmoothQuantGemm"} if spec == "w8a8" else {"WeightOnlyQuantMatmul"})


@pytest.mark.parametrize("spec", ["w8a16", "w8a8"])
def test_fused_operators_in_a_branch(spec: str) -> None:
    """What ONNX Runtime fused in a branch is found there too, behind values whose shapes only stand-ins tell."""
    ms = "com.microsoft"
    nodes = [
        helper.make_node("SkipLayerNormalization", ["x", "x", "g"], ["h"], "norm", domain=ms, epsilon=1e-5),
        helper.make_node("FusedMatMul", ["h", "w"], ["t"], "product", domain=ms, transB=1, alpha=0.5),
    ]
    then = branch("then", "t", nodes, tensor("g", K), tensor("w", K, K))
    g = Graph()
    g.op("Gelu", g.input("x", ["B", K]), domain=ms)  # so that the model imports the domain
    proto = choice(then, branch("else", "e", [helper.make_node("Relu", ["x"], ["e"])]), g)
    done, result = run(proto, spec)
    assert [(s.kind, s.status, s.nodes) for s in done.ledger.sites] == [
        ("norm", "rewritten" if spec == "w8a8" else "kept", ["pick/then_branch/norm"]),
        ("linear", "rewritten", ["pick/then_branch/product"]),
    ]
    assert both(proto, result) < 0.02


def test_unnamed_nodes_with_graphs_inside_have_paths_of_their_own() -> None:
    g = Graph()
    x = g.input("x", ["B", K])
    g.input("cond", [], TensorProto.BOOL)
    for i in range(2):
        graphs = {
            a: branch(a, f"{a}{i}", linear(x, f"{a}_w{i}", f"{a}{i}"), tensor(f"{a}_w{i}", K, K, seed=i))
            for a in ("then_branch", "else_branch")
        }
        for n in (n for a in graphs.values() for n in a.node):
            n.name = ""
        x = g.op("If", "cond", out=f"y{i}", name="", **graphs)
    proto = g.model("y1", dims=["B", K])
    done, result = run(proto)
    names = [n for s in done.ledger.sites for n in s.nodes]
    assert names[1] == "If@y0/then_branch/MatMul@then_branch0"
    assert len(set(names)) == len(names) == 4
    assert both(proto, result) < 0.02


@pytest.mark.parametrize("reads", ["the weight", "its Identity"])
def test_a_weight_of_the_enclosing_graph(reads: str) -> None:
    """Used inside and outside: one quantized copy, in the main graph."""
    g = Graph()
    x, w = g.input("x", ["B", K]), g.weight(K, K, name="w")
    g.op("MatMul", x, w, out="outer")
    seen = g.op("Identity", w, out="seen") if reads == "its Identity" else w
    then = branch("then", "t", linear("outer", seen, "t"))
    otherwise = branch("else", "e", [helper.make_node("Neg", ["outer"], ["e"], "neg")])
    proto = choice(then, otherwise, g)
    done, result = run(proto)
    assert [s.status for s in done.ledger.sites] == ["rewritten", "rewritten"]
    assert sum(t.data_type == TensorProto.INT8 for t in result.graph.initializer) == 1
    assert both(proto, result) < 0.02


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_that_feeds_a_subgraph(kind: str) -> None:
    """A branch reads the norm's result, so that is an output of the op, and the branch quantizes it for itself."""
    g = Graph()
    h = write(g, g.input("x", ["B", K]), Spelling(kind=kind), rank=2, k=K)
    mm = g.op("MatMul", h, g.weight(K, K), out="mm")
    then = branch("then", "t", linear(h, "w1", "t"), tensor("w1", K, K))
    otherwise = branch("else", "e", [helper.make_node("Add", [h, mm], ["e"], "add")])
    proto = choice(then, otherwise, g)
    done, result = run(proto, "w8a8")
    fused = result.graph.node[0]
    assert fused.op_type in ("LayernormQuantization", "RmsnormQuantization")
    assert len(fused.output) == 3
    assert {s.name: s.fed_by for s in done.ledger.of("linear")} == {"n_mm": 0, "pick/then_branch/t/MatMul": None}
    assert both(proto, result) < 0.03


def test_shape_in_a_subgraph_is_no_use() -> None:
    g = Graph()
    h = write(g, g.input("x", ["B", K]), Spelling(), rank=2, k=K)
    g.op("MatMul", h, g.weight(K, K), out="mm")
    shape = helper.make_node("Shape", [h], ["s"], "shape")
    then = branch("then", "t", [shape, helper.make_node("Reshape", ["mm", "s"], ["t"], "reshape")])
    otherwise = branch("else", "e", [helper.make_node("Neg", ["mm"], ["e"], "neg")])
    proto = choice(then, otherwise, g)
    _, result = run(proto, "w8a8")
    assert ops(result) == ["LayernormQuantization", "SmoothQuantGemm", "If"]
    assert len(result.graph.node[0].output) == 2
    assert both(proto, result) < 0.02


def test_a_match_does_not_reach_out_of_its_graph() -> None:
    """The bias of a MatMul outside stands inside: two graphs, so no Linear with a bias."""
    g = Graph()
    g.op("MatMul", g.input("x", ["B", K]), g.weight(K, K), out="mm")
    then = branch("then", "t", [helper.make_node("Add", ["mm", "b"], ["t"], "add")], tensor("b", K))
    otherwise = branch("else", "e", [helper.make_node("Neg", ["mm"], ["e"], "neg")])
    proto = choice(then, otherwise, g)
    check_lift(proto, linears=1, inputs={"x": np.ones((2, K), np.float32), "cond": np.array(True)})
    done, result = run(proto)
    assert [s.nodes for s in done.ledger.sites] == [["n_mm"]]
    assert both(proto, result) < 0.02


@pytest.mark.parametrize("spec", ["w8a16", "w8a8"])
def test_loop(spec: str) -> None:
    """Three times h ← norm(h) · w + b, with the weight outside and the bias inside."""
    g = Graph()
    g.input("x", ["B", K])
    g.weight(K, K, name="w")
    g.gain(K, name="gamma")
    body = helper.make_graph(
        [
            helper.make_node("LayerNormalization", ["h", "gamma"], ["n"], "norm"),
            *linear("n", "w", "h_out", "b"),
            helper.make_node("Identity", ["go"], ["go_out"], "go"),
        ],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h", ["B", K])],
        [info("go_out", [], TensorProto.BOOL), info("h_out", ["B", K])],
        [tensor("b", K)],
    )
    g.op("Loop", g.const(3, np.int64), g.const(True, bool), "x", out="y", name="repeat", body=body)
    proto = g.model("y", dims=["B", K])
    done, result = run(proto, spec)
    assert [(s.kind, s.status, s.nodes) for s in done.ledger.sites] == [
        ("norm", "rewritten" if spec == "w8a8" else "kept", ["repeat/body/norm"]),
        ("linear", "rewritten", ["repeat/body/h_out/MatMul", "repeat/body/h_out/Add"]),
    ]
    assert site(done, "linear").fed_by == (0 if spec == "w8a8" else None)
    assert error(proto, result) < 0.03


def test_an_if_within_a_loop() -> None:
    g = Graph()
    g.input("x", ["B", K])
    pick = helper.make_node(
        "If",
        ["go"],
        ["h_out"],
        "pick",
        then_branch=branch("then", "t", linear("h", "w", "t"), tensor("w", K, K)),
        else_branch=branch("else", "e", [helper.make_node("Neg", ["h"], ["e"], "neg")]),
    )
    body = helper.make_graph(
        [pick, helper.make_node("Identity", ["go"], ["go_out"], "go")],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h", ["B", K])],
        [info("go_out", [], TensorProto.BOOL), info("h_out", ["B", K])],
    )
    g.op("Loop", g.const(2, np.int64), g.const(True, bool), "x", out="y", name="repeat", body=body)
    proto = g.model("y", dims=["B", K])
    done, result = run(proto)
    assert site(done, "linear").nodes == ["repeat/body/pick/then_branch/t/MatMul"]
    assert site(done, "linear").status == "rewritten"
    assert error(proto, result) < 0.02


def test_an_outer_value_that_a_branch_passes_on_is_not_lost() -> None:
    """The branch's output is the outer product itself, by name: the Add that would take it over may not."""
    g = Graph()
    g.op("MatMul", g.input("x", ["B", K]), g.weight(K, K), out="mm")
    g.op("Add", "mm", g.weight(K), out="sum")
    then = branch("then", "t", [helper.make_node("Identity", ["mm"], ["t"], "pass")])
    otherwise = branch("else", "e", [helper.make_node("Identity", ["sum"], ["e"], "pass2")])
    proto = choice(then, otherwise, g)
    done, result = run(proto)
    assert site(done, "linear").nodes == ["n_mm"]
    assert both(proto, result) < 0.02


class TestFunctions:
    TEXT = """
        <ir_version: 10, opset_import: ["" : 18, "local" : 1]>
        g (float[B, 8] x) => (float[B, 4] y) <float[8] gamma, float[8, 8] w, float[8, 4] v> {{
            h = local.block(x, gamma, w)
            {}
        }}
        <domain: "local", opset_import: ["" : 18, "local" : 1]>
        block (x, gamma, w) => (y) {{
            n = LayerNormalization(x, gamma)
            y = local.fc(n, w)
        }}
        <domain: "local", opset_import: ["" : 18]>
        fc (a, w) => (b) {{
            t = Transpose<perm = [1, 0]>(w)
            m = MatMul(a, t)
            s = Transpose<perm = [1, 0]>(m)
            p = MatMul(m, s)
            b = MatMul(p, m)
        }}
        """

    @pytest.mark.parametrize("spec", ["w8a16", "w8a8"])
    def test_what_is_inside_is_declined(self, spec: str) -> None:
        proto = model(self.TEXT.format("y = MatMul(h, v)"))
        done, result = run(proto, spec)
        got = [(s.kind, s.status, s.nodes) for s in done.ledger.sites]
        assert got == [
            ("norm", "declined", ["block@h/LayerNormalization@n"]),
            ("linear", "declined", ["block@h/fc@y/MatMul@m"]),
            ("linear", "rewritten", ["MatMul@y"]),
        ]
        assert (
            done.ledger.sites[1].reason
            == "it lies in the body of the function local.fc; inline it first (onnx.inliner)"
        )
        assert list(result.functions[:2]) == list(proto.functions)
        assert error(proto, result) < 0.02

    def test_every_call_is_a_site(self) -> None:
        done, _ = run(model(self.TEXT.format("k = local.fc(h, w)\n y = MatMul(k, v)")))
        assert [s.nodes[0] for s in done.ledger.of("linear")] == ["block@h/fc@y/MatMul@m", "fc@k/MatMul@m", "MatMul@y"]
