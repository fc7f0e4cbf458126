"""Weights that came quantized: whatever the spec, their integers, scales and zero points stay, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qpass.quant_mode import QuantMode
from tests.rules.kit import error, ops, outputs, recipe, run, site
from tests.rules.quantized import GROUPWISE, INT4, PER_CHANNEL, PRESETS, UINT4, K, N, Quantized, check
from tests.rules.test_weight_only import attributes

FORMS: dict[str, tuple[dict[str, Any], str, dict[str, int], str]] = {
    "int8": ({"dtype": np.int8}, PER_CHANNEL, {"weight_type_id": 1, "has_zero": 0}, "int8"),
    "int8, zeros given": ({"dtype": np.int8, "zero": 0}, PER_CHANNEL, {"has_zero": 0}, "int8"),
    "int8, zero points": ({"dtype": np.int8, "zero": True}, PER_CHANNEL, {"has_zero": 1}, "int8, with zero points"),
    "int8, float16": ({"dtype": np.int8, "floats": np.float16}, PER_CHANNEL, {}, "int8"),
    "int8, per tensor": ({"dtype": np.int8, "axis": None}, PER_CHANNEL, {}, "int8, per tensor"),
    "int8, groups": ({"dtype": np.int8, "axis": 0, "block": 32}, GROUPWISE, {"weight_type_id": 1}, "int8, group 32"),
    "uint8": ({"dtype": np.uint8, "zero": True}, PER_CHANNEL, {"has_zero": 1}, "uint8, with zero points"),
    "uint8, no zero": ({"dtype": np.uint8}, PER_CHANNEL, {"has_zero": 1}, "uint8, with zero points"),
    "uint8, 128": ({"dtype": np.uint8, "zero": 128}, PER_CHANNEL, {"weight_type_id": 1, "has_zero": 0}, "uint8"),
    "int4": ({"dtype": INT4}, PER_CHANNEL, {"weight_type_id": 2, "has_zero": 0}, "int4"),
    "uint4": ({"dtype": UINT4, "zero": True}, PER_CHANNEL, {"has_zero": 1}, "uint4, with zero points"),
    "int4, groups": (
        {"dtype": INT4, "axis": 0, "block": 32},
        GROUPWISE,
        {"group_size": 32, "weight_type_id": 2, "quant_algo": 1},
        "int4, group 32",
    ),
    "uint4, groups, zero points": (
        {"dtype": UINT4, "axis": 0, "block": 64, "zero": True},
        GROUPWISE,
        {"group_size": 64, "quant_algo": 3},
        "uint4, group 64, with zero points",
    ),
    "uint4, 8": ({"dtype": UINT4, "axis": 0, "block": 64, "zero": 8}, GROUPWISE, {"quant_algo": 1}, "uint4, group 64"),
    "int4, one group": ({"dtype": INT4, "axis": 0, "block": 128}, PER_CHANNEL, {}, "int4"),
    "int4, large groups": (
        {"dtype": INT4, "axis": 0, "block": 256, "shape": (512, N), "zero": True},
        GROUPWISE,
        {"group_size": 128, "quant_algo": 3},
        "int4, group 256, with zero points",
    ),
}


def linear(form: str, way: str = "MatMul") -> tuple[Quantized, onnx.ModelProto, str]:
    """x · DequantizeLinear(constant) + b; with Gemm the weight is stored [N, K]."""
    settings = dict(FORMS[form][0])
    floats = settings.get("floats", np.float32)
    kind = 10 if floats == np.float16 else 1
    g = Quantized()
    shape = settings.pop("shape", (K, N))
    x = g.input("x", ["B", shape[0]], kind)
    bias = g.weight(N, dtype=floats)
    if way == "Gemm":
        axis = settings.pop("axis", 1)
        w = g.dequantize(shape=shape[::-1], axis=None if axis is None else 1 - axis, **settings)
        g.codes[w], g.scales[w] = g.codes[w].T, g.scales[w].T
        g.op("Gemm", x, w, bias, transB=1, out="y")
    else:
        w = g.dequantize(shape=shape, **settings)
        g.op("Add", g.op("MatMul", x, w), bias, out="y")
    return g, g.model("y", dtype=kind), w


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", FORMS)
def test_the_integers_stay(form: str, preset: str) -> None:
    _, op, attrs, came = FORMS[form]
    g, proto, w = linear(form)
    done, result = run(proto, preset)
    found, node = site(done, "linear"), result.graph.node[-1]
    if preset == "w8a8" and came.split(",")[0].endswith("int8") and "group" not in came and "zero" not in came:
        op, attrs = "SmoothQuantGemm", {"has_per_token_scaling": 1, "has_per_channel_scaling": 1}
    assert (found.status, found.op, node.op_type) == ("rewritten", op, op)
    assert found.reason == f"its weight came quantized: {came}"
    assert attrs.items() <= attributes(node).items()
    check(g, result, node, w)
    assert "DequantizeLinear" not in ops(result)
    if op != "SmoothQuantGemm":
        assert error(proto, result) < (1e-3 if "16" in form else 1e-5)
    else:
        assert error(proto, result) < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_weights_stored_the_other_way_round(form: str) -> None:
    g, proto, w = linear(form, "Gemm")
    _, result = run(proto)
    assert len(result.graph.node) == 1
    check(g, result, result.graph.node[0], w)
    assert error(proto, result) < (1e-3 if "16" in form else 1e-5)


def test_the_ledger_counts_scales_and_zero_points() -> None:
    _, proto, _ = linear("uint4, groups, zero points")
    done, result = run(proto)
    weight = site(done, "linear").weight
    assert (weight.shape, weight.dtype) == ([K, N], "uint4")
    assert weight.bytes_before == K * N // 2 + K // 64 * N * 4 + K // 64 * N // 2
    assert weight.bytes_after == sum(
        numpy_helper.to_array(t).nbytes for t in result.graph.initializer if t.name in result.graph.node[0].input[1:4]
    )
    assert site(done, "linear").nodes == ["n_dequantizelinear_5", "n_matmul_6", "n_y"]


WAYS = {
    "Transpose behind": lambda g, q: g.op("Transpose", q, perm=[1, 0]),
    "Cast behind": lambda g, q: g.op("Cast", g.op("Transpose", q, perm=[1, 0]), to=1),
    "Identity": lambda g, q: g.op("Identity", g.op("Transpose", g.op("Identity", q), perm=[1, 0])),
    "a dim of 1": lambda g, q: g.op("Transpose", g.op("Reshape", q, g.const([1, N, K], np.int64)), perm=[0, 2, 1]),
}


@pytest.mark.parametrize("way", list(WAYS)[:3])
def test_nodes_behind_the_weight(way: str) -> None:
    g = Quantized()
    floats = np.float16 if way == "Cast behind" else np.float32
    w = g.dequantize(INT4, (N, K), axis=1, block=32, zero=True, floats=floats)
    g.codes[w], g.scales[w] = g.codes[w].T, g.scales[w].T
    proto = g.model(g.op("MatMul", g.input("x", ["B", K]), WAYS[way](g, w), out="y"))
    _, result = run(proto)
    assert ops(result) == [GROUPWISE]
    check(g, result, result.graph.node[0], w)
    assert error(proto, result) < (1e-3 if floats is np.float16 else 1e-5)


def test_floats_that_the_model_quantizes() -> None:
    """Weights as torch's exporters leave them: float, behind QuantizeLinear and DequantizeLinear."""
    g = Quantized()
    w, s = g.weight(K, N), g.const(g.random.uniform(0.001, 0.003, N))
    z = g.const(np.zeros(N), np.int8)
    w = g.op("DequantizeLinear", g.op("QuantizeLinear", w, s, z, axis=1), s, z, axis=1)
    proto = g.model(g.op("MatMul", g.input("x", ["B", K]), w, out="y"))
    done, result = run(proto, "w4a16")
    assert ops(result) == [PER_CHANNEL]
    assert site(done, "linear").reason == "its weight came quantized: int8"
    assert error(proto, result) < 1e-5


@pytest.mark.parametrize(("alpha", "op"), [(0.5, PER_CHANNEL), (-2.0, PER_CHANNEL), (0.3, "Gemm")])
def test_gemms_alpha_folds_where_that_is_exact(alpha: float, op: str) -> None:
    g = Quantized()
    w = g.dequantize(np.int8)
    proto = g.model(g.op("Gemm", g.input("x", ["B", K]), w, alpha=alpha, out="y"))
    done, result = run(proto)
    assert ops(result)[-1] == op
    if op == "Gemm":
        assert site(done, "linear").status == "declined"
        assert "its values are moved or changed" in site(done, "linear").reason
        assert result.graph.node == proto.graph.node
    else:
        g.scales[w] = g.scales[w] * np.float32(alpha)
        check(g, result, result.graph.node[0], w)
        assert error(proto, result) < 1e-5


DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "scales along K": ({"dtype": np.int8, "axis": 0}, "int8, with scales along its input channels"),
    "int16": ({"dtype": np.int16}, "int16; qpass has ops for int8 and int4"),
    "groups of 16": (
        {"dtype": INT4, "axis": 0, "block": 16},
        "int4, group 16; K=128 does not divide into groups of 32, 64, 128 that share a scale",
    ),
    "blocks of N": ({"dtype": INT4, "axis": 1, "block": 16}, "int4, with a scale for each 16 output channels"),
    "odd K": ({"dtype": INT4, "shape": (63, N)}, "int4; K=63 is odd, and int4 packs two weights of a row into a byte"),
}


def test_float8_stays() -> None:
    g = Quantized()
    w = g.op("DequantizeLinear", g.const(g.random.standard_normal((K, N)), ml_dtypes.float8_e4m3fn), g.const(0.1))
    done, result = run(g.model(g.op("MatMul", g.input("x", ["B", K]), w, out="y")))
    reason = "its weight came quantized: float8_e4m3fn; qpass has ops for int8 and int4"
    assert (site(done, "linear").status, site(done, "linear").reason) == ("declined", reason)
    assert ops(result) == ["DequantizeLinear", "MatMul"]


def test_a_head_that_is_the_quantized_embedding() -> None:
    g = Quantized()
    table, scale = g.const(g.integers(np.int8, N, K), np.int8), g.const(0.01)
    x = g.op("DequantizeLinear", g.op("Gather", table, g.input("ids", ["B"], 7)), scale)
    head = g.op("Transpose", g.op("DequantizeLinear", table, scale), perm=[1, 0])
    done, result = run(g.model(g.op("MatMul", x, head, out="y")))
    assert site(done, "linear").status == "excluded"
    assert ops(result)[-1] == "MatMul"


@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
@pytest.mark.parametrize("form", DECLINED)
def test_what_no_op_takes_stays(form: str, preset: str) -> None:
    settings, reason = DECLINED[form]
    g = Quantized()
    w = g.dequantize(**settings)
    proto = g.model(g.op("MatMul", g.input("x", ["B", settings.get("shape", (K, N))[0]]), w, out="y"))
    done, result = run(proto, preset)
    assert (site(done, "linear").status, site(done, "linear").reason) == (
        "declined",
        f"its weight came quantized: {reason}",
    )
    assert result.graph.node == proto.graph.node
    assert result.graph.initializer == proto.graph.initializer


def test_a_scale_that_is_computed() -> None:
    g = Quantized()
    s = g.op("Abs", g.input("s", []))
    w = g.op("DequantizeLinear", g.const(g.integers(np.int8, K, N), np.int8), s)
    proto = g.model(g.op("MatMul", g.input("x", ["B", K]), w, out="y"))
    done, result = run(proto)
    assert result.graph.node == proto.graph.node
    assert all(s.status != "rewritten" for s in done.ledger.sites)


def test_the_spec_still_excludes() -> None:
    _, proto, _ = linear("int8")
    done, result = run(proto, recipe(QuantMode.use_weight_only(), exclude=["n_y"]))
    assert site(done, "linear").status == "excluded"
    assert result.graph.node == proto.graph.node


def test_a_shared_weight_is_stored_once() -> None:
    g = Quantized()
    x = g.input("x", ["B", K])
    w = g.dequantize(INT4, axis=0, block=32)
    again = g.op("DequantizeLinear", *g.nodes[0].input, axis=0, block_size=32)
    other = g.op("DequantizeLinear", g.nodes[0].input[0], g.const(g.random.uniform(1, 2, N)), axis=1)
    for y, weight in zip("abc", (w, again, other), strict=True):
        g.op("MatMul", x, weight, out=y)
    proto = g.model("a", "b", "c")
    _, result = run(proto)
    a, b, c = result.graph.node
    assert list(a.input) == list(b.input)
    assert a.input[1] != c.input[1]
    assert (a.op_type, c.op_type) == (GROUPWISE, PER_CHANNEL)
    assert error(proto, result) < 1e-5


def test_a_norms_weights_may_be_quantized() -> None:
    g = Quantized()
    gamma, beta = (g.op("DequantizeLinear", g.const(g.integers(np.int8, K), np.int8), g.const(0.01)) for _ in "gb")
    y = g.op("LayerNormalization", g.input("x", ["B", K]), gamma, beta)
    proto = g.model(g.op("MatMul", y, g.weight(K, N), out="y"))
    done, result = run(proto, "w8a8")
    assert ops(result) == ["LayernormQuantization", "SmoothQuantGemm"]
    assert error(proto, result) < 0.02
    assert site(done, "norm").status == "rewritten"


QUANTIZED_OPS = {
    "MatMulInteger": ("", "x q", "int32"),
    "QLinearMatMul": ("", "x s xz q s qz s xz", "int8"),
    "MatMulIntegerToFloat": ("com.microsoft", "x q s s", "float"),
    "DynamicQuantizeMatMul": ("com.microsoft", "f q s", "float"),
    "QGemm": ("com.microsoft", "x s xz q s qz", "float"),
}


@pytest.mark.parametrize("op", QUANTIZED_OPS)
def test_operators_over_integers_are_named(op: str) -> None:
    domain, names, _ = QUANTIZED_OPS[op]
    g = Quantized()
    tensors = {
        "s": g.const(0.1),
        "q": g.const(g.integers(np.int8, K, N), np.int8, "w"),
        "xz": g.const(0, np.int8),
        "qz": g.const(0, np.int8),
    }
    tensors |= {"x": g.input("x", ["B", K], 3)} if "f" not in names.split() else {"f": g.input("f", ["B", K])}
    y = g.op(op, *(tensors[n] for n in names.split()), domain=domain)
    done, result = run(g.model(y, dims=["B", N], dtype=6 if op == "MatMulInteger" else 3 if "QL" in op else 1))
    (found,) = done.ledger.sites
    assert found.weight is not None
    assert (found.kind, found.status, found.weight.name) == ("linear", "declined", "w")
    assert str(found.reason).endswith("give qpass the model with Q/DQ nodes, or as MatMulNBits")
    assert ops(result) == [op]


def test_products_of_two_activations_are_no_sites() -> None:
    g = Quantized()
    a, b = g.input("a", ["B", K], 3), g.input("b", [K, N], 3)
    s, z = g.const(0.1), g.const(0, np.int8)
    proto = g.model(g.op("QLinearMatMul", a, s, z, b, s, z, s, z), dims=["B", N], dtype=3)
    done, _ = run(proto)
    assert done.ledger.sites == []
    assert len(outputs(proto, {"a": np.zeros((1, K), np.int8), "b": np.zeros((K, N), np.int8)})) == 1
