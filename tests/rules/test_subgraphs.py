"""If, Loop and Scan bodies are rewritten like the main graph, and so are calls of local functions, once expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.pipeline import rewrite
from qpass.quant_mode import QuantMode
from qpass.testing import model
from tests.rules.kit import Graph, check_lift, error, ops, recipe, run, site
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


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("spec", ["w8a16", "w4a16", "w8a8"])
def test_three_graphs_deep(spec: str, flag: bool) -> None:
    """If in Loop in If; one weight is read at each depth, through a Transpose of the outermost graph."""
    g = Graph()
    g.input("x", ["B", K])
    w = g.op("Transpose", g.weight(K, K, name="w"), perm=[1, 0], out="w_t")
    g.gain(K, name="gamma")
    g.op("MatMul", "x", w, out="first", name="first")
    inner = helper.make_node(
        "If",
        ["cond"],
        ["h_out"],
        "inner",
        then_branch=branch("then", "t", linear("n", w, "t")),
        else_branch=branch("else", "e", linear("n", "own", "e", "b"), tensor("own", K, K, seed=2), tensor("b", K)),
    )
    body = helper.make_graph(
        [
            helper.make_node("LayerNormalization", ["h", "gamma"], ["n"], "norm"),
            inner,
            helper.make_node("Identity", ["go"], ["go_out"], "go"),
        ],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h", ["B", K])],
        [info("go_out", [], TensorProto.BOOL), info("h_out", ["B", K])],
    )
    local = [numpy_helper.from_array(np.array(3), "trips"), numpy_helper.from_array(np.array(True), "yes")]
    loop = helper.make_node("Loop", ["trips", "yes", "first"], ["t0"], "repeat", body=body)
    then = branch("outer_then", "t1", [loop, *linear("t0", w, "t1")], *local)
    proto = choice(then, branch("outer_else", "e1", linear("first", w, "e1")), g)
    done, result = run(proto, spec)
    assert {s.name: s.status for s in done.ledger.of("linear")} == dict.fromkeys(
        [
            "first",
            "pick/else_branch/e1/MatMul",
            "pick/then_branch/t1/MatMul",
            "pick/then_branch/repeat/body/inner/else_branch/e/Add",
            "pick/then_branch/repeat/body/inner/then_branch/t/MatMul",
        ],
        "rewritten",
    )
    int8 = [t.name for t in result.graph.initializer if t.data_type == TensorProto.INT8]
    assert len(int8) == 2, "one copy of each weight, in the main graph"
    assert "w" not in {t.name for t in result.graph.initializer}
    x = np.random.default_rng(3).standard_normal((5, K)).astype(np.float32)
    assert error(proto, result, {"x": x, "cond": np.array(flag)}) < (0.4 if spec == "w4a16" else 0.05)


@pytest.mark.parametrize("spec", ["w8a16", "w8a8"])
def test_scan(spec: str) -> None:
    """A recurrent cell: norm, a Linear of the step's input and one of the state, all weights local."""
    body = helper.make_graph(
        [
            helper.make_node("LayerNormalization", ["step", "gamma"], ["n"], "norm"),
            *linear("n", "w", "a", "b"),
            *linear("state", "u", "c"),
            helper.make_node("Add", ["a", "c"], ["s"], "sum"),
            helper.make_node("Tanh", ["s"], ["new"], "tanh"),
            helper.make_node("Identity", ["new"], ["seen"], "seen"),
        ],
        "cell",
        [info("state", ["B", K]), info("step", ["B", K])],
        [info("new", ["B", K]), info("seen", ["B", K])],
        [tensor("gamma", K), tensor("w", K, K), tensor("b", K), tensor("u", K, K, seed=1)],
    )
    g = Graph()
    reads = [g.input("h", ["B", K]), g.input("x", ["T", "B", K])]
    g.nodes.append(helper.make_node("Scan", reads, ["last", "all"], "rnn", body=body, num_scan_inputs=1))
    proto = g.model("last", "all", dims=None)
    done, result = run(proto, spec)
    assert [(s.kind, s.status, s.name) for s in done.ledger.sites] == [
        ("norm", "rewritten" if spec == "w8a8" else "kept", "rnn/body/norm"),
        ("linear", "rewritten", "rnn/body/a/Add"),
        ("linear", "rewritten", "rnn/body/c/MatMul"),
    ]
    inside = result.graph.node[0].attribute
    cell = next(a.g for a in inside if a.name == "body")
    assert not {t.name for t in cell.initializer} & {"w", "u"}
    given = {k: np.random.default_rng(1).standard_normal((3, 5, K)).astype(np.float32) for k in "x"}
    assert error(proto, result, given | {"h": given["x"][0]}) < 0.03


def test_experts_in_a_loop() -> None:
    """One pass for each expert, its weight taken by the loop's counter."""
    g = Graph()
    g.input("x", ["B", K])
    g.weight(3, K, K, name="w")
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["w", "i"], ["chosen"], "gather"),
            helper.make_node("Transpose", ["chosen"], ["turned"], "turn", perm=[1, 0]),
            helper.make_node("MatMul", ["h", "turned"], ["h_out"], "mm"),
            helper.make_node("Identity", ["go"], ["go_out"], "go"),
        ],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h", ["B", K])],
        [info("go_out", [], TensorProto.BOOL), info("h_out", ["B", K])],
    )
    g.op("Loop", g.const(3, np.int64), g.const(True, bool), "x", out="y", name="repeat", body=body)
    proto = g.model("y", dims=["B", K])
    done, result = run(proto)
    assert [(s.kind, s.status, s.name) for s in done.ledger.sites] == [("experts", "rewritten", "repeat/body/mm")]
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
    def test_what_is_inside_is_rewritten(self, spec: str) -> None:
        proto = model(self.TEXT.format("y = MatMul(h, v)"))
        done, result = run(proto, spec)
        got = [(s.kind, s.status, s.nodes) for s in done.ledger.sites]
        assert got == [
            ("norm", "rewritten" if spec == "w8a8" else "kept", ["block@h/LayerNormalization@n"]),
            ("linear", "rewritten", ["block@h/fc@y/Transpose@t", "block@h/fc@y/MatMul@m"]),
            ("linear", "rewritten", ["MatMul@y"]),
        ]
        assert site(done, "linear").fed_by == (0 if spec == "w8a8" else None)
        assert not [f for f in result.functions if f.domain == "local"]
        assert error(proto, result) < 0.03

    def test_every_call_is_a_site(self) -> None:
        done, result = run(model(self.TEXT.format("k = local.fc(h, w)\n y = MatMul(k, v)")))
        names = [s.name for s in done.ledger.of("linear")]
        assert names == ["block@h/fc@y/MatMul@m", "fc@k/MatMul@m", "MatMul@y"]
        made = {n.name: n.op_type for n in result.graph.node}
        assert all(made[n] == "WeightOnlyQuantMatmul" for s in done.ledger.of("linear") for n in s.new_nodes)
        weights = {s.weight.name for s in done.ledger.of("linear") if s.weight is not None}
        assert weights == {"w", "v"}

    @pytest.mark.parametrize("excluded", ["*fc@*", "*"])
    def test_calls_without_rewritten_sites_stay_as_they_are(self, excluded: str) -> None:
        proto = model(self.TEXT.format("k = local.fc(h, w)\n y = MatMul(k, v)"))
        done, result = run(proto, recipe(QuantMode.use_weight_only(), exclude=[excluded]))
        sites = {s.name: s.status for s in done.ledger.sites}
        assert sites == {
            "block@h/LayerNormalization@n": "kept",
            "block@h/fc@y/MatMul@m": "excluded",
            "fc@k/MatMul@m": "excluded",
            "MatMul@y": "rewritten" if excluded == "*fc@*" else "excluded",
        }
        assert list(result.functions[:2]) == list(proto.functions)
        assert list(result.graph.node[:2]) == list(proto.graph.node[:2])
        if excluded == "*":
            assert result == proto

    def test_a_function_stays_where_one_of_its_calls_does(self) -> None:
        proto = model(self.TEXT.format("k = local.fc(h, w)\n y = MatMul(k, v)"))
        spec = recipe(QuantMode.use_weight_only(), exclude=["block@h/*", "MatMul@y"])
        done, result = run(proto, spec)
        assert [s.name for s in done.ledger.sites if s.status == "rewritten"] == ["fc@k/MatMul@m"]
        assert [n.op_type for n in result.graph.node][:1] == ["block"]
        assert [f.name for f in result.functions] == ["block", "fc", "WeightOnlyQuantMatmul"]
        assert error(proto, result) < 0.02

    def test_another_opset_is_named_and_left_alone(self, tmp_path: Path) -> None:
        """ReduceMax takes its axes as an input since 18: the body would mean something else."""
        text = """
            <ir_version: 10, opset_import: ["" : 18, "local" : 1]>
            g (float[B, 8] x) => (float[B, 8] y) { y = local.old(x, w) }
            <domain: "local", opset_import: ["" : 17]>
            old (x, w) => (y) {
                h = MatMul(x, w)
                m = ReduceMax<axes = [1]>(h)
                y = Sub(h, m)
            }"""
        proto = onnx.parser.parse_model(text)  # onnx.checker refuses it
        proto.graph.initializer.append(tensor("w", 8, 8))
        onnx.save(proto, tmp_path / "m.onnx")
        done = rewrite(tmp_path / "m.onnx")
        (s,) = done.ledger.sites
        assert (s.kind, s.status, s.nodes) == ("linear", "declined", ["old@y/MatMul@h"])
        assert s.reason == "it lies in the body of the function local.old; inline it first (onnx.inliner)"
        assert onnx.load(done.output) == proto

    def test_the_same_operators_at_another_opset(self) -> None:
        text = """
            <ir_version: 10, opset_import: ["" : 18, "local" : 1]>
            g (float[B, 8] x) => (float[B, 8] y) <float[8, 8] w> { y = local.old(x, w) }
            <domain: "local", opset_import: ["" : 15]>
            old (x, w) => (y) {
                h = MatMul(x, w)
                y = Relu(h)
            }"""
        done, result = run(model(text))
        assert site(done, "linear").status == "rewritten"
        assert ops(result) == ["WeightOnlyQuantMatmul", "Relu"]

    def test_a_call_within_a_branch(self) -> None:
        """Two branches call one function, each under a path of its own."""
        call = [helper.make_node("fc", ["x", "w"], [r], f"{r}_call", domain="local") for r in "te"]
        then = branch("then", "t", call[:1], tensor("w", K, K))
        otherwise = branch("else", "e", call[1:], tensor("w", K, K, seed=1))
        g = Graph()
        g.functions.append(model(self.TEXT.format("y = MatMul(h, v)")).functions[1])
        g.input("x", ["B", K])
        g.input("cond", [], TensorProto.BOOL)
        y = g.op("If", "cond", out="y", name="pick", then_branch=then, else_branch=otherwise)
        proto = g.model(y, dims=["B", K], check=False)
        proto.opset_import.add(domain="local", version=1)
        done, result = run(proto)
        assert [s.name for s in done.ledger.of("linear")] == [
            "pick/else_branch/e_call/MatMul@m",
            "pick/then_branch/t_call/MatMul@m",
        ]
        assert {s.status for s in done.ledger.of("linear")} == {"rewritten"}
        assert both(proto, result) < 0.02
