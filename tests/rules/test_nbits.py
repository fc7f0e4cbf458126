"""com.microsoft.MatMulNBits, as ONNX Runtime's quantizer, Olive and onnxruntime-genai write it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpass.spec import QuantSpec
from tests.rules.kit import error, lifted, ops, run, site
from tests.rules.quantized import GROUPWISE, PER_CHANNEL, K, N, Quantized, check
from tests.rules.test_weight_only import attributes


@pytest.mark.parametrize("zero", ["", "packed", "float"])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_integers_stay(bits: int, block: int, zero: str) -> None:
    g = Quantized()
    k = 512
    y = g.nbits(g.input("x", ["B", 3, k]), bits, block, k=k, zero=zero)
    proto = g.model(y, dims=["B", 3, N], check=False)
    done, result = run(proto, "w8a8")
    assert ops(result) == [GROUPWISE]
    assert attributes(result.graph.node[0])["group_size"] == min(block, 128)
    check(g, result, result.graph.node[0], y)
    if (bits, zero) != (8, "float"):  # which ONNX Runtime's CPU kernel does not take
        assert error(proto, result) < 1e-5
    assert site(done, "linear").reason.startswith(f"its weight came quantized: uint{bits}, group {block}")
    assert site(done, "linear").nodes == [f"n_{y}"]


@pytest.mark.parametrize("blocks", [3, 5])
def test_an_odd_number_of_packed_zero_points(blocks: int) -> None:
    g = Quantized()
    y = g.nbits(g.input("x", ["B", 32 * blocks]), 4, 32, k=32 * blocks, zero="packed")
    proto = g.model(y, dims=["B", N], check=False)
    _, result = run(proto)
    check(g, result, result.graph.node[0], y)
    assert error(proto, result) < 1e-5


def test_the_last_block_may_be_unfull() -> None:
    g = Quantized()
    y = g.nbits(g.input("x", ["B", 96]), 4, 64, k=96, zero="packed")
    proto = g.model(y, dims=["B", N], check=False)
    _, result = run(proto)
    assert attributes(result.graph.node[0])["group_size"] == 32
    check(g, result, result.graph.node[0], y)
    assert error(proto, result) < 1e-5


@pytest.mark.parametrize("where", ["input", "Add"])
@pytest.mark.parametrize("zero", ["", "packed"])
def test_bias(where: str, zero: str) -> None:
    g = Quantized()
    bias = g.random.standard_normal(N).astype(np.float32)
    w = y = g.nbits(g.input("x", ["B", K]), 4, 32, zero=zero, bias=bias if where == "input" else None)
    if where == "Add":
        y = g.op("Add", y, g.const(bias))
    proto = g.model(y, dims=["B", N], check=False)
    _, result = run(proto)
    assert ops(result) == [GROUPWISE]
    assert attributes(result.graph.node[0])["quant_algo"] == (3 if zero else 1)
    check(g, result, result.graph.node[0], w)
    assert error(proto, result) < 1e-5


def test_float16_and_what_comes_behind() -> None:
    """onnx knows no MatMulNBits: dtypes and shapes behind it are found all the same."""
    g = Quantized(17)
    h = g.nbits(g.input("x", ["B", 3, K], 10), 4, 32, n=64, floats=np.float16)
    h = g.op("Relu", h)
    y = g.op("MatMul", g.op("Reshape", h, g.const([-1, 64], np.int64)), g.weight(64, 8, dtype=np.float16))
    proto = g.model(y, dims=[None, 8], dtype=10, check=False)
    done, result = run(proto)
    assert ops(result) == [GROUPWISE, "Relu", "Reshape", PER_CHANNEL]
    assert error(proto, result) < 0.02
    assert done.ledger.coverage() == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block": 16}, "group 16; K=128 does not divide"),
        ({"block": 64, "k": 144}, "group 64; K=144 does not divide"),
        ({"block": 32, "zero": "float", "fraction": 0.25}, "its zero points are no integers of the weight's type"),
        ({"block": 32, "order": np.arange(K)[::-1] // 32}, "g_idx reorders its input channels"),
        ({"block": 32, "weight_prepacked": 1}, "its weight is prepacked for another engine"),
    ],
)
def test_what_stays(options: dict[str, Any], reason: str) -> None:
    g = Quantized()
    y = g.nbits(g.input("x", ["B", options.get("k", K)]), 4, **options)
    proto = g.model(y, dims=["B", N], check=False)
    done, result = run(proto)
    assert site(done, "linear").status == "declined"
    assert reason in site(done, "linear").reason
    assert len(done.ledger.sites) == 1
    assert result.graph.node == proto.graph.node


def test_two_bits_stay() -> None:
    g = Quantized()
    x, b = g.input("x", ["B", K]), g.const(g.random.integers(0, 256, (N, 4, 8)), np.uint8)
    y = g.op("MatMulNBits", x, b, g.weight(N, 4), domain="com.microsoft", K=K, N=N, bits=2, block_size=32)
    done, result = run(g.model(y, dims=["B", N], check=False))
    assert site(done, "linear").reason == "its weight has 2 bits; qpass has ops for 8 and 4"
    assert ops(result) == ["MatMulNBits"]


def test_groups_in_their_natural_order() -> None:
    g = Quantized()
    y = g.nbits(g.input("x", ["B", K]), 4, 32, order=np.arange(K) // 32)
    proto = g.model(y, dims=["B", N], check=False)
    _, result = run(proto)
    assert ops(result) == [GROUPWISE]
    assert error(proto, result) < 1e-5


def test_a_head_that_is_the_embedding() -> None:
    """onnxruntime-genai shares the packed integers of a tied head: it is excluded unless the spec includes it."""
    g = Quantized()
    table, scale = g.const(g.random.integers(0, 256, (N, K // 2)), np.uint8, "embedding"), g.gain(N * K // 32)
    rows = g.const([N, K // 32], np.int64)
    ids = g.input("ids", ["B"], 7)
    x = g.op(
        "GatherBlockQuantized",
        table,
        ids,
        g.op("Reshape", scale, rows),
        domain="com.microsoft",
        bits=4,
        block_size=32,
        gather_axis=0,
        quantize_axis=1,
    )
    b = g.op("Reshape", table, g.const([N, K // 32, 16], np.int64))
    y = g.op("MatMulNBits", x, b, scale, domain="com.microsoft", K=K, N=N, bits=4, block_size=32)
    proto = g.model(y, dims=["B", N], check=False)
    done, result = run(proto)
    assert site(done, "linear").status == "excluded"
    assert result.graph.node == proto.graph.node
    done, result = run(proto, QuantSpec.preset("w8a16", include=["embedding"]))
    assert site(done, "linear").status == "rewritten"
    assert "embedding" in {t.name for t in result.graph.initializer}
    assert error(proto, result, {"ids": np.arange(5)}) < 1e-5


def test_shapes_behind_a_quantized_embedding() -> None:
    """The first node of a quantized decoder is one that onnx does not know."""
    g = Quantized(17)
    tables = g.const(g.random.integers(0, 256, (N, K // 2)), np.uint8), g.const(np.ones((N, K // 32)), np.float16)
    options: dict[str, Any] = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    ids = g.input("ids", ["B", 3], 7)
    x = g.op("GatherBlockQuantized", tables[0], ids, tables[1], domain="com.microsoft", **options)
    (linear,) = lifted(g.model(g.nbits(g.op("Tanh", x), 4, 32, floats=np.float16), dims=None, check=False))
    assert (linear.inputs[0].shape, linear.inputs[0].dtype) == (("B", 3, K), np.dtype(np.float16))
    assert (linear.outputs[0].shape, linear.outputs[0].dtype) == (("B", 3, N), np.dtype(np.float16))
