"""Norms: every spelling is lifted with equal numerics, and near-spellings never become a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qpass.testing import feeds, model
from tests.rules.kit import Graph, check_lift, error, lifted, run, site
from tests.rules.spelling import CHOICES, FULL, HALF, SLIPS, K, Spelling, dtypes, relevant, write

HEAD = '<ir_version: 10, opset_import: ["" : {}]>\n'
SPELLINGS = st.builds(Spelling, **{name: st.sampled_from(ways) for name, ways in CHOICES.items()})
OPSETS = st.sampled_from([13, 17, 18, 20, 23])


def spelt(
    s: Spelling, opset: int = 18, dims: tuple[Any, ...] = ("B", 3, K), slip: str = "", seed: int = 0
) -> onnx.ModelProto:
    """A model of this one norm."""
    before, after = dtypes(s)
    g = Graph(opset, seed)
    x = g.input("x", dims, before)
    other = g.input("z", dims, before) if slip else ""
    y = write(g, x, s, rank=len(dims), slip=slip, other=other)
    return g.model(g.op("Identity", y, out="y"), dtype=after)


def tolerance(s: Spelling) -> float:
    return 1e-5 if dtypes(s) == (FULL, FULL) else 5e-3  # float16 is rounded at other places


class TestNodes:
    """LayerNormalization and RMSNormalization."""

    @pytest.mark.parametrize("axis", ["", "axis = -1,", "axis = 2,"])
    @pytest.mark.parametrize("bias", ["", ", beta"])
    @pytest.mark.parametrize("stash", ["", ", stash_type = 1"])
    def test_layer_norm(self, axis: str, bias: str, stash: str) -> None:
        proto = model(
            HEAD.format(17)
            + f"""g (float[B, 3, 8] x) => (float[B, 3, 8] y) <float[8] gamma, float[8] beta> {{
                y = LayerNormalization<{axis} epsilon = 0.001{stash}>(x, gamma{bias}) }}"""
        )
        check_lift(proto, norms=1)
        (norm,) = lifted(proto)
        assert norm.attrs == {"kind": "layernorm", "epsilon": pytest.approx(1e-3)}
        assert [v.name for v in norm.inputs] == ["x", "gamma", *(["beta"] if bias else [])]

    def test_epsilon_may_be_left_out(self) -> None:
        text = "g (float[B, 8] x) => (float[B, 8] y) <float[8] w> { y = LayerNormalization(x, w) }"
        (norm,) = lifted(model(HEAD.format(17) + text))
        assert norm.attrs["epsilon"] == pytest.approx(1e-5)

    def test_simplified_layer_norm(self) -> None:
        """What ONNX Runtime makes of an RMSNorm; it is in the standard domain, though ONNX has no such operator."""
        g = Graph()
        n = g.op(
            "SimplifiedLayerNormalization", g.input("x", ["B", 3, 8]), g.gain(8), axis=-1, epsilon=1e-3, stash_type=1
        )
        g.op("MatMul", n, g.weight(8, 4), out="y")
        proto = g.model("y", dims=["B", 3, 4], check=False)
        done, result = run(proto, "w8a8")
        assert [x.op_type for x in result.graph.node] == ["RmsnormQuantization", "SmoothQuantGemm"]
        assert site(done, "linear").fed_by == 0
        assert error(proto, result) < 0.03

    def test_rms_norm(self) -> None:
        text = "g (float[B, 3, 8] x) => (float[B, 3, 8] y) <float[8] w> { y = RMSNormalization<epsilon = 0.01>(x, w) }"
        proto = model(HEAD.format(23) + text)
        check_lift(proto, norms=1)
        assert lifted(proto)[0].attrs == {"kind": "rmsnorm", "epsilon": pytest.approx(1e-2)}

    @pytest.mark.parametrize(
        ("node", "weights", "reason"),
        [
            ("LayerNormalization<axis = 1>(x, w)", "float[3, 4, 8] w", "axis is 1, wants the last axis of 4"),
            ("LayerNormalization<axis = 2>(x, w)", "float[4, 8] w", "axis is 2, wants the last axis of 4"),
            (
                "LayerNormalization<stash_type = 10>(x, w)",
                "float[8] w",
                "attribute stash_type=10 is not in the pattern",
            ),
            ("LayerNormalization(x, v)", "float[8] w", "wants a constant, got 'v', a graph input"),
        ],
    )
    def test_twin_stays(self, node: str, weights: str, reason: str) -> None:
        text = f"g (float[2, 3, 4, 8] x, float[8] v) => (float[2, 3, 4, 8] y) <{weights}> {{ y = {node} }}"
        done, result = run(model(HEAD.format(17) + text), "w8a8")
        assert [n.op_type for n in result.graph.node] == ["LayerNormalization"]
        norm = site(done, "norm")
        assert (norm.status, norm.nodes) == ("near_miss", ["LayerNormalization@y"])
        assert (norm.reason or "").startswith("LayerNormalization 'y': ")
        assert norm.reason.endswith(reason)

    def test_a_used_mean_is_a_leak(self) -> None:
        text = """g (float[B, 8] x) => (float[B, 8] y, float[B, 1] m) <float[8] w> {
            y, m = LayerNormalization(x, w) }"""
        done, result = run(model(HEAD.format(17) + text), "w8a8")
        assert len(result.graph.node) == 1
        assert site(done, "norm").reason == "LayerNormalization's result 'm' is also used by a graph output"

    def test_weight_with_leading_ones(self) -> None:
        text = """g (float[B, 3, 8] x) => (float[B, 3, 8] y) <float[1, 1, 8] w> {
            y = LayerNormalization(x, w) }"""
        check_lift(model(HEAD.format(17) + text), norms=1)


class TestSpellings:
    """Each way to write each part, the rest plain."""

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    @pytest.mark.parametrize(("part", "way"), [(p, w) for p, ways in CHOICES.items() for w in ways if p != "kind"])
    def test_each(self, kind: str, part: str, way: str) -> None:
        s = replace(Spelling(kind=kind), **{part: way})
        proto = spelt(s)
        check_lift(proto, norms=1, rtol=tolerance(s))
        (norm,) = lifted(proto)
        assert norm.attrs["kind"] == {"layer": "layernorm", "rms": "rmsnorm"}[kind]
        assert norm.attrs["epsilon"] == pytest.approx(1e-3)
        assert norm.inputs[0].name == "x" or s.casts == "only_in"

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(SPELLINGS, OPSETS, st.integers(1, 4))
    def test_any_mixture(self, s: Spelling, opset: int, rank: int) -> None:
        dims: tuple[Any, ...] = (("B", "S", 3)[-(rank - 1) :] if rank > 1 else ()) + (K,)
        check_lift(spelt(s, opset, dims), norms=1, rtol=tolerance(s))

    @pytest.mark.slow
    @settings(max_examples=2500, deadline=None, database=None)
    @given(SPELLINGS, OPSETS, st.integers(0, 1000))
    def test_any_mixture_at_length(self, s: Spelling, opset: int, seed: int) -> None:
        check_lift(spelt(s, opset, seed=seed), norms=1, rtol=tolerance(s))

    @pytest.mark.parametrize("weight", ["w", ""])
    @pytest.mark.parametrize("inverse", ["r = Reciprocal(sd)", "r = Div(one, sd)"])
    def test_mean_folded_into_the_bias(self, weight: str, inverse: str) -> None:
        """tf.nn.batch_normalization, as tf2onnx writes Keras's LayerNormalization."""
        proto = model(
            HEAD.format(13)
            + f"""g (float[B, 3, 8] x) => (float[B, 3, 8] y)
                <float[8] w, float[8] b, float eps = {{0.001}}, float one = {{1}}> {{
                mu = ReduceMean<axes = [2]>(x)
                d = Sub(x, mu)
                sq = Mul(d, d)
                var = ReduceMean<axes = [-1]>(sq)
                e = Add(var, eps)
                sd = Sqrt(e)
                {inverse}
                {"s = Mul(r, w)" if weight else "s = Identity(r)"}
                xs = Mul(x, s)
                ms = Mul(mu, s)
                rest = Sub(b, ms)
                y = Add(xs, rest)
            }}"""
        )
        check_lift(proto, norms=1, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_without_weight_and_bias_gamma_is_ones(self, kind: str) -> None:
        (norm,) = lifted(spelt(Spelling(kind=kind, weight="none", bias="none")))
        assert [np.asarray(c.load()).tolist() for c in norm.inputs[1:]] == [[1.0] * K]

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_the_ones_have_a_name_of_their_own(self, kind: str) -> None:
        g = Graph()
        h = write(g, g.input("x", ["B", 3, K]), Spelling(kind=kind, weight="none", bias="none"))
        g.const(np.zeros((K, 6)), name=f"n_{h}.gamma")
        g.op("MatMul", h, g.weight(K, 6), out="a")
        g.op("MatMul", g.op("Relu", h), f"n_{h}.gamma", out="b")
        proto = g.model("a", "b")
        done, result = run(proto, "w8a8")
        assert [s.fed_by is not None for s in done.ledger.of("linear")] == [True, False]
        assert error(proto, result) < 0.03

    def test_without_weight_and_width_it_declines(self) -> None:
        done, _ = run(spelt(Spelling(kind="rms", weight="none"), dims=("B", 3, "H")), "w8a8")
        norm = site(done, "norm")
        assert norm.status == "declined"
        assert "the width of the norm is not known" in norm.reason

    def test_the_weight_tells_an_unknown_width(self) -> None:
        proto = spelt(Spelling(), dims=("B", "S", "H"))
        given = {"x": np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)}
        check_lift(proto, norms=1, inputs=given, rtol=1e-5)

    @pytest.mark.parametrize("casts", ["around", "inside", "before_weight"])
    def test_half_precision_enters_and_leaves_the_norm_as_it_is(self, casts: str) -> None:
        (norm,) = lifted(spelt(Spelling(kind="rms", casts=casts)))
        assert norm.inputs[0].name == "x"
        assert norm.inputs[0].dtype == norm.outputs[0].dtype == np.float16

    def test_a_result_in_float32_takes_x_in_float32(self) -> None:
        (norm,) = lifted(spelt(Spelling(kind="rms", casts="only_in")))
        assert norm.inputs[0].dtype == norm.outputs[0].dtype == np.float32


class TestNearSpellings:
    """Something is wrong with them: what is lifted all the same must keep the numbers."""

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(SPELLINGS, st.sampled_from(SLIPS), st.integers(2, 4), OPSETS)
    def test_never_a_wrong_result(self, s: Spelling, slip: str, rank: int, opset: int) -> None:
        assume(relevant(s, slip))
        self.check(s, slip, rank, opset)

    @pytest.mark.slow
    @settings(max_examples=2500, deadline=None, database=None)
    @given(SPELLINGS, st.sampled_from(SLIPS), st.integers(2, 4), OPSETS)
    def test_never_a_wrong_result_at_length(self, s: Spelling, slip: str, rank: int, opset: int) -> None:
        assume(relevant(s, slip))
        self.check(s, slip, rank, opset)

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    @pytest.mark.parametrize("slip", SLIPS)
    def test_each(self, kind: str, slip: str) -> None:
        for s in (Spelling(kind=kind), Spelling(kind=kind, root="pow_half", mean="sum_over_k", weight="plus_one")):
            if relevant(s, slip):
                self.check(s, slip, 3, 18)

    @staticmethod
    def check(s: Spelling, slip: str, rank: int, opset: int) -> None:
        proto = spelt(s, opset, (K,) * rank, slip)  # square, so that wrong axes broadcast
        inputs = {name: x + 1 for name, x in feeds(proto).items()}
        inputs = {name: x.astype(np.float16 if dtypes(s)[0] == HALF else np.float32) for name, x in inputs.items()}
        with np.errstate(all="ignore"):
            check_lift(proto, inputs=inputs, rtol=5 * tolerance(s))

    @pytest.mark.parametrize(
        ("slip", "s", "reason", "status"),
        [
            ("variance_axis", Spelling(), "axes is [-2], wants the last axis of 3", "near_miss"),
            ("variance_axis", Spelling(kind="rms"), "axes is [-2], wants the last axis of 3", "near_miss"),
            ("cube", Spelling(kind="rms"), "wants 2, got 3", "near_miss"),
            ("exponent", Spelling(root="pow_minus_half"), "wants -0.5, got -0.4", "near_miss"),
            ("keepdims", Spelling(kind="rms"), "keepdims is 0, wants 1", "near_miss"),
            (
                "wrong_count",
                Spelling(kind="rms", mean="sum_over_k"),
                "the sum is divided by 11, a mean over the last axis by 8",
                "declined",
            ),
        ],
    )
    def test_the_ledger_names_the_cause(self, slip: str, s: Spelling, reason: str, status: str) -> None:
        done, _ = run(spelt(s, dims=(K, K, K), slip=slip), "w8a8")
        (norm,) = done.ledger.of("norm")
        assert norm.status == status
        assert (norm.reason or "").endswith(reason)


FED: dict[str, Callable[[Graph, str], str]] = {
    "directly": lambda g, y: y,
    "through Identity": lambda g, y: g.op("Identity", y),
    "through Dropout": lambda g, y: g.op("Dropout", y),
    "through a Slice of everything": lambda g, y: g.op(
        "Slice", y, *(g.const(v, np.int64) for v in ([0, 0], [2**63 - 1] * 2, [0, 1], [1, 1]))
    ),
    "through Expand": lambda g, y: g.op("Expand", y, g.const([1], np.int64)),
    "through Reshape": lambda g, y: g.op("Reshape", y, g.const([-1, K], np.int64)),
    "through two views": lambda g, y: g.op(
        "Unsqueeze", g.op("Reshape", y, g.const([-1, K], np.int64)), g.const([0], np.int64)
    ),
}


class TestFeeding:
    """A lifted norm hands its Linear a quantized input, whatever lies between that changes no row."""

    @pytest.mark.parametrize("way", FED)
    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_views(self, way: str, kind: str) -> None:
        g = Graph()
        y = FED[way](g, write(g, g.input("x", ["B", 3, K]), Spelling(kind=kind)))
        proto = g.model(g.op("MatMul", y, g.weight(K, 6), out="y"))
        done, result = run(proto, "w8a8")
        assert site(done, "linear").fed_by == done.ledger.sites.index(site(done, "norm"))
        assert error(proto, result) < 0.03

    def test_a_slice_of_less_is_a_barrier(self) -> None:
        g = Graph()
        y = write(g, g.input("x", ["B", 3, K]), Spelling())
        y = g.op("Slice", y, *(g.const(v, np.int64) for v in ([0], [2], [1], [1])))
        done, _ = run(g.model(g.op("MatMul", y, g.weight(K, 6), out="y")), "w8a8")
        assert site(done, "linear").fed_by is None

    def test_nothing_known_but_the_weights(self) -> None:
        """Behind an unknown operator: the norm's width, Gemm's rank and the rows between follow from the weights."""
        g = Graph()
        h = g.op("LayerNormalization", g.op("Loose", g.input("x", ["B", 3, K]), domain="other"), g.gain(K))
        target = g.op(
            "Concat", g.const([-1], np.int64), g.op("Gather", g.op("Shape", h), g.const([2], np.int64)), axis=0
        )
        g.op("Gemm", g.op("Reshape", h, target), g.weight(K, 6), out="y")
        done, _ = run(g.model("y", dims=["R", 6]), "w8a8")
        assert site(done, "linear").fed_by == 0

    def test_a_cast_to_half_precision_is_no_barrier(self) -> None:
        """Mixed precision: the norm in float32, its Linears in float16, each behind a Cast of its own."""
        g = Graph()
        y = write(g, g.input("x", ["B", 3, K]), Spelling())
        for name in ("a", "b"):
            g.op("MatMul", g.op("Cast", y, to=HALF), g.weight(K, 6, dtype=np.float16), out=name)
        proto = g.model("a", "b")
        done, result = run(proto, "w8a8")
        assert [s.fed_by for s in done.ledger.of("linear")] == [0, 0]
        assert [n.op_type for n in result.graph.node] == ["LayernormQuantization", "SmoothQuantGemm", "SmoothQuantGemm"]
        assert error(proto, result) < 0.03

    def test_a_cast_that_others_read_is_not_swallowed(self) -> None:
        """Else the norm would be computed twice, and be two sites."""
        g = Graph()
        h = g.op("LayerNormalization", g.input("x", ["B", 3, K]), g.gain(K))
        c = g.op("Cast", h, to=HALF)
        g.op("Relu", c, out="a")
        g.op("MatMul", g.op("Cast", c, to=FULL), g.weight(K, 6), out="b")
        g.op("MatMul", c, g.weight(K, 6, dtype=np.float16), out="c")
        proto = g.model("a", "b", "c")
        done, result = run(proto, "w8a8")
        assert [s.nodes for s in done.ledger.of("norm")] == [["n_layernormalization_2", "n_cast_3"]]
        assert sum(n.op_type == "LayernormQuantization" for n in result.graph.node) == 1
        assert "LayerNormalization" not in [n.op_type for n in result.graph.node]
        assert error(proto, result) < 0.03

    def test_a_swallowed_cast_is_written_where_the_result_is_needed(self) -> None:
        g = Graph()
        y = g.op("Cast", write(g, g.input("x", ["B", 3, K]), Spelling()), to=HALF, out="h")
        g.op("MatMul", y, g.weight(K, K, dtype=np.float16), out="a")
        proto = g.model(g.op("Add", "a", y, out="y"))
        done, result = run(proto, "w8a8")
        assert [n.op_type for n in result.graph.node] == ["LayernormQuantization", "Cast", "SmoothQuantGemm", "Add"]
        assert site(done, "linear").fed_by == 0
        assert error(proto, result) < 0.03
