"""What must not fuse: each kind of it in the surroundings where transformers have it, in weight-only and in int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qpass.rewriter import Ledger
from qpass.spec import QuantSpec
from tests.rules.kit import Graph, error, ops, recipe, run
from tests.rules.spelling import Spelling, write

D, HEADS, SIZE = 16, 2, 8
PRESETS = ("w8a16", "w4a16", "w8a8")


def norm(g: Graph, x: str, kind: str = "rms", k: int = D) -> str:
    return write(g, x, Spelling(kind=kind), k=k, rank=4 if k == SIZE else 3)


def heads(g: Graph, x: str) -> str:
    """[B, S, D] → [B, HEADS, S, SIZE]"""
    parts = g.op("Reshape", x, g.const([0, 0, HEADS, SIZE], np.int64))
    return g.op("Transpose", parts, perm=[0, 2, 1, 3])


def rotary(g: Graph, x: str, angles: str) -> str:
    """x · cos + rotate_half(x) · sin"""
    ends = [g.const([v], np.int64) for v in (0, SIZE // 2, SIZE, 3)]
    low, high = (g.op("Slice", x, ends[i], ends[i + 1], ends[3]) for i in (0, 1))
    turned = g.op("Concat", g.op("Neg", high), low, axis=-1)
    return g.op("Add", g.op("Mul", x, g.op("Cos", angles)), g.op("Mul", turned, g.op("Sin", angles)))


def status(ledger: Ledger) -> dict[str, list[str]]:
    return {k: [s.status for s in ledger.of(k)] for k in ("norm", "linear")}


def check(proto: onnx.ModelProto, preset: str, norms: str, linears: str) -> list[str]:
    """Rewrites, compares the status of every site ("r", "k", "d", "e", "n") and the numbers; the ops that are left."""
    done, result = run(proto, preset)
    told = status(done.ledger)
    assert "".join(s[0] for s in told["norm"]) == (norms if preset == "w8a8" else "k" * len(norms))
    assert "".join(s[0] for s in told["linear"]) == linears
    assert error(proto, result) < (0.4 if preset == "w4a16" else 0.04)
    return ops(result)


@pytest.mark.parametrize("preset", PRESETS)
class TestNorms:
    def test_behind_attention_before_the_residual(self, preset: str) -> None:
        """A norm of the sublayer's result, as Gemma 2 has it, feeds an Add and no Linear."""
        g = Graph()
        x = g.input("x", ["B", "S", D])
        h = g.op("MatMul", norm(g, x), g.weight(D, D))
        y = g.op("Add", x, norm(g, h))
        g.op("MatMul", norm(g, y), g.weight(D, 4), out="y")
        left = check(g.model("y"), preset, "rkr", "rr")
        if preset == "w8a8":
            assert left.count("Sqrt") == 1, "the one behind the sublayer stays as it was"
            assert left.count("RmsnormQuantization") == 2

    @pytest.mark.parametrize("kind", ["rms", "layer"])
    def test_of_q_and_k_before_the_rotary_embedding(self, preset: str, kind: str) -> None:
        g = Graph()
        h = norm(g, g.input("x", ["B", "S", D]))
        angles = g.input("angles", ["S", SIZE])
        q, k, v = (heads(g, g.op("MatMul", h, g.weight(D, D))) for _ in "qkv")
        q, k = (rotary(g, norm(g, t, kind, SIZE), angles) for t in (q, k))
        scores = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])))
        mixed = g.op("Transpose", g.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        g.op("MatMul", g.op("Reshape", mixed, g.const([0, 0, D], np.int64)), g.weight(D, D), out="y")
        left = check(g.model("y"), preset, "rkk", "rrrr")
        assert left.count("MatMul") == 2, "those of two activations"

    @pytest.mark.parametrize("between", ["mask", "where", "concat", "pool", "mean", "gather", "transpose", "softmax"])
    def test_what_passes_something_else_first(self, preset: str, between: str) -> None:
        g = Graph()
        x = g.input("x", [2, 3, D])
        h, k = norm(g, x), D
        axis = g.const([1], np.int64)
        match between:
            case "mask":
                h = g.op("Mul", h, g.input("mask", [2, 3, 1]))
            case "where":
                h = g.op("Where", g.op("Greater", g.input("mask", [2, 3, 1]), g.const(0)), h, g.const(0))
            case "concat":
                h, k = g.op("Concat", h, x, axis=-1), 2 * D
            case "pool":
                h = g.op("ReduceMax", h, axis, keepdims=0)
            case "mean":
                h = g.op("ReduceMean", h, axis, keepdims=0)
            case "gather":  # the first token, as a classifier takes it
                h = g.op("Gather", h, g.const(0, np.int64), axis=1)
            case "transpose":
                h, k = g.op("Transpose", h, perm=[0, 2, 1]), 3
            case "softmax":
                h = g.op("Softmax", h)
        g.op("MatMul", h, g.weight(k, 4), out="y")
        linear = "d" if preset == "w4a16" and k % 2 else "r"
        left = check(g.model("y"), preset, "k", linear)
        assert "Sqrt" in left

    def test_that_feeds_no_linear(self, preset: str) -> None:
        g = Graph()
        x = g.input("x", ["B", "S", D])
        g.op("Tanh", norm(g, x, "layer"), out="y")
        assert "Sqrt" in check(g.model("y"), preset, "k", "")


def product(build: Callable[[Graph], str]) -> onnx.ModelProto:
    g = Graph()
    build(g)
    return g.model("y")


def inverse_frequencies(g: Graph) -> str:
    """positions [B, S, 1] · frequencies [1, SIZE]: an outer product."""
    positions = g.op("Unsqueeze", g.input("positions", ["B", "S"]), g.const([2], np.int64))
    frequencies = g.const(1 / 10000 ** (np.arange(SIZE)[None, None] / SIZE))
    return g.op("Cos", g.op("MatMul", positions, frequencies), out="y")


def frequencies_on_the_left(g: Graph) -> str:
    """frequencies [1, SIZE, 1] · positions [B, 1, S], as Llama's exporters write it."""
    positions = g.op("Unsqueeze", g.input("positions", ["B", "S"]), g.const([1], np.int64))
    frequencies = g.const(1 / 10000 ** (np.arange(SIZE)[None, :, None] / SIZE))
    return g.op("Cos", g.op("MatMul", frequencies, positions), out="y")


def expanded_frequencies(g: Graph) -> str:
    positions = g.op("Unsqueeze", g.input("positions", [2, "S"]), g.const([1], np.int64))
    frequencies = g.const(1 / 10000 ** (np.arange(SIZE)[None, :, None] / SIZE))
    wide = g.op("Expand", frequencies, g.const([2, SIZE, 1], np.int64))
    return g.op("Cos", g.op("MatMul", wide, positions), out="y")


def relative_positions(g: Graph) -> str:
    """scores [B, HEADS, S, SIZE] · table [HEADS, SIZE, 9]: one matrix a head."""
    q = g.input("x", ["B", HEADS, "S", SIZE])
    return g.op("MatMul", q, g.weight(HEADS, SIZE, 9), out="y")


def pooling_matrix(g: Graph) -> str:
    """A constant on the left mixes tokens, not channels."""
    return g.op("MatMul", g.const(np.full((2, 6), 1 / 6)), g.input("x", ["B", 6, D]), out="y")


@pytest.mark.parametrize("preset", PRESETS)
class TestMatMuls:
    @pytest.mark.parametrize(
        "build",
        [inverse_frequencies, frequencies_on_the_left, expanded_frequencies, relative_positions, pooling_matrix],
    )
    def test_constants_that_are_no_weights(self, preset: str, build: Any) -> None:
        """Named in the ledger, with a reason, and as they were."""
        proto = product(build)
        done, result = run(proto, preset)
        linears = done.ledger.of("linear")
        if build is not expanded_frequencies:  # whose operand is computed
            assert [s.status for s in linears] == ["declined"]
            assert linears[0].reason
        assert result.graph.node == proto.graph.node

    def test_two_activations(self, preset: str) -> None:
        g = Graph()
        x, z = g.input("x", ["B", "S", D]), g.input("z", ["B", D, 4])
        g.op("MatMul", x, z, out="y")
        proto = g.model("y")
        done, result = run(proto, preset)
        assert not done.ledger.sites
        assert result.graph.node == proto.graph.node

    def test_one_weight_through_identity(self, preset: str) -> None:
        """Every user gets the same quantized weight, which is written once and not smoothed for one of them."""
        g = Graph()
        x, z = g.input("x", ["B", "S", D]), g.input("z", ["B", "S", D])
        w = g.weight(D, D, name="shared")
        a = g.op("MatMul", norm(g, x), g.op("Identity", w))
        b = g.op("MatMul", norm(g, z), g.op("Identity", g.op("Identity", w)))
        g.op("MatMul", g.op("Add", a, b), w, out="y")
        proto = g.model("y")
        done, result = run(proto, preset)
        assert [s.status for s in done.ledger.of("linear")] == ["rewritten"] * 3
        weights = [t for t in result.graph.initializer if t.data_type == TensorProto.INT8]
        assert len(weights) == 1
        assert "shared" not in {t.name for t in result.graph.initializer}
        assert error(proto, result) < (0.4 if preset == "w4a16" else 0.04)

    @pytest.mark.parametrize("included", [False, True])
    def test_a_tied_head(self, preset: str, included: bool) -> None:
        g = Graph()
        table = g.weight(40, D, name="embedding")
        h = g.op("Gather", table, g.input("ids", ["B", "S"], TensorProto.INT64))
        h = norm(g, g.op("Add", h, g.op("MatMul", norm(g, h), g.weight(D, D, name="mixer"))))
        g.op("MatMul", h, g.op("Transpose", table, perm=[1, 0]), out="logits")
        proto = g.model("logits")
        base = recipe(QuantSpec.preset(preset).mode, include=["mixer", "embedding"]) if included else preset
        done, result = run(proto, base)
        head = done.ledger.of("linear")[-1]
        assert head.status == ("rewritten" if included else "excluded")
        assert "embedding" in {t.name for t in result.graph.initializer}, "rows are looked up in it"
        given = {"ids": np.array([[0, 7, 39], [3, 3, 1]])}
        assert error(proto, result, given) < (0.4 if preset == "w4a16" else 0.04)
