"""Weights that came quantized: whatever the spec, their integers, scales and zero points stay, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qpass.quant_mode import QuantMode
from qpass.quantize.pack import unpack_int4
from tests.rules.kit import Graph, error, ops, outputs, recipe, run, site
from tests.rules.test_weight_only import attributes

INT4, UINT4 = ml_dtypes.int4, ml_dtypes.uint4
LIMITS = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8), "uint4": (0, 16), "int16": (-999, 999)}
PRESETS = ("w8a16", "w4a16", "w4a16-g128-zp", "w8a8")
K, N = 128, 48


class Quantized(Graph):
    """A graph with weights that came quantized, and what they are: integers less zero points, and scales, [N, K]."""

    def __init__(self, opset: int = 21, seed: int = 0) -> None:
        super().__init__(opset, seed)
        self.codes: dict[str, Any] = {}
        self.scales: dict[str, Any] = {}

    def integers(self, dtype: Any, *shape: int) -> Any:
        return self.random.integers(*LIMITS[np.dtype(dtype).name], shape).astype(dtype)

    def dequantize(
        self,
        dtype: Any,
        shape: tuple[int, int] = (K, N),
        axis: int | None = 1,
        block: int = 0,
        zero: Any = None,
        floats: Any = np.float32,
        domain: str = "",
    ) -> str:
        """DequantizeLinear of a constant. `zero` is a value for all, or True for random ones."""
        per: tuple[int, ...] = () if axis is None else (shape[axis],)
        if block and axis is not None:
            per = tuple(n // block if i == axis else n for i, n in enumerate(shape))
        q, scale = self.integers(dtype, *shape), self.random.uniform(0.01, 0.03, per).astype(floats)
        names = [self.const(q, dtype, self.fresh("q")), self.const(scale, floats)]
        z = np.zeros(per, dtype)
        if zero is not None:
            z = self.integers(dtype, *per) if zero is True else np.full(per, zero, dtype)
            names.append(self.const(z, dtype))
        extra: dict[str, Any] = {} if axis is None else {"axis": axis}
        extra |= {"block_size": block} if block else {}
        out = self.op("DequantizeLinear", *names, domain=domain, **extra)

        def spread(a: Any) -> Any:
            if block and axis is not None:
                return np.repeat(a, block, axis)
            return np.broadcast_to(a if axis is None else np.expand_dims(a, 1 - axis), shape)

        self.codes[out] = q.astype(np.int32) - spread(z).astype(np.int32)
        self.scales[out] = spread(scale).astype(np.float32)
        return out

    def nbits(self, x: str, bits: int, block: int, k: int = K, n: int = N, zero: str = "", **options: Any) -> str:
        """com.microsoft.MatMulNBits with random integers; `zero` is "", "packed" or "float"."""
        blocks = -(-k // block)
        q = self.random.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
        packed = q if bits == 8 else q[:, 0::2] | q[:, 1::2] << 4
        floats = options.pop("floats", np.float32)
        scale = self.random.uniform(0.01, 0.03, (n, blocks)).astype(floats)
        z = np.full((n, blocks), 1 << bits - 1)
        names = [x, self.const(packed.reshape(n, blocks, -1), np.uint8), self.const(scale, floats)]
        if zero:
            z = self.random.integers(0, 1 << bits, (n, blocks))
            if zero == "float":
                names.append(self.const(z + options.pop("fraction", 0), floats))
            else:
                wide = np.pad(z, ((0, 0), (0, blocks % 2))).astype(np.uint8)
                names.append(self.const(z if bits == 8 else wide[:, 0::2] | wide[:, 1::2] << 4, np.uint8))
        order, bias = options.pop("order", None), options.pop("bias", None)
        if order is not None:
            names += [""] * (4 - len(names)) + [self.const(order, np.int32)]
        if bias is not None:
            names += [""] * (5 - len(names)) + [self.const(bias, floats)]
        out = self.op("MatMulNBits", *names, domain="com.microsoft", K=k, N=n, bits=bits, block_size=block, **options)
        self.codes[out] = (q.astype(int) - np.repeat(z, block, 1))[:, :k].T
        self.scales[out] = np.repeat(scale, block, 1)[:, :k].T.astype(np.float32)
        return out


def check(g: Quantized, result: onnx.ModelProto, node: onnx.NodeProto, weight: str) -> None:
    """The node holds the integers and scales of the weight, bit for bit."""
    stored = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    attrs = attributes(node)
    inputs = list(node.input)
    if node.op_type == "SmoothQuantGemm":
        codes, scale = stored[inputs[1]].astype(int), stored[inputs[3]][:, None]
    else:
        q, scale = stored[inputs[1]], stored[inputs[2]]
        codes = (q if attrs["weight_type_id"] == 1 else unpack_int4(q)).astype(int)
        group = int(attrs.get("group_size") or codes.shape[1])
        scale = np.repeat(scale.reshape(len(scale), -1), group, 1)
        if attrs.get("has_zero") or attrs.get("quant_algo", 0) & 2:
            zero = stored[inputs[3]].astype(int)
            codes = codes - np.repeat(zero.reshape(len(zero), -1), group, 1)
    assert np.array_equal(codes, g.codes[weight].T)
    assert np.array_equal(np.broadcast_to(scale, codes.shape), g.scales[weight].T)


PER_CHANNEL, GROUPWISE = "WeightOnlyQuantMatmul", "WeightOnlyGroupwiseQuantMatmul"
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


class TestMatMulNBits:
    """com.microsoft.MatMulNBits, as ONNX Runtime's quantizer, Olive and onnxruntime-genai write it."""

    @pytest.mark.parametrize("zero", ["", "packed", "float"])
    @pytest.mark.parametrize("block", [32, 64, 128, 256])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_the_integers_stay(self, bits: int, block: int, zero: str) -> None:
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
    def test_an_odd_number_of_packed_zero_points(self, blocks: int) -> None:
        g = Quantized()
        y = g.nbits(g.input("x", ["B", 32 * blocks]), 4, 32, k=32 * blocks, zero="packed")
        proto = g.model(y, dims=["B", N], check=False)
        _, result = run(proto)
        check(g, result, result.graph.node[0], y)
        assert error(proto, result) < 1e-5

    def test_the_last_block_may_be_unfull(self) -> None:
        g = Quantized()
        y = g.nbits(g.input("x", ["B", 96]), 4, 64, k=96, zero="packed")
        proto = g.model(y, dims=["B", N], check=False)
        _, result = run(proto)
        assert attributes(result.graph.node[0])["group_size"] == 32
        check(g, result, result.graph.node[0], y)
        assert error(proto, result) < 1e-5

    @pytest.mark.parametrize("where", ["input", "Add"])
    @pytest.mark.parametrize("zero", ["", "packed"])
    def test_bias(self, where: str, zero: str) -> None:
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

    def test_float16_and_what_comes_behind(self) -> None:
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
    def test_what_stays(self, options: dict[str, Any], reason: str) -> None:
        g = Quantized()
        y = g.nbits(g.input("x", ["B", options.get("k", K)]), 4, **options)
        proto = g.model(y, dims=["B", N], check=False)
        done, result = run(proto)
        assert site(done, "linear").status == "declined"
        assert reason in site(done, "linear").reason
        assert len(done.ledger.sites) == 1
        assert result.graph.node == proto.graph.node

    def test_two_bits_stay(self) -> None:
        g = Quantized()
        x, b = g.input("x", ["B", K]), g.const(g.random.integers(0, 256, (N, 4, 8)), np.uint8)
        y = g.op("MatMulNBits", x, b, g.weight(N, 4), domain="com.microsoft", K=K, N=N, bits=2, block_size=32)
        done, result = run(g.model(y, dims=["B", N], check=False))
        assert site(done, "linear").reason == "its weight has 2 bits; qpass has ops for 8 and 4"
        assert ops(result) == ["MatMulNBits"]

    def test_groups_in_their_natural_order(self) -> None:
        g = Quantized()
        y = g.nbits(g.input("x", ["B", K]), 4, 32, order=np.arange(K) // 32)
        proto = g.model(y, dims=["B", N], check=False)
        _, result = run(proto)
        assert ops(result) == [GROUPWISE]
        assert error(proto, result) < 1e-5


class TestStaticActivations:
    """Q/DQ around activations with a scale known beforehand: the static SmoothQuant form."""

    def quantize(self, g: Quantized, x: str, dtype: Any, zero: int | None, scale: float = 0.03, out: str = "") -> str:
        names = [x, g.const(scale)] + ([] if zero is None else [g.const(zero, dtype)])
        return g.op("DequantizeLinear", g.op("QuantizeLinear", *names), *names[1:], out=out)

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("axis", [1, None])
    @pytest.mark.parametrize(
        ("dtype", "zero"), [(np.int8, 0), (np.int8, -11), (np.uint8, 128), (np.uint8, 100), (np.uint8, None)]
    )
    def test_static_form(self, dtype: Any, zero: int | None, axis: int | None, preset: str) -> None:
        g = Quantized(17)
        x = self.quantize(g, g.input("x", ["B", 3, K]), dtype, zero)
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

    def test_float16(self) -> None:
        g = Quantized(21)
        s, z = g.const(0.03, np.float16), g.const(17, np.int8)
        x = g.op("DequantizeLinear", g.op("QuantizeLinear", g.input("x", ["B", K], 10), s, z), s, z)
        w = g.dequantize(np.int8, floats=np.float16)
        proto = g.model(g.op("MatMul", x, w, out="y"), dtype=10)
        _, result = run(proto)
        assert ops(result) == ["QuantizeTensor", "SmoothQuantGemm"]
        assert error(proto, result) < 2e-3

    @pytest.mark.parametrize("shared", ["one pair", "one Q", "pairs"])
    @pytest.mark.parametrize("zero", [0, 9])
    def test_behind_a_norm(self, zero: int, shared: str) -> None:
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

    def test_the_pair_stays_for_a_residual(self) -> None:
        g = Quantized(17)
        y = g.op("LayerNormalization", g.input("x", ["B", 3, K]), g.gain(K), g.gain(K))
        dq = self.quantize(g, y, np.uint8, 117)
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

    def test_what_is_excluded_gets_its_pair_back(self) -> None:
        g = Quantized(17)
        dq = self.quantize(g, g.input("x", ["B", K]), np.int8, 3)
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

    def test_all_excluded_is_the_original(self) -> None:
        g = Quantized(17)
        dq = self.quantize(g, g.input("x", ["B", K]), np.int8, 3)
        proto = g.model(g.op("MatMul", dq, g.dequantize(np.int8), out="b"))
        spec = recipe(QuantMode.use_weight_only(), exclude=["n_b"])
        _, result = run(proto, spec)
        assert result.graph.node == proto.graph.node

    @pytest.mark.parametrize(
        "weight", [{"dtype": INT4, "axis": 0, "block": 32}, {"dtype": np.int8, "zero": True}, {"dtype": np.uint8}]
    )
    @pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
    def test_weights_that_the_int8_gemm_does_not_take(self, preset: str, weight: dict[str, Any]) -> None:
        g = Quantized()
        x = self.quantize(g, g.input("x", ["B", K]), np.int8, 3)
        w = g.dequantize(**weight)
        proto = g.model(g.op("MatMul", x, w, out="y"))
        _, result = run(proto, preset)
        assert ops(result)[:2] == ["QuantizeLinear", "DequantizeLinear"]
        check(g, result, result.graph.node[2], w)
        assert error(proto, result) < 1e-5

    def test_static_needs_no_calibration(self) -> None:
        g = Quantized(17)
        x = self.quantize(g, g.input("x", ["B", K]), np.int8, 0)
        proto = g.model(g.op("MatMul", x, g.dequantize(np.int8), out="y"))
        _, result = run(proto, "w8a8-static")
        assert ops(result) == ["QuantizeTensor", "SmoothQuantGemm"]

    def test_siblings_of_two_scales_go_alone(self) -> None:
        g = Quantized(17)
        y = g.op("LayerNormalization", g.input("x", ["B", K]), g.gain(K), g.gain(K))
        g.op("MatMul", self.quantize(g, y, np.int8, 0, 0.03), g.dequantize(np.int8), out="a")
        g.op("MatMul", self.quantize(g, y, np.int8, 0, 0.02), g.dequantize(np.int8), out="b")
        proto = g.model("a", "b")
        _, result = run(proto)
        assert sorted(ops(result)) == ["LayernormQuantization", "QuantizeTensor", "SmoothQuantGemm", "SmoothQuantGemm"]
        assert error(proto, result) < 1e-5

    @pytest.mark.parametrize("twin", ["two scales", "two zero points", "per channel", "computed scale", "int16"])
    def test_twins_stay(self, twin: str) -> None:
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
    assert str(found.reason).endswith(f"{op}; give it the model with Q/DQ nodes, or as MatMulNBits")
    assert ops(result) == [op]


def test_products_of_two_activations_are_no_sites() -> None:
    g = Quantized()
    a, b = g.input("a", ["B", K], 3), g.input("b", [K, N], 3)
    s, z = g.const(0.1), g.const(0, np.int8)
    proto = g.model(g.op("QLinearMatMul", a, s, z, b, s, z, s, z), dims=["B", N], dtype=3)
    done, _ = run(proto)
    assert done.ledger.sites == []
    assert len(outputs(proto, {"a": np.zeros((1, K), np.int8), "b": np.zeros((K, N), np.int8)})) == 1
