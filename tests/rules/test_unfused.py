"""Operators that ONNX Runtime fused: each beside the twin that it was made of, whole and quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qpass.pipeline import Rewritten
from qpass.rules.unfused import ACTIVATIONS
from qpass.testing import feeds
from tests.rules.kit import Array, Graph, error, ops, outputs, remarks, run, spell_linear, spell_norm

MS = "com.microsoft"
K = 16
HEADS = 2
FLOAT = TensorProto.FLOAT
Results = Mapping[str, tuple[list[Any], int]]
Build = Callable[[Graph, bool], Results]
"""Writes the fused operators into a graph, or what they stand for; gives the outputs with their dims and types."""

ROWS = ["B", "S", None]


def several(g: Graph, type_: str, inputs: list[str], results: list[str], domain: str = MS, **attributes: Any) -> None:
    """A node with several outputs, "" for one that it does not have."""
    node = helper.make_node(type_, inputs, results, f"n_{results[0]}", domain=domain, **attributes)
    g.nodes.append(node)


def make(build: Build, fused: bool, opset: int = 18) -> onnx.ModelProto:
    g = Graph(opset=opset)
    results = build(g, fused)
    proto = g.model(*results, dims=[], check=False)
    for info, (name, (dims, dtype)) in zip(proto.graph.output, results.items(), strict=True):
        info.CopyFrom(helper.make_tensor_value_info(name, dtype, dims))
    if MS not in {o.domain for o in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(MS, 1))
    return proto


def sites(done: Rewritten) -> list[tuple[str, str, int | None]]:
    return [(s.kind, s.status, s.fed_by) for s in done.ledger.sites]


def check(build: Build, given: dict[str, Array] | None = None, runs: bool = True) -> dict[str, onnx.ModelProto]:
    """The fused form and its twin are found alike, site by site, and quantized to the same; the results by preset.

    Args:
        runs: whether ONNX Runtime has the fused operator on the CPU.
    """
    model, twin = make(build, True), make(build, False)
    given = feeds(twin, B=2, S=3) if given is None else given
    if runs:
        assert error(model, twin, given) < 2e-6
    assert run(model, rules=[], only_rules=True)[1].graph.node == model.graph.node, "unclaimed, all goes back"
    if runs:
        assert error(model, run(model, rules=[spell_norm, spell_linear], only_rules=True)[1], given) < 2e-6
    results = {}
    for preset in ("w8a16", "w8a8"):
        done, results[preset] = run(model, preset)
        expected, quantized = run(twin, preset)
        assert sites(done) == sites(expected)
        named = [n for s in done.ledger.sites for n in s.nodes]
        assert len(named) == len(set(named))
        assert set(named) <= {n.name for n in model.graph.node}
        assert error(results[preset], quantized, given) < (2e-6 if preset == "w8a16" else 5e-3)
    return results


def norm(g: Graph, fused: bool, kind: str, x: str, skip: str, beta: bool, bias: str, total: str = "") -> str:
    """A norm of x + skip (+ bias), and its sum under the name `total`."""
    weights = [g.gain(K), *([g.gain(K)] if beta and kind == "Layer" else [])]
    if fused:
        inputs = [x, skip, *weights]
        if bias:
            inputs += [""] * (kind == "Layer" and not beta) + [bias]
        type_ = "SkipLayerNormalization" if kind == "Layer" else "SkipSimplifiedLayerNormalization"
        out = g.fresh("norm")
        several(g, type_, inputs, [out, "", "", total] if total else [out], epsilon=1e-5)
        return out
    if bias:
        skip = g.op("Add", skip, bias)
    total = g.op("Add", x, skip, out=total)
    if kind == "Layer":
        return g.op("LayerNormalization", total, *weights, epsilon=1e-5)
    deviation = g.op("Sqrt", g.op("Add", g.reduce("ReduceMean", g.op("Mul", total, total), -1), g.const(1e-5)))
    return g.op("Mul", g.op("Div", total, deviation), weights[0])


class TestSkipNorms:
    @pytest.mark.parametrize("kind", ["Layer", "Simplified"])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("total", ["", "sum"])
    @pytest.mark.parametrize("beta", [False, True])
    def test_each_form(self, kind: str, bias: bool, total: str, beta: bool) -> None:
        def build(g: Graph, fused: bool) -> Results:
            x = g.input("x", ["B", "S", K])
            a = g.op("MatMul", g.op("Tanh", x), g.weight(K, K), out="product")
            h = norm(g, fused, kind, x, a, beta, g.gain(K) if bias else "", total)
            g.op("MatMul", h, g.weight(K, 8), out="y")
            return dict.fromkeys(["y", *([total] if total else [])], (ROWS, FLOAT))

        results = check(build)
        left = ops(results["w8a16"])
        type_ = "SkipLayerNormalization" if kind == "Layer" else "SkipSimplifiedLayerNormalization"
        assert left == ["Tanh", "WeightOnlyQuantMatmul", type_, "WeightOnlyQuantMatmul"]
        inputs = results["w8a16"].graph.node[1].input
        assert len(inputs) == 3 + bias, "the bias is the Linear's"
        assert type_ not in ops(results["w8a8"])

    @pytest.mark.parametrize("at", [0, 1])
    def test_the_bias_goes_to_the_product(self, at: int) -> None:
        """Whichever operand that is."""

        def build(g: Graph, fused: bool) -> Results:
            x = g.input("x", ["B", "S", K])
            a = g.op("MatMul", x, g.weight(K, K))
            gamma, beta, bias = g.gain(K), g.gain(K), g.gain(K)
            if fused:
                operands = [x, a] if at else [a, x]
                several(g, "SkipLayerNormalization", [*operands, gamma, beta, bias], ["y"], epsilon=1e-5)
            else:
                total = g.op("Add", g.op("Add", a, bias), x)
                g.op("LayerNormalization", total, gamma, beta, epsilon=1e-5, out="y")
            return {"y": (ROWS, FLOAT)}

        results = check(build)
        assert ops(results["w8a16"]) == ["WeightOnlyQuantMatmul", "SkipLayerNormalization"]
        product, norm = results["w8a16"].graph.node
        assert len(product.input) == 4
        assert norm.input[at] == product.output[0]

    def test_a_bias_of_no_linear_stays(self) -> None:
        def build(g: Graph, fused: bool) -> Results:
            x = g.input("x", ["B", "S", K])
            h = norm(g, fused, "Layer", x, g.op("Tanh", x), True, g.gain(K))
            g.op("MatMul", h, g.weight(K, 8), out="y")
            return {"y": (ROWS, FLOAT)}

        model = make(build, True)
        assert run(model, "w8a16")[1].graph.node[:2] == model.graph.node[:2]
        check(build)

    def test_a_skip_that_broadcasts(self) -> None:
        def build(g: Graph, fused: bool) -> Results:
            x, skip = g.input("x", ["B", "S", K]), g.input("p", ["S", K])
            g.op("MatMul", norm(g, fused, "Layer", x, skip, True, ""), g.weight(K, 8), out="y")
            return {"y": (ROWS, FLOAT)}

        check(build)

    def test_statistics_that_are_used(self) -> None:
        """The mean is a further output: it cannot go."""
        g = Graph()
        x = g.input("x", ["B", "S", K])
        several(g, "SkipLayerNormalization", [x, x, g.gain(K)], ["h", "mean"], epsilon=1e-5)
        g.op("MatMul", "h", g.weight(K, 8), out="y")
        proto = g.model("y", "mean", dims=ROWS)
        done, result = run(proto, "w8a8")
        assert remarks(done, "norm") == ["its outputs mean and inv_std_var are used, which no norm of qpass gives"]
        assert result.graph.node[0] == proto.graph.node[0]

    def test_a_gamma_that_is_computed(self) -> None:
        g = Graph()
        x = g.input("x", ["B", "S", K])
        gamma = g.op("Abs", g.input("g", [K]))
        several(g, "SkipLayerNormalization", [x, x, gamma], ["h"], epsilon=1e-5)
        g.op("MatMul", "h", g.weight(K, 8), out="y")
        proto = g.model("y", dims=ROWS)
        done, result = run(proto, "w8a8")
        assert done.ledger.of("norm")[0].status == "near_miss"
        assert "wants a constant, got 'abs_" in remarks(done, "norm")[0]
        assert result.graph.node[1] == proto.graph.node[1]


class TestEmbedding:
    @pytest.mark.parametrize("positions", ["", "rows", "one row"])
    @pytest.mark.parametrize("segments", [False, True])
    @pytest.mark.parametrize("mask", [None, False, True])
    def test_each_form(self, positions: str, segments: bool, mask: bool | None) -> None:
        """`mask`: whether there is one; None where its count is not asked for."""

        def build(g: Graph, fused: bool) -> Results:
            i32 = TensorProto.INT32
            ids = g.input("ids", ["B", "S"], i32)
            words, places, kinds = g.weight(9, K), g.weight(7, K), g.weight(2, K)
            gamma, beta = g.gain(K), g.gain(K)
            segment_ids = g.input("segment_ids", ["B", "S"], i32) if segments else ""
            given = g.input("mask", ["B", "S"], i32) if mask else ""
            rows = 1 if positions == "one row" else "B"
            position_ids = g.input("position_ids", [rows, "S"], i32) if positions else ""
            found: Results = {"y": (ROWS, FLOAT), "sum": (ROWS, FLOAT)}
            if mask is not None:
                found = {**found, "count": (["B"], i32)}
            if fused:
                inputs = [ids, segment_ids, words, places, kinds if segments else "", gamma, beta, given, position_ids]
                while not inputs[-1]:
                    inputs.pop()
                results = ["h", "" if mask is None else "count", "sum"]
                several(g, "EmbedLayerNormalization", inputs, results, epsilon=1e-5)
            else:
                at = position_ids or g.op(
                    "Range",
                    g.const(0, np.int64),
                    g.op("Gather", g.op("Shape", ids), g.const(1, np.int64)),
                    g.const(1, np.int64),
                )
                total = g.op("Add", g.op("Gather", words, ids), g.op("Gather", places, at))
                if segments:
                    total = g.op("Add", total, g.op("Gather", kinds, segment_ids))
                g.op("Identity", total, out="sum")
                g.op("LayerNormalization", total, gamma, beta, epsilon=1e-5, out="h")
                if mask is not None:
                    counted = given or g.op("Mul", ids, g.const(0, np.int32))
                    g.op("ReduceSum", counted, g.const([1], np.int64), keepdims=0, out="count")
            g.op("MatMul", "h", g.weight(K, 8), out="y")
            return found

        results = check(build)
        assert "EmbedLayerNormalization" in ops(results["w8a16"])
        assert "EmbedLayerNormalization" not in ops(results["w8a8"])


class TestActivations:
    @pytest.mark.parametrize("type_", ["BiasGelu", "FastGelu"])
    def test_a_bias_before_gelu(self, type_: str) -> None:
        def build(g: Graph, fused: bool) -> Results:
            a, bias = g.op("MatMul", g.input("x", ["B", "S", K]), g.weight(K, 8)), g.gain(8)
            if fused:
                h = g.op(type_, a, bias, domain=MS)
            else:
                h = g.op(type_.removeprefix("Bias"), g.op("Add", a, bias), domain=MS)
            g.op("MatMul", h, g.weight(8, K), out="y")
            return {"y": (ROWS, FLOAT)}

        results = check(build)
        gelu = type_.removeprefix("Bias")
        assert ops(results["w8a16"]) == ["WeightOnlyQuantMatmul", gelu, "WeightOnlyQuantMatmul"]
        assert type_ == gelu or type_ not in ops(results["w8a8"])

    def test_a_bias_that_is_no_linears(self) -> None:
        """A product of two activations, and what is added to it, stay one."""
        g = Graph()
        x = g.input("x", ["B", K, K])
        g.op("BiasGelu", g.op("MatMul", x, x), g.gain(K), domain=MS, out="y")
        proto = g.model("y", dims=ROWS)
        assert run(proto, "w8a16")[1].graph.node == proto.graph.node

    @pytest.mark.parametrize("bias", [False, True])
    def test_gemm_fast_gelu(self, bias: bool) -> None:
        def build(g: Graph, fused: bool) -> Results:
            x, w, b = g.input("x", ["B", "S", K]), g.weight(K, 8), g.gain(8)
            if fused:
                g.op("GemmFastGelu", x, w, *([b] if bias else []), domain=MS, out="y")
            else:
                h = g.op("MatMul", x, w)
                g.op("FastGelu", g.op("Add", h, b) if bias else h, domain=MS, out="y")
            return {"y": (ROWS, FLOAT)}

        assert ops(check(build, runs=False)["w8a16"]) == ["WeightOnlyQuantMatmul", "FastGelu"]


class TestProducts:
    @pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
    @pytest.mark.parametrize("turned", [0, 1])
    def test_fused_gemm(self, activation: str, turned: int) -> None:
        numbers = {"alpha": 0.25, "beta": 0.5, "gamma": 0.75}

        def build(g: Graph, fused: bool) -> Results:
            inputs = [g.input("x", ["B", K]), g.weight(8, K) if turned else g.weight(K, 8), g.gain(8)]
            gemm: dict[str, Any] = {"alpha": 0.5, "beta": 2.0, "transB": turned}
            given: dict[str, Any] = {k: numbers[k] for k in ACTIVATIONS[activation]}
            if fused:
                own: dict[str, Any] = {f"activation_{k}": v for k, v in given.items()}
                g.op("FusedGemm", *inputs, domain=MS, out="y", activation=activation, **gemm, **own)
            else:
                g.op(activation, g.op("Gemm", *inputs, **gemm), out="y", **given)
            return {"y": (["B", 8], FLOAT)}

        results = check(build)
        assert ops(results["w8a16"]) == ["WeightOnlyQuantMatmul", activation]

    def test_an_activation_that_is_not_known(self) -> None:
        g = Graph()
        inputs = [g.input("x", ["B", K]), g.weight(K, 8)]
        g.op("FusedGemm", *inputs, domain=MS, out="y", activation="Mish")
        proto = g.model("y", dims=["B", 8])
        done, result = run(proto, "w8a16")
        assert remarks(done, "linear")[0].startswith("its activation is Mish; qpass knows Relu, Sigmoid")
        assert result.graph.node == proto.graph.node

    def test_a_gemm_with_a_transposed_input(self) -> None:
        g = Graph()
        inputs = [g.input("x", [K, "B"]), g.weight(K, 8)]
        g.op("FusedGemm", *inputs, domain=MS, out="y", activation="Relu", transA=1)
        proto = g.model("y", dims=["B", 8])
        done, result = run(proto, "w8a16")
        assert remarks(done, "linear") == ["transA is set: the rows of the input are its columns"]
        assert result.graph.node == proto.graph.node

    @pytest.mark.parametrize("activation", ["Relu", "LeakyRelu"])
    def test_fused_matmul_activation(self, activation: str) -> None:
        def build(g: Graph, fused: bool) -> Results:
            x, w = g.input("x", ["B", "S", K]), g.weight(8, K)
            given = dict.fromkeys(ACTIVATIONS[activation], 0.25)
            if fused:
                own: dict[str, Any] = {f"activation_{k}": v for k, v in given.items()}
                g.op("FusedMatMulActivation", x, w, domain=MS, out="y", activation=activation, transB=1, **own)
            else:
                g.op(activation, g.op("MatMul", x, g.op("Transpose", w, perm=[1, 0])), out="y", **given)
            return {"y": (ROWS, FLOAT)}

        assert ops(check(build, runs=False)["w8a16"]) == ["WeightOnlyQuantMatmul", activation]

    @pytest.mark.parametrize("turned", [0, 1])
    @pytest.mark.parametrize("alpha", [1.0, 0.125])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("type_", ["FusedMatMul", "TransposeMatMul"])
    def test_fused_matmul(self, turned: int, alpha: float, bias: bool, type_: str) -> None:
        def build(g: Graph, fused: bool) -> Results:
            x = g.op("LayerNormalization", g.input("x", ["B", "S", K]), g.gain(K))
            w, b = g.weight(8, K) if turned else g.weight(K, 8), g.gain(8)
            if fused:
                h = g.op(type_, x, w, domain=MS, transB=turned, alpha=alpha, out="" if bias else "y")
            else:
                w = g.op("Transpose", w, perm=[1, 0]) if turned else w
                h = g.op("MatMul", x, g.op("Mul", w, g.const(alpha)), out="" if bias else "y")
            if bias:
                g.op("Add", b, h, out="y")
            return {"y": (ROWS, FLOAT)}

        model, twin = make(build, True), make(build, False)
        given = feeds(model, B=2, S=3)
        assert error(model, twin, given) < 2e-6
        for preset, rtol in (("w8a16", 0.01), ("w8a8", 0.02)):
            done, result = run(model, preset)
            assert sites(done)[-1] == ("linear", "rewritten", 0 if preset == "w8a8" else None)
            assert "Add" not in ops(result)
            assert error(model, result, given) < rtol

    @pytest.mark.parametrize("attribute", ["transA", "transBatchA", "transBatchB"])
    def test_a_matmul_that_moves_its_input(self, attribute: str) -> None:
        g = Graph()
        x = g.input("x", [K, K, K])
        g.op("FusedMatMul", x, g.weight(K, K), domain=MS, out="y", **{attribute: 1})
        proto = g.model("y", dims=[K, K, K])
        done, result = run(proto, "w8a16")
        assert [s.status for s in done.ledger.of("linear")] == ["declined"]
        assert result.graph.node == proto.graph.node

    def test_a_matmul_of_two_activations_is_no_site(self) -> None:
        g = Graph()
        x = g.input("x", ["B", "S", K])
        g.op("FusedMatMul", x, x, domain=MS, out="y", transB=1, alpha=0.25)
        done, _ = run(g.model("y", dims=ROWS), "w8a16")
        assert done.ledger.sites == []

    def test_a_tied_head_with_a_factor(self) -> None:
        """T5's: its weight is the embedding's, the factor before it went into the product."""
        g = Graph()
        table = g.weight(12, K)
        h = g.op("Gather", table, g.input("ids", ["B", "S"], TensorProto.INT64))
        g.op("FusedMatMul", h, table, domain=MS, transB=1, alpha=0.125, out="y")
        done, _ = run(g.model("y", dims=ROWS), "w8a16")
        assert [s.status for s in done.ledger.of("linear")] == ["excluded"]


class TestAttention:
    """The twin is not written out: the whole operator is compared with its quantized form, at 16 bits nearly equal."""

    @staticmethod
    def model(inputs: dict[str, Any], results: dict[str, Any] | None = None, v: int = K, **attributes: Any) -> Any:
        g = Graph()
        x = g.op("LayerNormalization", g.input("x", ["B", "S", K]), g.gain(K))
        names = {"w": g.weight(K, 2 * K + v, name="w"), "bias": g.gain(2 * K + v, name="bias")}
        for name, (dims, dtype) in inputs.items():
            if name not in names:
                names[name] = g.input(name, dims, dtype)
        order = ["mask", "past", "scores", "length"]
        given = [x, "w", *(names[n] if n in inputs else "" for n in ["bias", *order])]
        while not given[-1]:
            given.pop()
        several(g, "Attention", given, ["y", *(results or {})], num_heads=HEADS, **attributes)
        proto = g.model("y", *(results or {}), dims=[], check=False)
        for info, dims in zip(proto.graph.output, [["B", "S", v], *(results or {}).values()], strict=True):
            info.CopyFrom(helper.make_tensor_value_info(info.name, FLOAT, dims))
        return proto

    BIAS: ClassVar[dict[str, Any]] = {"bias": ([3 * K], FLOAT)}
    FORMS: ClassVar[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
        "plain": (BIAS, {}),
        "causal": (BIAS, {"unidirectional": 1, "scale": 0.1}),
        "lengths": ({**BIAS, "mask": (["B"], TensorProto.INT32)}, {}),
        "padding": ({**BIAS, "mask": (["B", "S"], TensorProto.INT32)}, {"mask_filter_value": -1e4}),
        "pairs": ({**BIAS, "mask": (["B", "S", "S"], TensorProto.INT32)}, {}),
        "scores": ({**BIAS, "scores": (["B", HEADS, "S", "S"], FLOAT)}, {}),
        "wide": (BIAS, {"qkv_hidden_sizes": [K, K, 2 * K]}),
    }

    @pytest.mark.parametrize("form", FORMS)
    def test_each_form(self, form: str) -> None:
        inputs, attributes = self.FORMS[form]
        model = self.model(inputs, v=2 * K if form == "wide" else K, **attributes)
        self.check(model, feeds(model, B=2, S=4))

    @pytest.mark.parametrize("causal", [0, 1])
    @pytest.mark.parametrize("past", [False, True])
    @pytest.mark.parametrize("mask", [False, True])
    def test_present_keys_and_values(self, causal: int, past: bool, mask: bool) -> None:
        inputs: dict[str, Any] = dict(self.BIAS)
        if past:
            inputs["past"] = ([2, "B", HEADS, "P", K // HEADS], FLOAT)
        if mask:
            inputs["mask"] = (["B", "T" if past else "S"], TensorProto.INT32)
        model = self.model(inputs, {"present": [2, "B", HEADS, None, K // HEADS]}, unidirectional=causal)
        self.check(model, feeds(model, B=2, S=4, P=3, T=7))

    def check(self, model: onnx.ModelProto, given: dict[str, Array]) -> None:
        assert np.isfinite(outputs(model, given)[0]).all()
        assert run(model, rules=[], only_rules=True)[1].graph.node == model.graph.node
        assert error(model, run(model, rules=[spell_linear], only_rules=True)[1], given) < 2e-6
        for preset, rtol in (("w8a16", 0.01), ("w8a8", 0.02)):
            done, result = run(model, preset)
            (linear,) = done.ledger.of("linear")
            assert (linear.status, linear.nodes) == ("rewritten", ["n_y"])
            assert linear.weight is not None
            assert linear.weight.name == "w"
            assert linear.fed_by == (0 if preset == "w8a8" else None)
            assert "MultiHeadAttention" in ops(result)
            assert "Add" not in ops(result), "the bias is the Linear's"
            assert error(model, result, given) < rtol

    @pytest.mark.parametrize(
        ("mask", "attributes", "reason"),
        [
            (["B2"], {}, "the shape of its mask is ['B2'], that of its input ['B', 'S', 16]: not known to fit"),
            (["B", 1], {}, "the shape of its mask is ['B', 1], that of its input ['B', 'S', 16]: not known to fit"),
            (
                ["B", 1, "M", "M"],
                {},
                "the shape of its mask is ['B', 1, 'M', 'M'], that of its input ['B', 'S', 16]: not known to fit",
            ),
            (["B"], {"do_rotary": 1}, "it rotates q and k itself, which MultiHeadAttention does not"),
            (["B"], {"past_present_share_buffer": 1}, "its past and present share a buffer"),
        ],
    )
    def test_what_is_no_multi_head_attention(self, mask: list[Any], attributes: dict[str, Any], reason: str) -> None:
        model = self.model({**self.BIAS, "mask": (mask, TensorProto.INT32)}, **attributes)
        done, result = run(model, "w8a16")
        assert remarks(done, "linear") == [reason]
        assert result.graph.node == model.graph.node


class TestBeforeOpset17:
    @pytest.mark.parametrize("opset", [14, 18])
    @pytest.mark.parametrize("type_", ["LayerNormalization", "SimplifiedLayerNormalization"])
    def test_norms_in_the_standard_domain(self, type_: str, opset: int) -> None:
        """ONNX Runtime's optimizer writes them at any opset, where onnx's checker does not know them."""
        g = Graph(opset=opset)
        x = g.input("x", ["B", "S", K])
        h = g.op(type_, x, g.gain(K), axis=-1, epsilon=1e-5, stash_type=1)
        g.op("MatMul", h, g.weight(K, 8), out="y")
        proto = g.model("y", dims=ROWS, check=False)
        done, result = run(proto, "w8a8")
        assert sites(done) == [("norm", "rewritten", None), ("linear", "rewritten", 0)]
        assert error(proto, result) < 0.02
