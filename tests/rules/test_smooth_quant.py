"""SmoothQuant: the norm that quantizes, its Linears behind it, and every way in which a fan-out is not plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

import qpass
from qpass.calibrate import Stats
from qpass.quant_mode import QuantMode
from qpass.rules.smooth_quant import quantize_input, quantize_norm
from qpass.spec import QuantSpec
from qpass.testing import check_rule, feeds, model
from tests.rules.kit import Graph, error, ops, recipe, remarks, run
from tests.rules.spelling import HALF, Spelling, write

HEAD = '<ir_version: 10, opset_import: ["" : 17]>\n'
K = 16
SMOOTHED = QuantSpec(mode=QuantMode.use_smooth_quant(per_token=True, per_channel=True), smoothing=0.5)
STATIC = QuantSpec.preset("w8a8-static")


def norm(g: Graph, x: str, kind: str = "layer", k: int = K) -> str:
    return write(g, x, Spelling(kind=kind), k=k)


def outlying(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Inputs of which one channel is much larger than the others: what smoothing is for."""
    given = feeds(proto, B=4, S=6)
    for x in given.values():
        x[..., 3] *= 30
    return given


@pytest.fixture
def calibrated(tmp_path: Path) -> Callable[[onnx.ModelProto], Stats]:
    def make(proto: onnx.ModelProto) -> Stats:
        onnx.save(proto, tmp_path / "model.onnx")
        np.savez(tmp_path / "sample.npz", allow_pickle=False, **outlying(proto))
        return qpass.calibrate(tmp_path / "model.onnx", [tmp_path / "sample.npz"], tmp_path / "stats.npz")

    return make


class TestRules:
    """Each rule alone: numerics, structure, and a twin that it leaves alone."""

    @pytest.mark.parametrize("kind", ["Layer", "RMS"])
    def test_quantize_norm(self, kind: str) -> None:
        text = """<ir_version: 10, opset_import: ["" : 23]>
            g (float[B, 3, 16] x) => (float[B, 3, 8] y, float[B, 3, 8] z)
            <float[16] w, float[16, 8] a, float[16, 8] b> {{
                h = {}Normalization(x, w)
                {}
                y = MatMul(r, a)
                z = MatMul(r, b)
            }}"""
        done = check_rule(
            quantize_norm,
            model(text.format(kind, "r = Identity(h)")),
            emits={"LayernormQuantization" if kind == "Layer" else "RmsnormQuantization": 1, "SmoothQuantGemm": 2},
            removes={"MatMul": 2, f"{kind}Normalization": 1},
            twin=model(text.format(kind, "r = Relu(h)")),
            spec="w8a8",
            rtol=0.03,
        )
        assert [(s.kind, s.status, s.fed_by) for s in done.ledger.sites] == [
            ("norm", "rewritten", None),
            ("linear", "rewritten", 0),
            ("linear", "rewritten", 0),
        ]

    def test_quantize_input(self) -> None:
        text = (
            HEAD
            + """g (float[B, 3, 16] x) => (float[B, 3, 8] y, float[B, 3, 8] z) <float[16, 8] a, float[16, 8] b> {
            y = MatMul(x, a)
            z = MatMul(x, b) }"""
        )
        twin = text.replace("y = MatMul(x, a)", "s = Sin(a)\n y = MatMul(x, s)").replace("MatMul(x, b)", "MatMul(x, s)")
        check_rule(
            quantize_input,
            model(text),
            emits={"QuantizePerToken": 1, "SmoothQuantGemm": 2},
            removes={"MatMul": 2},
            twin=model(twin),
            spec="w8a8",
            rtol=0.03,
        )


class TestFanout:
    @pytest.mark.parametrize("kind", ["layer", "rms"])
    @pytest.mark.parametrize("dtype", [TensorProto.FLOAT, HALF])
    def test_pre_norm(self, kind: str, dtype: int) -> None:
        """The residual is the norm's input: nothing else needs the result."""
        g = Graph()
        x = g.input("x", ["B", "S", K], dtype)
        kinds: dict[int, Any] = {TensorProto.FLOAT: np.float32, HALF: np.float16}
        h = write(g, x, Spelling(kind=kind, casts="none" if dtype == TensorProto.FLOAT else "around"), k=K)
        h = g.op("Cast", h, to=dtype)
        a = g.op("MatMul", h, g.weight(K, K, dtype=kinds[dtype]))
        b = g.op("MatMul", h, g.weight(K, K, dtype=kinds[dtype]))
        proto = g.model(g.op("Add", x, g.op("Mul", a, b), out="y"))
        done, result = run(proto, "w8a8")
        name = "LayernormQuantization" if kind == "layer" else "RmsnormQuantization"
        assert ops(result) == [name, "SmoothQuantGemm", "SmoothQuantGemm", "Mul", "Add"]
        assert [s.fed_by for s in done.ledger.of("linear")] == [0, 0]
        assert len(result.graph.node[0].output) == 2
        assert error(proto, result) < 0.03

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_post_norm(self, kind: str) -> None:
        """BERT's residual is the norm's result: the op gives it as y."""
        g = Graph()
        h = norm(g, g.input("x", ["B", "S", K]), kind)
        mm = g.op("MatMul", h, g.weight(K, K))
        proto = g.model(g.op("Add", h, mm, out="y"))
        done, result = run(proto, "w8a8")
        q, _, y = result.graph.node[0].output
        assert result.graph.node[1].input[0] == q
        assert result.graph.node[2].input[0] == y == h  # keeps the name that it had
        assert done.ledger.of("norm")[0].op == result.graph.node[0].op_type
        assert error(proto, result) < 0.03

    def test_norm_as_output(self) -> None:
        g = Graph()
        h = g.op("Identity", norm(g, g.input("x", ["B", "S", K])), out="h")
        g.op("MatMul", h, g.weight(K, 4), out="y")
        proto = g.model("h", "y")
        _, result = run(proto, "w8a8")
        assert sorted(ops(result)) == ["Identity", "LayernormQuantization", "SmoothQuantGemm"]
        assert error(proto, result) < 0.02

    @pytest.mark.parametrize("view", ["", "Reshape"])
    def test_shape_is_no_use(self, view: str) -> None:
        g = Graph()
        h = norm(g, g.input("x", ["B", "S", K]))
        h = g.op("Reshape", h, g.const([-1, K], np.int64)) if view else h
        mm = g.op("MatMul", h, g.weight(K, K))
        proto = g.model(g.op("Reshape", mm, g.op("Shape", h), out="y"))
        done, result = run(proto, "w8a8")
        (fused,) = (n for n in result.graph.node if n.op_type == "LayernormQuantization")
        assert len(fused.output) == 2  # no y
        assert "Sqrt" not in ops(result)
        assert done.ledger.of("linear")[0].fed_by == 0
        assert error(proto, result) < 0.03

    def test_an_excluded_head_reads_the_norm_as_before(self) -> None:
        g = Graph()
        h = norm(g, g.input("x", ["B", "S", K]))
        g.op("MatMul", h, g.weight(K, 4), out="a", name="keep.me")
        g.op("MatMul", h, g.weight(K, 4), out="b")
        proto = g.model("a", "b")
        spec = recipe(SMOOTHED.mode, exclude=["keep.*"])
        done, result = run(proto, spec)
        assert sorted(ops(result)) == ["LayernormQuantization", "MatMul", "SmoothQuantGemm"]
        assert {s.name: s.status for s in done.ledger.of("linear")} == {"keep.me": "excluded", "n_b": "rewritten"}
        assert error(proto, result) < 0.02

    def test_a_weight_only_head(self) -> None:
        g = Graph()
        h = norm(g, g.input("x", ["B", "S", K]))
        g.op("MatMul", h, g.weight(K, 4), out="a", name="router")
        g.op("MatMul", h, g.weight(K, 4), out="b")
        proto = g.model("a", "b")
        done, result = run(proto, recipe(SMOOTHED.mode, overrides=[{"match": "router", "preset": "w8a16"}]))
        assert sorted(ops(result)) == ["LayernormQuantization", "SmoothQuantGemm", "WeightOnlyQuantMatmul"]
        got = {s.name: (s.op, s.fed_by) for s in done.ledger.of("linear")}
        assert got == {"router": ("WeightOnlyQuantMatmul", None), "n_b": ("SmoothQuantGemm", 0)}
        assert error(proto, result) < 0.02

    def test_siblings_without_a_norm_share_one_quantization(self) -> None:
        g = Graph()
        x = g.op("Tanh", g.input("x", ["B", "S", K]))
        for out in "abc":
            g.op("MatMul", x, g.weight(K, 4), out=out)
        proto = g.model("a", "b", "c")
        done, result = run(proto, "w8a8")
        assert ops(result) == ["Tanh", "QuantizePerToken", *["SmoothQuantGemm"] * 3]
        assert [s.op for s in done.ledger.of("linear")] == ["SmoothQuantGemm"] * 3
        assert error(proto, result) < 0.02

    def test_a_sibling_of_another_spec_goes_alone(self) -> None:
        g = Graph()
        x = g.input("x", ["B", "S", K])
        for out in "abc":
            g.op("MatMul", x, g.weight(K, 4), out=out)
        proto = g.model("a", "b", "c")
        spec = recipe(SMOOTHED.mode, overrides=[{"match": "n_b", "preset": "w8a16"}])
        _, result = run(proto, spec)
        assert sorted(ops(result)) == [
            "QuantizePerToken",
            "SmoothQuantGemm",
            "SmoothQuantGemm",
            "WeightOnlyQuantMatmul",
        ]
        assert error(proto, result) < 0.02

    @pytest.mark.parametrize(
        ("x", "views"),
        [
            (["B", 6, K], [[-1, K]]),
            (["B", 6, K], [[-1, K], [-1, 3, K]]),
            ([2, 6, K], [[3, 4, K]]),  # same rank, other rows a group
            ([2, 6, K], [[12, 1, K]]),
            (["B", 6, K], [[-1, 2, 3, K]]),
            (["B", 6, K], [[1, -1, K], [-1, K]]),
        ],
    )
    def test_views_of_the_rows(self, x: list[int | str], views: list[list[int]]) -> None:
        g = Graph()
        h = norm(g, g.input("x", x))
        for v in views:
            h = g.op("Reshape", h, g.const(v, np.int64))
        proto = g.model(g.op("MatMul", h, g.weight(K, 5), out="y"))
        done, result = run(proto, "w8a8")
        assert done.ledger.of("linear")[0].fed_by == 0
        assert error(proto, result) < 0.02

    @pytest.mark.parametrize("last", [K, -1])
    @pytest.mark.parametrize("lead", [[3, 4], [2, 6], [0, 6], [0, 0], [-1, 4]])
    def test_a_view_of_unknown_leading_dims(self, lead: list[int], last: int) -> None:
        """The same Reshape, with another last dim, makes the result's rows of the norm's."""
        g = Graph()
        h = norm(g, g.input("x", ["B", "S", K]))
        target = g.op("Concat", g.input("a", [2], TensorProto.INT64), g.const([last], np.int64), axis=0)
        proto = g.model(g.op("MatMul", g.op("Reshape", h, target), g.weight(K, 5), out="y"), dims=["P", "Q", 5])
        done, result = run(proto, "w8a8")
        assert "QuantizePerToken" not in ops(result)
        assert done.ledger.of("linear")[0].fed_by == 0
        if lead.count(-1) + (last == -1) < 2:
            x = np.random.default_rng(0).standard_normal((2, 6, K)).astype(np.float32)
            assert error(proto, result, {"x": x, "a": np.array(lead)}) < 0.02

    @pytest.mark.parametrize("way", ["twice", "allowzero", "more dims"])
    def test_a_view_that_cannot_be_made_of_the_result_is_quantized_on_its_own(self, way: str) -> None:
        g = Graph()
        more = way == "more dims"
        h = norm(g, g.input("x", ["B", "S", K]))
        lead = g.input("a", [3 if more else 2], TensorProto.INT64)
        target = g.op("Concat", lead, g.const([K], np.int64), axis=0)
        if way == "twice":
            h = g.op("Reshape", h, g.const([-1, K], np.int64))
        h = g.op("Reshape", h, target, allowzero=int(way == "allowzero"))
        dims: list[int | str | None] = ["P", "Q", "R", 5] if more else ["P", "Q", 5]
        proto = g.model(g.op("MatMul", h, g.weight(K, 5), out="y"), dims=dims)
        done, result = run(proto, "w8a8")
        assert "QuantizePerToken" in ops(result)
        x = np.random.default_rng(0).standard_normal((2, 6, K)).astype(np.float32)
        assert error(proto, result, {"x": x, "a": np.array([3, 2, 2] if more else [3, 4])}) < 0.02
        assert done.ledger.of("norm")[0].status == "kept"

    def test_both_a_view_and_the_norm_itself(self) -> None:
        g = Graph()
        h = norm(g, g.input("x", [2, 6, K]))
        g.op("MatMul", h, g.weight(K, 5), out="a")
        g.op("MatMul", g.op("Reshape", h, g.const([-1, K], np.int64)), g.weight(K, 5), out="b")
        g.op("Relu", g.op("Reshape", h, g.const([-1, K], np.int64)), out="c")
        proto = g.model("a", "b", "c")
        done, result = run(proto, "w8a8")
        assert [s.fed_by for s in done.ledger.of("linear")] == [0, 0]
        assert error(proto, result) < 0.02

    def test_bfloat16(self) -> None:
        """ONNX Runtime has no bfloat16 MatMul on the CPU: structure and dtypes only."""
        g = Graph(opset=17)
        bf16 = TensorProto.BFLOAT16
        h = g.op("LayerNormalization", g.input("x", ["B", K], bf16), g.gain(K, ml_dtypes.bfloat16))
        mm = g.op("MatMul", h, g.weight(K, 4, dtype=ml_dtypes.bfloat16))
        g.op("Add", mm, g.weight(4, dtype=ml_dtypes.bfloat16), out="y")
        for spec in ("w8a8", "w8a16", "w4a16"):
            done, result = run(g.model("y"), spec)
            assert [s.status for s in done.ledger.of("linear")] == ["rewritten"]
            assert result.graph.output[0].type.tensor_type.elem_type == bf16


class TestSmoothing:
    """Smoothers from calibration: folded where the norm's result is not needed, an input where it is."""

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_folded_into_gamma_and_beta(self, kind: str, calibrated: Callable[[onnx.ModelProto], Stats]) -> None:
        g = Graph()
        h = write(g, g.input("x", ["B", "S", K]), Spelling(kind=kind), k=K)
        g.op("MatMul", h, g.weight(K, 8), out="a")
        g.op("MatMul", h, g.weight(K, 8), out="b")
        proto = g.model("a", "b")
        stats = calibrated(proto)
        done, result = run(proto, SMOOTHED, calibration=stats)
        q = result.graph.node[0]
        assert len(q.input) == (3 if kind == "layer" else 2)  # no smoother
        smoothed = "smoothing 0.5" in remarks(done, "norm")[0]
        assert error(proto, result, outlying(proto)) < 0.02
        assert smoothed == all("smoothing 0.5" in r for r in remarks(done, "linear"))

    def test_passed_where_y_is_needed_too(self, calibrated: Callable[[onnx.ModelProto], Stats]) -> None:
        g = Graph()
        gamma = np.ones(K)
        gamma[5] = 40  # an outlier that the norm makes
        h = g.op("LayerNormalization", g.input("x", ["B", "S", K]), g.const(gamma, name="gamma"))
        proto = g.model(g.op("Add", h, g.op("MatMul", h, g.weight(K, K)), out="y"), h)
        done, result = run(proto, SMOOTHED, calibration=calibrated(proto))
        q = result.graph.node[0]
        assert q.op_type == "LayernormQuantization"
        assert list(q.input[:2]) == ["x", "gamma"]
        assert len(q.input) == 3  # the smoother
        assert "smoothing 0.5" in remarks(done, "norm")[0]
        given = outlying(proto)
        plain = error(proto, run(proto, "w8a8")[1], given)
        assert error(proto, result, given) < plain

    def test_outliers_before_any_linear(self, calibrated: Callable[[onnx.ModelProto], Stats]) -> None:
        g = Graph()
        x = g.op("Tanh", g.input("x", ["B", "S", K]))
        x = g.op("Mul", x, g.const(np.where(np.arange(K) == 3, 50, 1)))
        g.op("MatMul", x, g.weight(K, 8), out="y")
        proto = g.model("y")
        done, result = run(proto, SMOOTHED, calibration=calibrated(proto))
        assert [n.op_type for n in result.graph.node if n.domain] == ["QuantizePerToken", "SmoothQuantGemm"]
        assert len(result.graph.node[-2].input) == 2
        assert "smoothing 0.5" in remarks(done, "linear")[0]
        assert error(proto, result, outlying(proto)) < error(proto, run(proto, "w8a8")[1], outlying(proto))

    @pytest.mark.parametrize("feeding", ["norm", "input"])
    def test_static_scales(self, feeding: str, calibrated: Callable[[onnx.ModelProto], Stats]) -> None:
        g = Graph()
        x = g.input("x", ["B", "S", K])
        h = norm(g, x) if feeding == "norm" else g.op("Tanh", x)
        for out in "ab":
            g.op("MatMul", h, g.weight(K, 8), out=out)
        proto = g.model("a", "b")
        _, result = run(proto, STATIC, calibration=calibrated(proto))
        first = "LayernormQuantization" if feeding == "norm" else "QuantizeTensor"
        assert [n.op_type for n in result.graph.node if n.domain] == [first, "SmoothQuantGemm", "SmoothQuantGemm"]
        scales = {n.input[2] for n in result.graph.node if n.op_type == "SmoothQuantGemm"}
        assert len(scales) == 1
        assert numpy_helper.to_array(next(t for t in result.graph.initializer if t.name in scales)).shape == (1,)
        assert error(proto, result, outlying(proto)) < 0.04

    def test_a_weight_shared_between_two_norms_is_not_smoothed(
        self, calibrated: Callable[[onnx.ModelProto], Stats]
    ) -> None:
        g = Graph()
        x, w = g.input("x", ["B", "S", K]), g.weight(K, 8)
        g.op("MatMul", norm(g, x, "layer"), w, out="a")
        g.op("MatMul", norm(g, x, "rms"), g.op("Identity", w), out="b")
        proto = g.model("a", "b")
        done, result = run(proto, SMOOTHED, calibration=calibrated(proto))
        assert remarks(done, "linear") == [
            "unsmoothed: its weight is also used by 'n_b'",
            "unsmoothed: its weight is also used by 'n_a'",
        ]
        gemms = [n for n in result.graph.node if n.op_type == "SmoothQuantGemm"]
        assert gemms[0].input[1] == gemms[1].input[1]
        assert error(proto, result, outlying(proto)) < 0.03

    def test_a_weight_shared_within_one_fanout_is(self, calibrated: Callable[[onnx.ModelProto], Stats]) -> None:
        g = Graph()
        gamma = np.where(np.arange(K) == 5, 40, 1)
        h = g.op("LayerNormalization", g.input("x", ["B", "S", K]), g.const(gamma))
        w = g.weight(K, 8)
        g.op("MatMul", h, w, out="a")
        g.op("MatMul", h, g.op("Identity", w), out="b")
        proto = g.model("a", "b")
        done, _ = run(proto, SMOOTHED, calibration=calibrated(proto))
        assert all("smoothing 0.5" in r for r in remarks(done, "linear"))

    def test_without_calibration_it_says_so(self) -> None:
        g = Graph()
        g.op("MatMul", norm(g, g.input("x", ["B", "S", K])), g.weight(K, 8), out="y")
        done, _ = run(g.model("y"), SMOOTHED)
        assert done.remarks == ["without calibration nothing is smoothed; `qpass calibrate` makes statistics"]
