"""The ledger: every site once, under a name of its own, with its status and the true reason; tied heads."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qpass.graph import Given, Lazy
from qpass.quant_mode import QuantMode
from qpass.rewriter import Emit, Ledger, Pattern, const, need, op, rule, val
from qpass.rules.tied import equal
from qpass.testing import model
from tests.rules.kit import Array, Graph, error, ops, recipe, remarks, run, site
from tests.rules.spelling import Spelling, write

HEAD = '<ir_version: 10, opset_import: ["" : 18]>\n'
D = 32


class TestNames:
    def test_unnamed_and_repeated_names(self) -> None:
        g = Graph()
        x = g.input("x", ["B", D])
        for out, name in (("a", ""), ("b", "same"), ("c", "same"), ("d", "own")):
            x = g.op("MatMul", x, g.weight(D, D), out=out, name=name)
        done, _ = run(g.model("d"))
        assert [s.nodes for s in done.ledger.sites] == [["MatMul@a"], ["MatMul@b"], ["MatMul@c"], ["own"]]

    def test_helpers_are_listed(self) -> None:
        text = """g (float[B, 3, 8] x) => (float[B, 3, 4] y)
            <float[4, 8] w, float[4] b, int64[2] flat = {-1, 8}, int64[3] full = {-1, 3, 4}> {
            t = Transpose<perm = [1, 0]>(w)
            f = Reshape(x, flat)
            m = MatMul(f, t)
            a = Add(m, b)
            y = Reshape(a, full) }"""
        done, _ = run(model(HEAD + text))
        assert site(done, "linear").nodes == ["Transpose@t", "Reshape@f", "MatMul@m", "Add@a", "Reshape@y"]

    def test_scopes_select_sites(self) -> None:
        g = Graph()
        x = g.input("x", ["B", D])
        g.op("MatMul", x, g.weight(D, D), out="a", name="/model/layer.0/fc/MatMul")
        g.op("MatMul", "a", g.weight(D, D), out="b", name="node_b")
        g.nodes[-1].metadata_props.add(
            key="pkg.torch.onnx.name_scopes", value="['', 'model.layer.1', 'model.layer.1.fc', 'matmul']"
        )
        spec = recipe(QuantMode.use_weight_only(), overrides=[{"match": "model.layer.1.*", "mode": "none"}])
        done, _ = run(g.model("b"), spec)
        assert [s.status for s in done.ledger.sites] == ["rewritten", "kept"]


class TestStatuses:
    def test_norms_without_a_quantized_reader_are_kept(self) -> None:
        g = Graph()
        h = write(g, g.input("x", ["B", 3, D]), Spelling(), k=D)
        g.op("Relu", h, out="a")
        g.op("MatMul", write(g, "a", Spelling(kind="rms"), k=D), g.weight(D, 4), out="y")
        proto = g.model("y")
        for spec, last in (("w8a16", "kept"), ("w8a8", "rewritten")):
            done, result = run(proto, spec)
            first, second = done.ledger.of("norm")
            assert (first.status, first.reason) == (
                "kept",
                "no Linear that the spec quantizes with its activations reads it",
            )
            assert second.status == last
            assert result.graph.node[: len(first.nodes)] == proto.graph.node[: len(first.nodes)]

    @pytest.mark.parametrize(
        ("blocking", "opset"),
        [
            ("Mul(h, m)", 18),
            ("Concat<axis = 2>(h, h)", 18),
            ("Softmax(h)", 18),
            ("Slice(h, zero, one, two)", 18),
            ("Add(h, x)", 18),
        ],
    )
    def test_what_comes_between_keeps_the_norm(self, blocking: str, opset: int) -> None:
        """A mask, a concatenation, a pooling, a residual: the Linear behind it does not read the norm."""
        width = 16 if "Concat" in blocking else 8
        text = f"""g (float[B, 3, 8] x, float[1, 3, 1] m) => (float[B, S, 4] y)
            <float[8] w, float[{width}, 4] v, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{1}}> {{
                h = LayerNormalization(x, w)
                b = {blocking}
                y = MatMul(b, v)
            }}"""
        done, result = run(model(HEAD + text), "w8a8")
        assert site(done, "norm").status == "kept"
        assert site(done, "linear").status == "rewritten"
        assert site(done, "linear").fed_by is None
        assert "LayerNormalization" in [n.op_type for n in result.graph.node]

    def test_optimized_by_onnx_runtime(self) -> None:
        """Its fused operators are sites under their own names, a product of two activations is none."""
        g = Graph()
        x = g.input("x", [2, 3, D])
        h = g.op("SkipLayerNormalization", x, x, g.gain(D), g.gain(D), domain="com.microsoft", epsilon=1e-5)
        f = g.op("FusedMatMul", h, g.weight(D, D), domain="com.microsoft", transB=1)
        p = g.op("FusedMatMul", f, f, domain="com.microsoft", transB=1)
        g.op("MatMul", p, g.weight(3, 4), out="y")
        done, _ = run(g.model("y", dims=[2, 3, 4]), "w8a8")
        assert [(s.kind, s.status, s.nodes, s.fed_by) for s in done.ledger.sites] == [
            ("norm", "rewritten", [f"n_{h}"], None),
            ("linear", "rewritten", [f"n_{f}"], 0),
            ("linear", "rewritten", ["n_y"], None),
        ]

    @pytest.mark.parametrize(
        ("op", "inputs", "reason"),
        [
            ("QAttention", "x qw b s s", "it computes with integers; "),
            ("PackedAttention", "x w b i i", "its Linears are not taken out of it; "),
            ("MoE", "x x e e e", "its experts are not taken out of it; "),
        ],
    )
    def test_fused_operators_without_a_rule(self, op: str, inputs: str, reason: str) -> None:
        g = Graph()
        x = g.input("x", [2, D])
        given = {"x": x, "w": g.weight(D, 3 * D), "b": g.weight(3 * D), "s": g.const(1.0), "e": g.weight(2, D, D)}
        given |= {"qw": g.const(np.ones((D, 3 * D)), np.int8), "i": g.const([0, 1], np.int32)}
        g.op(op, *(given[i] for i in inputs.split()), out="y", domain="com.microsoft", num_heads=1)
        done, result = run(g.model("y", dims=[2, D]), "w8a16")
        (told,) = remarks(done, "linear")
        assert told.startswith(f"no rule for {op}: {reason}give qpass the model ")
        assert site(done, "linear").status == "declined"
        assert ops(result) == [op]

    @pytest.mark.parametrize("reader", ["silu", "norm"])
    def test_two_products_with_equal_inputs_are_two_sites(self, reader: str) -> None:
        """Their values are equal, as those of a mean that is computed twice; still neither is the other's twin."""
        g = Graph()
        x, w = g.input("x", ["B", 3, D]), g.weight(D, D)
        a, b = (g.op("MatMul", x, v, out=out) for v, out in ((w, "a"), (g.op("Identity", w), "b")))
        if reader == "silu":
            h = g.op("Mul", a, g.op("Sigmoid", b))
        else:
            d = g.op("Sub", a, g.reduce("ReduceMean", b, -1))
            spread = g.op("Sqrt", g.op("Add", g.reduce("ReduceMean", g.op("Mul", d, d), -1), g.const(1e-3)))
            h = g.op("Mul", g.op("Div", d, spread), g.gain(D))
        g.op("MatMul", h, g.weight(D, 4), out="y")
        proto = g.model("y")
        for spec in ("w8a16", "w8a8"):
            done, result = run(proto, spec)
            assert [s.nodes[-1] for s in done.ledger.of("linear")] == ["n_a", "n_b", "n_y"]
            assert {s.status for s in done.ledger.of("linear")} == {"rewritten"}
            assert error(proto, result) < 0.05


class TestWeights:
    def test_bytes(self) -> None:
        g = Graph()
        g.op("MatMul", g.input("x", ["B", 64]), g.weight(64, 32, name="w", dtype=np.float16), out="y")
        g.inputs[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["B", 64])
        done, _ = run(g.model("y"), "w4a16")
        weight = site(done, "linear").weight
        assert (weight.name, weight.shape, weight.dtype) == ("w", [64, 32], "float16")
        assert (weight.bytes_before, weight.bytes_after) == (64 * 32 * 2, 64 * 32 // 2 + 32 * 4)

    def test_declined_ones_have_a_weight_too(self) -> None:
        text = "g (float[8, S] x) => (float[4, S] y) <float[4, 8] w> { y = MatMul(w, x) }"
        done, _ = run(model(HEAD + text))
        assert site(done, "linear").weight.name == "w"

    def test_the_ledger_file_reads_back(self) -> None:
        g = Graph()
        g.op("MatMul", write(g, g.input("x", ["B", 3, D]), Spelling(), k=D), g.weight(D, D), out="y")
        done, _ = run(g.model("y"), "w8a8")
        again = Ledger.from_json(done.ledger.to_json())
        assert again == done.ledger
        assert again.totals()["linear"] == {"sites": 1, "rewritten": 1}


def decoder(embedding: Array, head: Array, *, transposed: bool = True, dtype: Any = np.float32) -> onnx.ModelProto:
    """ids → embedding → · head, two initializers."""
    g = Graph()
    e = g.op("Gather", g.const(embedding, dtype, "embedding"), g.input("ids", ["B", "S"], TensorProto.INT64))
    h = g.const(head if not transposed else head.T, dtype, "head")
    g.op("MatMul", e, h if transposed else g.op("Transpose", h, perm=[1, 0]), out="logits")
    return g.model("logits")


class TestTied:
    """A head is tied by its initializer, or by values equal to the embedding's."""

    table = np.random.default_rng(0).standard_normal((700, D))
    reason = "its weight '{}' is the embedding's own; include it by name to quantize it"

    def test_the_same_initializer(self) -> None:
        g = Graph()
        w = g.const(self.table, name="embedding")
        e = g.op("Gather", w, g.input("ids", ["B"], TensorProto.INT64))
        g.op("MatMul", e, g.op("Transpose", w, perm=[1, 0]), out="y")
        done, _ = run(g.model("y"))
        assert (site(done, "linear").status, site(done, "linear").reason) == (
            "excluded",
            self.reason.format("embedding"),
        )

    @pytest.mark.parametrize("transposed", [True, False])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_an_equal_copy(self, transposed: bool, dtype: Any) -> None:
        done, _ = run(decoder(self.table, self.table, transposed=transposed, dtype=dtype))
        assert (site(done, "linear").status, site(done, "linear").reason) == ("excluded", self.reason.format("head"))
        assert done.ledger.coverage() == 1

    @pytest.mark.parametrize("at", [(0, 0), (699, D - 1), (350, 7)])
    def test_an_almost_equal_copy_is_not_tied(self, at: tuple[int, int]) -> None:
        head = self.table.copy()
        head[at] += 1e-3
        done, _ = run(decoder(self.table, head))
        assert site(done, "linear").status == "rewritten"

    def test_a_square_weight_that_is_the_embedding_untransposed_is_not(self) -> None:
        table = self.table[:D]
        done, _ = run(decoder(table, table.T))
        assert site(done, "linear").status == "rewritten"

    def test_included_by_name_it_is_rewritten_and_the_embedding_stays(self) -> None:
        proto = decoder(self.table, self.table)
        done, result = run(proto, recipe(QuantMode.use_weight_only(), include=["head"]))
        assert site(done, "linear").status == "rewritten"
        assert "embedding" in {t.name for t in result.graph.initializer}
        assert error(proto, result, {"ids": np.array([[1, 2, 699]])}) < 0.02

    def test_only_what_may_be_equal_is_read(self) -> None:
        class Counted(Lazy):
            def __init__(self, array: Array) -> None:
                self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, 0

            def rows(self, start: int, stop: int) -> Array:
                self.read = max(self.read, (stop - start) * self.shape[1])
                self.last = stop
                return self.array[start:stop]

        big = np.ones((5000, 1000), np.float32)
        other = big.copy()
        other[3, 3] = 2
        left = Counted(big)
        assert not equal(left, Given(other))
        assert (left.last, left.read) == (16, 16000)  # one small block
        assert equal(left, Given(big))
        assert left.read <= 1 << 20  # and never much at once

    def test_through_embed_layer_normalization(self) -> None:
        g = Graph()
        ids = g.input("ids", [1, 3], TensorProto.INT32)
        words, positions, gamma, beta = (g.const(self.table), g.weight(8, D), g.gain(D), g.gain(D))
        e = g.fresh("e")
        inputs = [ids, "", words, positions, "", gamma, beta]
        g.nodes.append(helper.make_node("EmbedLayerNormalization", inputs, [e, "m"], "embed", domain="com.microsoft"))
        g.op("MatMul", e, g.const(self.table.T), out="y")
        done, _ = run(g.model("y", dims=[1, 3, 700]))
        assert site(done, "linear").status == "excluded"


class AnyMatMul(Pattern):
    x: Any = val()
    w: Any = const()
    y = op.Relu(op.MatMul(x, w))


@rule
def fuse_two(m: AnyMatMul, new: Emit, cfg: object) -> Any:
    """Relu(x · w) as a Gemm and a Relu, as an author's rule over ONNX nodes might."""
    need(len(m.w.shape) == 2, "no matrix")
    return new.onnx("Clip", new.onnx("Gemm", m.x, m.w.array), np.float32(0))


class TestEarlyRules:
    """Rules over ONNX's own nodes run before lifting; what they take is a site still."""

    def test_a_claimed_matmul_is_rewritten(self) -> None:
        g = Graph()
        g.op("Relu", g.op("MatMul", g.input("x", ["B", D]), g.weight(D, D), out="m"), out="r")
        g.op("MatMul", "r", g.weight(D, 4), out="y")
        proto = g.model("y")
        done, result = run(proto, rules=[fuse_two])
        assert [(s.status, s.rule, s.nodes) for s in done.ledger.sites] == [
            ("rewritten", "weight_only", ["n_m", "n_r"]),  # the Gemm that it emitted is a Linear
            ("rewritten", "weight_only", ["n_y"]),
        ]
        assert error(proto, result) < 0.02

    def test_what_is_no_linear_any_more_is_its_own(self) -> None:
        @rule
        def away(m: AnyMatMul, new: Emit, cfg: object) -> Any:
            return new.onnx("Einsum", m.x, m.w.array, equation="bi,ij->bj")

        g = Graph()
        g.op("Relu", g.op("MatMul", g.input("x", ["B", D]), g.weight(D, D), out="m"), out="y")
        done, _ = run(g.model("y"), rules=[away])
        assert [(s.status, s.rule, s.op, s.nodes) for s in done.ledger.sites] == [
            ("rewritten", "away", None, ["n_m", "n_y"])
        ]

    def test_two_in_one_match_are_named_once_each(self) -> None:
        class Pair(Pattern):
            x: Any = val()
            v: Any = const()
            w: Any = const()
            y = op.MatMul(op.MatMul(x, v), w)

        @rule
        def merge(m: Pair, new: Emit, cfg: object) -> Any:
            return new.onnx("Gemm", new.onnx("Gemm", m.x, m.v.array), m.w.array)

        g = Graph()
        g.op("MatMul", g.op("MatMul", g.input("x", ["B", D]), g.weight(D, D), out="m"), g.weight(D, 4), out="y")
        done, _ = run(g.model("y"), rules=[merge])
        named = Counter(n for s in done.ledger.sites for n in s.nodes)
        assert named == {"n_m": 1, "n_y": 1}
