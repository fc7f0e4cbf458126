"""MLPs: the activation that quantizes, the Linears around it, and what keeps an activation as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qpass
from qpass.calibrate import Stats
from qpass.ops.activation_quantization import Activation
from qpass.quant_mode import QuantMode
from qpass.rewriter import Ledger
from qpass.rules.mlp import quantize_activation
from qpass.spec import QuantSpec
from qpass.testing import check_rule, feeds, model
from tests.rules.activation_spelling import HALF, Spelling, write
from tests.rules.kit import Graph, error, lifted, ops, recipe, run, site

K, N = 16, 32
KINDS = [kind.name.lower() for kind in Activation]
SMOOTHED = QuantSpec(mode=QuantMode.use_smooth_quant(per_token=True, per_channel=True), smoothing=0.5)
WHY = "no Linear that the spec quantizes with its activations reads it"


def spelling(kind: str, gate: str = "none", casts: str = "none") -> Spelling:
    return Spelling(kind, gate, casts=casts, inner="div" if kind == "gelu" else "sum", cube="mul")


def mlp(
    s: Spelling, dtype: int = TensorProto.FLOAT, x_dims: Any = ("B", "S", K), bias: bool = True
) -> tuple[Graph, str, str]:
    """x → fc (and up) → activation; the graph, x and the activation's result."""
    g = Graph()
    x = g.input("x", x_dims, dtype)
    numpy: Any = np.float16 if dtype == HALF else np.float32

    def linear(v: str, k: int, n: int) -> str:
        y = g.op("MatMul", v, g.weight(k, n, dtype=numpy))
        return g.op("Add", y, g.weight(n, dtype=numpy)) if bias else y

    fc = linear(x, K, N)
    up = linear(x, K, N) if s.gate != "none" else ""
    return g, x, write(g, fc, up, s)


@pytest.fixture
def calibrated(tmp_path: Path) -> Callable[[onnx.ModelProto], Stats]:
    def make(proto: onnx.ModelProto) -> Stats:
        onnx.save(proto, tmp_path / "model.onnx")
        np.savez(tmp_path / "sample.npz", allow_pickle=False, **feeds(proto, B=4, S=6))
        return qpass.calibrate(tmp_path / "model.onnx", [tmp_path / "sample.npz"], tmp_path / "stats.npz")

    return make


def test_the_rule_alone() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[B, 3, 16] x) => (float[B, 3, 8] y) <float[16, 16] a, float[16, 8] b> {{
            h = MatMul(x, a)
            r = {}(h)
            y = MatMul(r, b) }}"""
    done = check_rule(
        quantize_activation,
        model(text.format("Gelu")),
        emits={"ActivationQuantization": 1, "SmoothQuantGemm": 1},
        removes={"MatMul": 1, "Gelu": 1},
        twin=model(text.format("Softsign")),
        spec="w8a8",
        rtol=0.03,
    )
    found = site(done, "mlp")
    assert (found.status, found.op, found.rule) == ("rewritten", "ActivationQuantization", "quantize_activation")
    assert [done.ledger.sites[i].weight.name for i in found.parts] == ["a", "b"]


class TestForms:
    @pytest.mark.parametrize(
        ("kind", "gate"),
        # a sigmoid alone is no activation of an MLP
        [(k, gate) for k in KINDS for gate in ("none", "right", "left") if (k, gate) != ("sigmoid", "none")],
    )
    @pytest.mark.parametrize("casts", ["none", "float16", "around", "only_out", "before_gate"])
    def test_every_kind(self, kind: str, gate: str, casts: str) -> None:
        s = spelling(kind, gate, casts)
        narrow = casts in ("float16", "around", "before_gate")
        g, _, y = mlp(s, HALF if narrow else TensorProto.FLOAT)
        after: Any = np.float16 if casts != "none" else np.float32
        proto = g.model(g.op("MatMul", y, g.weight(N, 4, dtype=after), out="y"))
        done, result = run(proto, "w8a8")
        fronts = ["QuantizePerToken", *["SmoothQuantGemm"] * (1 if gate == "none" else 2)]
        assert ops(result) == [*fronts, "ActivationQuantization", "SmoothQuantGemm"]
        act = next(n for n in result.graph.node if n.op_type == "ActivationQuantization")
        got = {a.name: a.i for a in act.attribute}
        assert (got["activation"], got["gated"], got["has_y"]) == (Activation[kind.upper()], int(gate != "none"), 0)
        assert error(proto, result) < 0.05
        assert [s.fed_by for s in done.ledger.of("linear")] == [None] * len(fronts)

    @pytest.mark.parametrize("op", ["Split", "Slice"])
    def test_halves_of_one_linear(self, op: str) -> None:
        """Phi-3's and ChatGLM's: gate and up are one Linear."""
        g = Graph()
        h = g.op("MatMul", g.input("x", ["B", "S", K]), g.weight(K, 2 * N))
        if op == "Split":
            a, b = g.fresh("a"), g.fresh("b")
            g.nodes.append(helper.make_node("Split", [h], [a, b], "split", axis=-1, num_outputs=2))
        else:
            cuts = [[g.const([v], np.int64) for v in (lo, hi, -1)] for lo, hi in ((0, N), (N, 2 * N))]
            a, b = (g.op("Slice", h, *cut) for cut in cuts)
        y = write(g, a, b, spelling("silu", "right"))
        proto = g.model(g.op("MatMul", y, g.weight(N, 4), out="y"))
        done, result = run(proto, "w8a8")
        assert "ActivationQuantization" in ops(result)
        found = site(done, "mlp")
        assert [done.ledger.sites[i].weight.shape for i in found.parts] == [[K, 2 * N], [N, 4]]
        assert error(proto, result) < 0.05

    def test_gelu_node_of_each_opset(self) -> None:
        for approximate, kind in (("none", "gelu"), ("tanh", "gelu_tanh")):
            g = Graph(20)
            g.op("Gelu", g.input("x", ["B", K]), out="y", approximate=approximate)
            (node,) = lifted(g.model("y"))
            assert node.attrs["kind"] == kind

    @pytest.mark.parametrize(("alpha", "kind"), [(1.0, "silu"), (1.702, "quick_gelu"), (1.5, None)])
    def test_swish_node(self, alpha: float, kind: str | None) -> None:
        g = Graph(24)
        g.op("Swish", g.input("x", ["B", K]), out="y", alpha=alpha)
        assert [n.attrs["kind"] for n in lifted(g.model("y"))] == ([kind] if kind else [])

    @pytest.mark.parametrize(
        ("op", "attributes", "kind"),
        [
            ("Gelu", {}, "gelu"),
            ("FastGelu", {}, "gelu_tanh"),
            ("QuickGelu", {"alpha": 1.702}, "quick_gelu"),
            ("QuickGelu", {}, "quick_gelu"),
            ("QuickGelu", {"alpha": 1.0}, "silu"),
            ("QuickGelu", {"alpha": 1.3}, None),
        ],
    )
    def test_of_onnx_runtime(self, op: str, attributes: dict[str, Any], kind: str | None) -> None:
        g = Graph()
        h = g.op("MatMul", g.input("x", ["B", 3, K]), g.weight(K, N))
        y = g.op(op, h, domain="com.microsoft", **attributes)
        proto = g.model(g.op("MatMul", y, g.weight(N, 4), out="y"), dims=["B", 3, 4])
        done, result = run(proto, "w8a8")
        assert ("ActivationQuantization" in ops(result)) == (kind is not None)
        assert len(done.ledger.of("mlp")) == (kind is not None)
        assert error(proto, result) < 0.03
        assert [n.attrs["kind"] for n in lifted(proto) if n.op == "Activation"] == ([kind] if kind else [])

    def test_one_with_a_bias_of_its_own_gives_it_to_the_linear_before(self) -> None:
        g = Graph()
        h = g.op("MatMul", g.input("x", ["B", 3, K]), g.weight(K, N))
        y = g.op("FastGelu", h, g.weight(N), domain="com.microsoft")
        proto = g.model(g.op("MatMul", y, g.weight(N, 4), out="y"), dims=["B", 3, 4])
        done, result = run(proto, "w8a8")
        assert ops(result) == ["QuantizePerToken", "SmoothQuantGemm", "ActivationQuantization", "SmoothQuantGemm"]
        (mlp,) = done.ledger.of("mlp")
        assert (mlp.nodes, mlp.parts) == ([f"n_{y}"], [0, 2])
        assert error(proto, result) < 0.04


class TestFanout:
    def test_a_result_that_is_needed_elsewhere(self) -> None:
        """It is an output of the op too, and keeps its name."""
        g, _, y = mlp(spelling("gelu"))
        h = g.op("Identity", y, out="h")
        proto = g.model(h, g.op("MatMul", y, g.weight(N, 4), out="y"))
        _, result = run(proto, "w8a8")
        act = next(n for n in result.graph.node if n.op_type == "ActivationQuantization")
        assert act.output[2] == y
        assert error(proto, result) < 0.03

    def test_two_projections_share_it(self) -> None:
        g, _, y = mlp(spelling("silu", "right"))
        proto = g.model(*(g.op("MatMul", y, g.weight(N, 4), out=out) for out in "ab"))
        done, result = run(proto, "w8a8")
        assert ops(result).count("ActivationQuantization") == 1
        assert len(site(done, "mlp").parts) == 4
        assert error(proto, result) < 0.05

    def test_excluded_projection_leaves_it(self) -> None:
        g, _, y = mlp(spelling("gelu"))
        proto = g.model(g.op("MatMul", y, g.const(np.ones((N, 4)), name="down"), out="y"))
        spec = recipe(QuantMode.use_smooth_quant(per_token=True, per_channel=True), exclude=["down"])
        done, result = run(proto, spec)
        assert (site(done, "mlp").status, site(done, "mlp").reason) == ("kept", WHY)
        assert ops(result)[-5:] == [n.op_type for n in proto.graph.node][-5:]

    def test_reshaped_around(self) -> None:
        """GPT-2: rows are folded before each Gemm, and Shape nodes read the activation."""
        g = Graph()
        x = g.input("x", ["B", "S", K])

        def conv1d(v: str, k: int, n: int) -> str:
            flat = g.op("Reshape", v, g.const([-1, k], np.int64))
            y = g.op("Gemm", flat, g.weight(k, n), g.weight(n))
            shape = g.op("Shape", v)
            lead = [g.op("Gather", shape, g.const([i], np.int64)) for i in range(2)]
            return g.op("Reshape", y, g.op("Concat", *lead, g.const([n], np.int64), axis=0))

        y = write(g, conv1d(x, K, N), "", spelling("gelu_tanh"))
        proto = g.model(g.op("Identity", conv1d(y, N, K), out="y"))
        done, result = run(proto, "w8a8")
        assert ops(result).count("ActivationQuantization") == 1
        assert "Tanh" not in ops(result)
        assert [len(s.parts) for s in done.ledger.of("mlp")] == [2]
        assert error(proto, result) < 0.03

    def test_behind_something_else_it_is_an_activation(self) -> None:
        g = Graph()
        proto = g.model(g.op("MatMul", g.op("Relu", g.input("x", ["B", K])), g.weight(K, 4), out="y"))
        done, result = run(proto, "w8a8")
        assert ops(result) == ["ActivationQuantization", "SmoothQuantGemm"]
        assert (site(done, "activation").status, site(done, "activation").parts) == ("rewritten", [])
        assert done.ledger.of("mlp") == []

    def test_one_that_feeds_no_linear_is_no_site(self) -> None:
        g, _, y = mlp(spelling("gelu"))
        proto = g.model(g.op("Softmax", y, out="y"))
        done, result = run(proto, "w8a8")
        assert [s.kind for s in done.ledger.sites] == ["linear"]
        assert "Erf" in ops(result)


class TestWhatMustStay:
    @pytest.mark.parametrize("dims", [["B", "S", 1], ["B", 1, N], [1, "S", N], ["S", N], [N], ["B", "T", N]])
    def test_up_of_another_shape(self, dims: list[Any]) -> None:
        """It may be broadcast: the activation goes alone, and feeds no Linear."""
        g, _, y = mlp(spelling("silu"))
        y = g.op("Mul", y, g.input("up", dims))
        proto = g.model(g.op("MatMul", y, g.weight(N, 4), out="y"), dims=["B", None, 4])
        done, result = run(proto, "w8a8")
        assert "ActivationQuantization" not in ops(result)
        assert done.ledger.of("mlp") == []

    def test_up_that_is_a_constant(self) -> None:
        g, _, y = mlp(spelling("silu"), x_dims=(2, 3, K))
        y = g.op("Mul", y, g.weight(2, 3, N))
        _, result = run(g.model(g.op("MatMul", y, g.weight(N, 4), out="y")), "w8a8")
        assert "ActivationQuantization" not in ops(result)

    @staticmethod
    def of_any_rank(g: Graph, name: str) -> str:
        return g.op("Reshape", g.input(name, ["T", K]), g.input(f"{name}_shape", ["R"], TensorProto.INT64))

    def test_linears_of_other_inputs_with_unknown_rows(self) -> None:
        g = Graph()
        a, b = (g.op("MatMul", self.of_any_rank(g, name), g.weight(K, N)) for name in "ab")
        y = write(g, a, b, spelling("silu", "right"))
        proto = g.model(g.op("MatMul", y, g.weight(N, 4), out="y"), dims=["B", "S", 4])
        assert [n.op for n in lifted(proto)].count("GatedActivation") == 0

    def test_linears_of_one_input_of_unknown_rank(self) -> None:
        """Whatever its rows are, both have them."""
        g = Graph()
        x = self.of_any_rank(g, "x")
        a, b = (g.op("MatMul", x, g.weight(K, N)) for _ in range(2))
        y = write(g, a, b, spelling("silu", "right"))
        proto = g.model(g.op("MatMul", y, g.weight(N, 4), out="y"), dims=["B", "S", 4])
        _, result = run(proto, "w8a8")
        assert "ActivationQuantization" in ops(result)
        rows = np.random.default_rng(0).standard_normal((6, K)).astype(np.float32)
        assert error(proto, result, {"x": rows, "x_shape": np.array([2, 3, K])}) < 0.05

    def test_activation_whose_value_leaks_into_the_gate(self) -> None:
        """silu(gate) is needed by itself too: what is multiplied stays a Mul."""
        g = Graph()
        x = g.input("x", ["B", K])
        a, b = (g.op("MatMul", x, g.weight(K, N)) for _ in range(2))
        s = write(g, a, "", spelling("silu"))
        y = g.op("MatMul", g.op("Mul", s, b), g.weight(N, 4), out="y")
        done, result = run(g.model(y, s), "w8a8")
        assert "ActivationQuantization" not in ops(result)
        assert done.ledger.of("mlp") == []

    def test_swish_of_another_slope(self) -> None:
        g = Graph()
        h = g.op("MatMul", g.input("x", ["B", K]), g.weight(K, N))
        y = g.op("Mul", h, g.op("Sigmoid", g.op("Mul", h, g.const(1.5))))
        _, result = run(g.model(g.op("MatMul", y, g.weight(N, 4), out="y")), "w8a8")
        assert "Sigmoid" in ops(result)

    @pytest.mark.parametrize("spec", ["w8a16", "w4a16"])
    @pytest.mark.parametrize("gate", ["none", "right"])
    @pytest.mark.parametrize("casts", ["none", "around", "before_gate"])
    def test_weights_alone(self, spec: str, gate: str, casts: str) -> None:
        """Put back as it came: the same nodes in the same order."""
        narrow = casts != "none"
        g, _, y = mlp(spelling("gelu_tanh", gate, casts), HALF if narrow else TensorProto.FLOAT)
        proto = g.model(g.op("MatMul", y, g.weight(N, 4, dtype=np.float16 if narrow else np.float32), out="y"))
        done, result = run(proto, spec)
        stay = [n for n in proto.graph.node if n.name in site(done, "mlp").nodes]
        assert [n for n in result.graph.node if n.name in site(done, "mlp").nodes] == stay
        assert (site(done, "mlp").status, site(done, "mlp").reason) == ("kept", WHY)
        assert len(stay) >= 8


class TestCalibrated:
    @pytest.mark.parametrize("gate", ["none", "right"])
    @pytest.mark.parametrize("casts", ["none", "only_out"])
    def test_smoothed(self, gate: str, casts: str, calibrated: Callable[[onnx.ModelProto], Stats]) -> None:
        g, _, y = mlp(spelling("gelu", gate, casts))
        outlying = g.const(np.where(np.arange(N) == 3, 0.02, 1)[:, None] * g.random.standard_normal((N, 4)))
        g.initializers[0].raw_data = np.array(
            np.where(np.arange(N) == 3, 30, 1) * g.random.standard_normal((K, N)), np.float32
        ).tobytes()
        w = g.op("Cast", outlying, to=HALF) if casts != "none" else outlying
        proto = g.model(g.op("MatMul", y, w, out="y"))
        stats = calibrated(proto)
        assert y in stats.tensors
        _, result = run(proto, SMOOTHED, calibration=stats)
        act = next(n for n in result.graph.node if n.op_type == "ActivationQuantization")
        assert {a.name: a.i for a in act.attribute}["has_smoother"] == 1
        _, plain = run(proto, "w8a8")
        given = feeds(proto, B=4, S=6)
        assert error(proto, result, given) < error(proto, plain, given) < 0.1

    def test_static(self, calibrated: Callable[[onnx.ModelProto], Stats]) -> None:
        g, _, y = mlp(spelling("silu", "right"))
        proto = g.model(g.op("MatMul", y, g.weight(N, 4), out="y"))
        _, result = run(proto, QuantSpec.preset("w8a8-static"), calibration=calibrated(proto))
        act = next(n for n in result.graph.node if n.op_type == "ActivationQuantization")
        assert len(act.output) == 1
        assert {a.name: a.i for a in act.attribute}["dyn_act_scaling"] == 0
        assert error(proto, result, feeds(proto, B=4, S=6)) < 0.08


def test_parts_in_the_ledger_file() -> None:
    g, _, y = mlp(spelling("silu", "right"))
    done, _ = run(g.model(g.op("MatMul", y, g.weight(N, 4), out="y")), "w8a8")
    text = done.ledger.to_json()
    again = Ledger.from_json(text)
    assert again == done.ledger
    found = again.of("mlp")[0]
    gate, _, down = (again.sites[i] for i in found.parts)
    assert gate.name.startswith("n_add")
    assert down.weight is not None
    assert down.weight.shape == [N, 4]
    assert again.totals()["mlp"] == {"sites": 1, "rewritten": 1}
    old = Ledger.from_json(text.replace('"parts": [],', "").replace(f'"parts": {found.parts}', ""))
    assert [s.parts for s in old.of("linear")] == [[], [], []]
