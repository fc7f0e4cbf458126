"""Q/DQ around activations with a scale known beforehand: the static SmoothQuant form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qpass
from qpass.quant_mode import QuantMode
from tests.rules.kit import error, ops, recipe, run, site
from tests.rules.quantized import INT4, PER_CHANNEL, PRESETS, K, N, Quantized, check
from tests.rules.test_weight_only import attributes


def pair(g: Quantized, x: str, dtype: Any, zero: int | None, scale: float = 0.03, out: str = "") -> str:
    names = [x, g.const(scale)] + ([] if zero is None else [g.const(zero, dtype)])
    return g.op("DequantizeLinear", g.op("QuantizeLinear", *names), *names[1:], out=out)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("axis", [1, None])
@pytest.mark.parametrize(
    ("dtype", "zero"), [(np.int8, 0), (np.int8, -11), (np.uint8, 128), (np.uint8, 100), (np.uint8, None)]
)
def test_static_form(dtype: Any, zero: int | None, axis: int | None, preset: str) -> None:
    g = Quantized(17)
    x = pair(g, g.input("x", ["B", 3, K]), dtype, zero)
    w = g.dequantize(np.int8, axis=axis)
    proto = g.model(g.op("Add", g.op("MatMul", x, w), g.weight(N), out="y"))
    done, result = run(proto, preset)
    assert ops(result) == ["QuantizeTensor", "SmoothQuantGemm"]
    quantize, gemm = result.graph.node
    stored = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    signed = (zero or 0) - (128 if dtype is np.uint8 else 0)
    assert stored[quantize.input[1]] == np.float32(0.03)
    assert attributes(quantize)["has_zero"] == (signed != 0)
    if signed:
        assert stored[quantize.input[2]] == signed
    assert attributes(gemm)["has_per_token_scaling"] == 0
    check(g, result, gemm, w)
    assert error(proto, result) < 1e-5
    assert "static scale from the model" in site(done, "linear").reason


def test_float16() -> None:
    g = Quantized(21)
    s, z = g.const(0.03, np.float16), g.const(17, np.int8)
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", g.input("x", ["B", K], 10), s, z), s, z)
    w = g.dequantize(np.int8, floats=np.float16)
    proto = g.model(g.op("MatMul", x, w, out="y"), dtype=10)
    _, result = run(proto)
    assert ops(result) == ["QuantizeTensor", "SmoothQuantGemm"]
    assert error(proto, result) < 2e-3


@pytest.mark.parametrize("norm", [True, False])
def test_a_pair_in_another_type(norm: bool) -> None:
    """Exporters of float16 models quantize in float32, between two Casts."""
    g = Quantized(17)
    y = g.input("x", ["B", K], 10)
    if norm:
        y = g.op("LayerNormalization", y, g.gain(K, np.float16), g.gain(K, np.float16))
    x = g.op("Cast", pair(g, g.op("Cast", y, to=1), np.uint8, 140), to=10)
    w = g.dequantize(np.int8)
    proto = g.model(g.op("MatMul", x, g.op("Cast", w, to=10), out="y"), dtype=10)
    _, result = run(proto)
    left = ["LayernormQuantization"] if norm else ["Cast", "QuantizeTensor"]
    assert ops(result) == [*left, "SmoothQuantGemm"]
    check(g, result, result.graph.node[-1], w)
    assert error(proto, result) < 2e-3


@pytest.mark.parametrize("shared", ["one pair", "one Q", "pairs"])
@pytest.mark.parametrize("zero", [0, 9])
def test_behind_a_norm(zero: int, shared: str) -> None:
    g = Quantized(17)
    y = g.op("LayerNormalization", g.input("x", ["B", 3, K]), g.gain(K), g.gain(K))
    s, z = g.const(0.03), g.const(zero, np.int8)
    q = dq = ""
    for out in "abc":
        if not q or shared == "pairs":
            q = g.op("QuantizeLinear", y, s, z)
        if not dq or shared != "one pair":
            dq = g.op("DequantizeLinear", q, g.const(0.03), z)
        g.op("MatMul", dq, g.dequantize(np.int8), out=out)
    proto = g.model("a", "b", "c")
    done, result = run(proto)
    left = [o for o in ops(result) if o != "Identity"]
    assert left == ["LayernormQuantization", *3 * ["SmoothQuantGemm"]]
    assert attributes(result.graph.node[0]) | {"dyn_act_scaling": 0, "has_zero": int(zero != 0), "has_y": 0} == (
        attributes(result.graph.node[0])
    )
    assert error(proto, result) < 1e-5
    assert [s.fed_by for s in done.ledger.of("linear")] == 3 * [done.ledger.sites.index(site(done, "norm"))]


def test_the_pair_stays_for_a_residual() -> None:
    g = Quantized(17)
    y = g.op("LayerNormalization", g.input("x", ["B", 3, K]), g.gain(K), g.gain(K))
    dq = pair(g, y, np.uint8, 117)
    g.op("Add", g.op("MatMul", dq, g.dequantize(np.int8, (K, K))), dq, out="y")
    proto = g.model("y")
    _, result = run(proto)
    assert sorted(ops(result)) == [
        "Add",
        "DequantizeLinear",
        "LayernormQuantization",
        "QuantizeLinear",
        "SmoothQuantGemm",
    ]
    assert error(proto, result) < 1e-5


def test_what_is_excluded_gets_its_pair_back() -> None:
    g = Quantized(17)
    dq = pair(g, g.input("x", ["B", K]), np.int8, 3)
    for out in "ab":
        g.op("MatMul", dq, g.dequantize(np.int8), out=out)
    proto = g.model("a", "b")
    spec = recipe(QuantMode.use_weight_only(), exclude=["n_b"])
    done, result = run(proto, spec)
    assert [s.status for s in done.ledger.of("linear")] == ["rewritten", "excluded"]
    assert sorted(ops(result)) == sorted(
        ["QuantizeTensor", "SmoothQuantGemm", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    )
    assert error(proto, result) < 1e-5


def test_all_excluded_is_the_original() -> None:
    g = Quantized(17)
    dq = pair(g, g.input("x", ["B", K]), np.int8, 3)
    proto = g.model(g.op("MatMul", dq, g.dequantize(np.int8), out="b"))
    spec = recipe(QuantMode.use_weight_only(), exclude=["n_b"])
    _, result = run(proto, spec)
    assert result.graph.node == proto.graph.node


@pytest.mark.parametrize(
    "weight", [{"dtype": INT4, "axis": 0, "block": 32}, {"dtype": np.int8, "zero": True}, {"dtype": np.uint8}]
)
@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
def test_weights_that_the_int8_gemm_does_not_take(preset: str, weight: dict[str, Any]) -> None:
    g = Quantized()
    x = pair(g, g.input("x", ["B", K]), np.int8, 3)
    w = g.dequantize(**weight)
    proto = g.model(g.op("MatMul", x, w, out="y"))
    _, result = run(proto, preset)
    assert ops(result)[:2] == ["QuantizeLinear", "DequantizeLinear"]
    check(g, result, result.graph.node[2], w)
    assert error(proto, result) < 1e-5


def test_static_needs_no_calibration() -> None:
    g = Quantized(17)
    x = pair(g, g.input("x", ["B", K]), np.int8, 0)
    proto = g.model(g.op("MatMul", x, g.dequantize(np.int8), out="y"))
    _, result = run(proto, "w8a8-static")
    assert ops(result) == ["QuantizeTensor", "SmoothQuantGemm"]


def test_siblings_of_two_scales_go_alone() -> None:
    g = Quantized(17)
    y = g.op("LayerNormalization", g.input("x", ["B", K]), g.gain(K), g.gain(K))
    g.op("MatMul", pair(g, y, np.int8, 0, 0.03), g.dequantize(np.int8), out="a")
    g.op("MatMul", pair(g, y, np.int8, 0, 0.02), g.dequantize(np.int8), out="b")
    proto = g.model("a", "b")
    _, result = run(proto)
    assert sorted(ops(result)) == ["LayernormQuantization", "QuantizeTensor", "SmoothQuantGemm", "SmoothQuantGemm"]
    assert error(proto, result) < 1e-5


@pytest.mark.parametrize("twin", ["two scales", "two zero points", "per channel", "computed scale", "int16"])
def test_twins_stay(twin: str) -> None:
    """Weight-only: the activation's pair is none that the int8 GEMM could stand for."""
    g = Quantized(21)
    x = g.input("x", ["B", K])
    s, z = g.const(0.03), g.const(0, np.int8)
    other, zero = s, z
    if twin == "two scales":
        other = g.const(0.04)
    elif twin == "two zero points":
        zero = g.const(1, np.int8)
    elif twin == "per channel":
        s = other = g.const(g.random.uniform(0.02, 0.04, K))
        z = zero = g.const(np.zeros(K), np.int8)
    elif twin == "computed scale":
        s = other = g.op("Abs", g.input("s", []))
    elif twin == "int16":
        z = zero = g.const(0, np.int16)
    dq = g.op("DequantizeLinear", g.op("QuantizeLinear", x, s, z), other, zero)
    w = g.dequantize(np.int8)
    proto = g.model(g.op("MatMul", dq, w, out="y"))
    _, result = run(proto)
    assert ops(result)[-3:] == ["QuantizeLinear", "DequantizeLinear", PER_CHANNEL]
    check(g, result, result.graph.node[-1], w)
    assert error(proto, result) < 1e-5


@pytest.mark.parametrize("preset", ["w8a8", "w8a8-static"])
@pytest.mark.parametrize("norm", [True, False])
def test_calibration_smooths_no_stored_integers(norm: bool, preset: str, tmp_path: Path) -> None:
    """Activations that the model leaves as they are get the spec's quantization; the weight is what it was."""
    g = Quantized(17)
    x = g.input("x", ["B", K])
    if norm:
        x = g.op("LayerNormalization", x, g.gain(K), g.gain(K))
    w = g.dequantize(np.int8)
    proto = g.model(g.op("MatMul", x, w, out="y"))
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "sample.npz", x=g.random.standard_normal((32, K)).astype(np.float32))
    stats = qpass.calibrate(tmp_path / "model.onnx", [tmp_path / "sample.npz"], tmp_path / "stats.npz")
    done, result = run(proto, preset, calibration=stats)
    gemm = result.graph.node[-1]
    assert attributes(gemm)["has_per_token_scaling"] == int(preset == "w8a8")
    check(g, result, gemm, w)
    reason = site(done, "linear").reason
    assert reason is not None
    assert reason.startswith("its weight came quantized: int8; unsmoothed")
    assert error(proto, result) < 0.03


@pytest.mark.parametrize("inner", [0.03, 0.031])
@pytest.mark.parametrize("first", [7, 8])
def test_twice_with_one_scale_is_once(inner: float, first: int) -> None:
    """Around a Reshape too: the norm before both pairs feeds the Linear where the pairs are the same."""
    g = Quantized(17)
    h = g.op("LayerNormalization", g.input("x", ["B", "S", K]), g.gain(K), g.gain(K))
    h = pair(g, h, np.int8, first, inner)
    h = pair(g, g.op("Reshape", h, g.const([-1, K], np.int64)), np.int8, 7)
    proto = g.model(g.op("MatMul", h, g.dequantize(np.int8), out="y"))
    done, result = run(proto, "w8a8")
    same = (inner, first) == (0.03, 7)
    assert site(done, "linear").fed_by == (0 if same else None)
    left = ["LayernormQuantization", "SmoothQuantGemm", "Reshape"]
    apart = ["LayerNormalization", "QuantizeLinear", "DequantizeLinear", "Reshape", "QuantizeTensor", "SmoothQuantGemm"]
    assert ops(result) == (left if same else apart)
    assert error(proto, result) < 1e-5


def test_an_mlp_is_one_behind_q_dq_and_a_bias() -> None:
    """Tools quantize what a MatMul gives too, and the bias comes after that."""
    g = Quantized(17)
    h = g.op("MatMul", pair(g, g.input("x", ["B", K]), np.int8, 0), g.dequantize(np.int8))
    h = g.op("Relu", g.op("Add", pair(g, h, np.int8, 3), g.weight(N)))
    w = g.op("DequantizeLinear", g.const(np.ones((N, 4)), np.int8), g.const(0.1))
    h = g.op("MatMul", pair(g, h, np.int8, -128), w)
    proto = g.model(g.op("Identity", h, out="y"))
    done, result = run(proto, "w8a16")
    (mlp,) = done.ledger.of("mlp")
    assert (mlp.status, mlp.parts) == ("rewritten", [0, 2])
    assert "ActivationQuantization" in ops(result)
    assert error(proto, result) < 1e-5
