"""Linears: every spelling is lifted with equal numerics; what is none stays, with the reason in the ledger."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qpass.errors import QpassError
from qpass.testing import model
from tests.rules.kit import Graph, check_lift, error, lifted, ops, run, site

HEAD = '<ir_version: 10, opset_import: ["" : 18]>\n'
WEIGHTS = "<float[8, 4] w, float[4, 8] wt, float[4] b, float[1, 8, 4] w3, float[8] v>"


def graph(
    body: str, x: str = "float[B, 3, 8] x", y: str = "float[B, 3, 4] y", weights: str = WEIGHTS, **values: Any
) -> onnx.ModelProto:
    """The text of a model with input x, output y and the weights above; `body` uses some of them."""
    return model(f"{HEAD}g ({x}) => ({y}) {weights} {{ {body} }}", **values)


class TestMatMul:
    @pytest.mark.parametrize(
        ("body", "nodes"),
        [
            ("y = MatMul(x, w)", ["MatMul@y"]),
            ("m = MatMul(x, w)\n y = Add(m, b)", ["MatMul@m", "Add@y"]),
            ("m = MatMul(x, w)\n y = Add(b, m)", ["MatMul@m", "Add@y"]),
            ("t = Transpose<perm = [1, 0]>(wt)\n y = MatMul(x, t)", ["Transpose@t", "MatMul@y"]),
            ("t = Transpose(wt)\n i = Identity(t)\n y = MatMul(x, i)", ["Transpose@t", "Identity@i", "MatMul@y"]),
            ("t = Identity(b)\n m = MatMul(x, w)\n y = Add(m, t)", ["Identity@t", "MatMul@m", "Add@y"]),
            ("m = MatMul(x, w)\n i = Identity(m)\n y = Add(i, b)", ["MatMul@m", "Add@y"]),
            ("y = MatMul(x, w3)", ["MatMul@y"]),
        ],
    )
    def test_spellings(self, body: str, nodes: list[str]) -> None:
        proto = graph(body)
        check_lift(proto, linears=1)
        done, _ = run(proto)
        assert site(done, "linear").nodes == nodes
        assert site(done, "linear").status == "rewritten"

    def test_weight_behind_a_chain(self) -> None:
        g = Graph()
        w = g.const(np.arange(32) / 32, np.float16, "stored")
        w = g.op("Reshape", w, g.const([4, 8], np.int64))
        w = g.op("Identity", g.op("Cast", g.op("Transpose", w), to=TensorProto.FLOAT))
        proto = g.model(g.op("MatMul", g.input("x", ["B", 3, 8]), w, out="y"))
        check_lift(proto, linears=1)
        done, _ = run(proto)
        weight = site(done, "linear").weight
        assert (weight.name, weight.shape, weight.dtype, weight.bytes_before) == ("stored", [32], "float16", 64)

    @pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4)])
    def test_bias_that_folds(self, shape: tuple[int, ...]) -> None:
        g = Graph()
        mm = g.op("MatMul", g.input("x", ["B", 3, 8]), g.weight(8, 4))
        proto = g.model(g.op("Add", mm, g.weight(*shape), out="y"))
        check_lift(proto, linears=1)
        assert len(lifted(proto)[0].inputs) == 3

    @pytest.mark.parametrize("shape", [(1,), (), (3, 1), (3, 4), (5, 3, 4), (1, 3, 4), (2, 1, 1, 4), (1, 1, 1, 4)])
    def test_bias_that_does_not_fold_stays_an_add(self, shape: tuple[int, ...]) -> None:
        g = Graph()
        mm = g.op("MatMul", g.input("x", [5, 3, 8]), g.weight(8, 4))
        proto = g.model(g.op("Add", mm, g.weight(*shape) if shape else g.const(0.5), out="y"))
        check_lift(proto, linears=1)
        assert len(lifted(proto)[0].inputs) == 2

    def test_bias_of_one_feature(self) -> None:
        g = Graph()
        mm = g.op("MatMul", g.input("x", ["B", 8]), g.weight(8, 1))
        proto = g.model(g.op("Add", mm, g.weight(1), out="y"))
        check_lift(proto, linears=1)
        assert len(lifted(proto)[0].inputs) == 3

    def test_a_used_product_keeps_its_add(self) -> None:
        proto = graph("m = MatMul(x, w)\n a = Add(m, b)\n y = Mul(a, m)")
        check_lift(proto, linears=1)
        assert len(lifted(proto)[0].inputs) == 2

    @pytest.mark.parametrize("k", [1, 2, 7])
    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("spec", ["w8a16", "w8a8", "w4a16"])
    def test_thin(self, k: int, n: int, spec: str) -> None:
        g = Graph()
        proto = g.model(g.op("MatMul", g.input("x", ["B", 5, k]), g.weight(k, n), out="y"))
        done, result = run(proto, spec)
        linear = site(done, "linear")
        if spec == "w4a16" and k % 2:
            assert (linear.status, linear.reason) == (
                "declined",
                f"K={k} is odd: int4 packs two weights of a row into a byte",
            )
        else:
            assert linear.status == "rewritten"
        assert error(proto, result) < (0.25 if spec == "w4a16" else 0.03)

    @pytest.mark.parametrize("spec", ["w8a16", "w8a8"])
    def test_x_of_one_dim(self, spec: str) -> None:
        proto = graph("m = MatMul(x, w)\n y = Add(m, b)", "float[8] x", "float[4] y")
        check_lift(proto, linears=1)
        done, result = run(proto, spec)
        assert site(done, "linear").status == "rewritten"
        assert error(proto, result) < 0.03

    def test_two_constants(self) -> None:
        """As where a Linear reads a learned query: the right operand is its weight."""
        g = Graph()
        proto = g.model(
            g.op("Mul", g.op("MatMul", g.weight(3, 8), g.weight(8, 4, name="w")), g.input("x", ["B", 3, 4]), out="y")
        )
        check_lift(proto, linears=1)
        done, _ = run(proto)
        assert site(done, "linear").weight.name == "w"


class TestNoMatMul:
    """MatMuls with a constant operand that are no Linear: they stay, each with its reason."""

    @pytest.mark.parametrize(
        ("x", "y", "body", "weights", "reason"),
        [
            ("float[8, S] x", "float[4, S] y", "y = MatMul(wt, x)", WEIGHTS, "the constant 'wt' is the left operand"),
            (
                "float[2, 3, 8] x",
                "float[2, 3, 4] y",
                "y = MatMul(x, e)",
                "<float[2, 8, 4] e>",
                "the constant 'e' has 3 dims, [2, 8, 4]: a batch of 2 weights, each for one entry of the input's "
                "batch; a Linear's weight has two",
            ),
            (
                "float[2, 3, 8] x",
                "float[2, 3] y",
                "y = MatMul(x, v)",
                WEIGHTS,
                "the constant 'v' has 1 dim, [8]; a Linear's weight has two",
            ),
            (
                "float[3, 8] x",
                "float[1, 3, 4] y",
                "y = MatMul(x, w3)",
                WEIGHTS,
                "a constant of MatMul 'y' has 3 dims, which may be more than its input has",
            ),
            (
                "float[B, S, 1] x",
                "float[B, S, 8] y",
                "a = Unsqueeze(v, zero)\n y = MatMul(x, a)",
                "<float[8] v, int64[1] zero = {0}>",
                "'v' is a vector: this is an outer product, such as of positions and frequencies",
            ),
            (
                "float[B, 3, 8] x",
                "float[B, 3, 4] y",
                "s = Sin(w)\n y = MatMul(x, s)",
                WEIGHTS,
                "the weight is computed by Sin 's' while the model runs",
            ),
            (
                "float[B, 3, 8] x, float[8, 4] fed",
                "float[B, 3, 4] y",
                "y = MatMul(x, fed)",
                WEIGHTS,
                "the weight 'fed' is a graph input that callers may change",
            ),
        ],
    )
    def test_stays(self, x: str, y: str, body: str, weights: str, reason: str) -> None:
        proto = graph(body, x, y, weights)
        for spec in ("w8a16", "w8a8"):
            done, result = run(proto, spec)
            linear = site(done, "linear")
            assert (linear.status, linear.reason) == ("declined", reason)
            assert "MatMul@y" in linear.nodes
            assert ops(result) == ops(proto)

    def test_an_initializer_that_is_an_input_is_no_constant(self) -> None:
        proto = graph("y = MatMul(x, w)")
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 4]))
        done, result = run(proto)
        assert ops(result) == ["MatMul"]
        assert site(done, "linear").reason == "the weight 'w' is a graph input that callers may change"

    def test_a_product_of_activations_is_no_site(self) -> None:
        proto = graph("t = Transpose<perm = [0, 2, 1]>(x)\n y = MatMul(x, t)", y="float[B, 3, 3] y")
        done, _ = run(proto)
        assert done.ledger.sites == []

    def test_nor_is_one_of_two_fixed_dims(self) -> None:
        g = Graph()
        x = g.input("x", [3, 8])
        proto = g.model(g.op("MatMul", x, g.op("Transpose", x), out="y"))
        done, _ = run(proto)
        assert done.ledger.sites == []

    @pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.INT32])
    @pytest.mark.parametrize("spec", ["w8a16", "w4a16", "w8a8"])
    def test_other_dtypes_are_declined(self, dtype: int, spec: str) -> None:
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        g = Graph()
        x = g.input("x", ["B", 3, 8], dtype)
        mm = g.op("MatMul", x, g.const(g.random.integers(-3, 4, (8, 4)), kind))
        proto = g.model(g.op("Add", mm, g.const([1, 2, 3, 4], kind), out="y"))
        done, result = run(proto, spec)
        linear = site(done, "linear")
        assert linear.status == "declined"
        assert linear.reason == f"its weight is {kind}, wants float32, float16 or bfloat16"
        assert error(proto, result) == 0


class TestGemm:
    @pytest.mark.parametrize("trans", [0, 1])
    @pytest.mark.parametrize("bias", [None, (), (1,), (4,), (1, 1), (1, 4)])
    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (2.0, 0.0)])
    def test_spellings(self, trans: int, bias: tuple[int, ...] | None, alpha: float, beta: float) -> None:
        g = Graph()
        inputs = [g.input("x", ["M", 8]), g.weight(*((4, 8) if trans else (8, 4)))]
        if bias is not None:
            inputs.append(g.weight(*bias) if bias else g.const(0.7))
        proto = g.model(g.op("Gemm", *inputs, out="y", transB=trans, alpha=alpha, beta=beta))
        check_lift(proto, linears=1)
        done, result = run(proto)
        assert site(done, "linear").status == "rewritten"
        assert error(proto, result) < 0.02

    def test_third_input_may_be_left_empty(self) -> None:
        check_lift(graph('y = Gemm(x, w, "")', "float[M, 8] x", "float[M, 4] y"), linears=1)

    @pytest.mark.parametrize(
        ("attributes", "shape", "reason"),
        [
            ({}, (3, 4), "the third input differs from row to row: its shape is [3, 4], a bias has [4]"),
            ({}, (3, 1), "the third input differs from row to row: its shape is [3, 1], a bias has [4]"),
            ({"transA": 1}, (4,), "transA is set: the rows of the input are its columns"),
        ],
    )
    def test_stays(self, attributes: dict[str, Any], shape: tuple[int, ...], reason: str) -> None:
        g = Graph()
        x = g.input("x", [8, 3] if attributes else [3, 8])
        proto = g.model(g.op("Gemm", x, g.weight(8, 4), g.weight(*shape), out="y", **attributes))
        done, result = run(proto)
        assert (site(done, "linear").status, site(done, "linear").reason) == ("declined", reason)
        assert ops(result) == ["Gemm"]

    def test_computed_third_input(self) -> None:
        proto = graph("c = Relu(x)\n d = MatMul(c, w)\n y = Gemm(x, w, d)", "float[3, 8] x", "float[3, 4] y")
        done, _ = run(proto)
        assert [s.status for s in done.ledger.of("linear")] == ["rewritten", "declined"]
        assert "wants a constant, got 'd' from MatMul 'd'" in site(done, "linear", 1).reason

    @pytest.mark.parametrize(
        "second", ["Gemm<transB = 1>(x, w)", "Gemm<alpha = 2.0>(x, w)", "Gemm<alpha = -1.0, transB = 1>(x, w)"]
    )
    @pytest.mark.parametrize("spec", ["w8a16", "w8a8"])
    def test_one_square_weight_read_in_two_ways(self, second: str, spec: str) -> None:
        proto = graph(
            f"y = Gemm(x, w)\n z = {second}", "float[M, 8] x", "float[M, 8] y, float[M, 8] z", "<float[8, 8] w>"
        )
        check_lift(proto, linears=2)
        _, result = run(proto, spec)
        assert error(proto, result) < 0.02


class TestConv1D:
    """Reshape → Gemm → Reshape: absorbed only where the second Reshape is known to undo the first."""

    @staticmethod
    def between(
        x: list[int | str | None], flat: Any, full: Any, *, gemm: bool = True, dynamic: str = ""
    ) -> onnx.ModelProto:
        g = Graph()
        x_ = g.input("x", x)
        a = g.op("Reshape", x_, g.const(flat, np.int64))
        mm = g.op("Gemm", a, g.weight(8, 4), g.weight(4)) if gemm else g.op("MatMul", a, g.weight(8, 4))
        target = g.const(full, np.int64) if full is not None else ""
        if dynamic:
            shape = g.op("Shape", x_)
            dims = [g.op("Gather", shape, g.const([i], np.int64)) for i in map(int, dynamic.split())]
            target = g.op("Concat", *dims, g.const([4], np.int64), axis=0)
        return g.model(g.op("Reshape", mm, target, out="y"))

    @pytest.mark.parametrize("gemm", [True, False])
    @pytest.mark.parametrize(
        ("x", "flat", "full", "dynamic"),
        [
            ([2, 3, 8], [-1, 8], [2, 3, 4], ""),
            ([2, 3, 8], [6, 8], [2, -1, 4], ""),
            (["B", 3, 8], [-1, 8], [-1, 3, 4], ""),
            ([2, "S", 8], [-1, 8], [2, -1, 4], ""),
            (["B", "S", 8], [-1, 8], None, "0 1"),
            ([2, 3, 5, 8], [-1, 8], [2, 3, 5, 4], ""),
        ],
    )
    def test_absorbed(self, x: list[int | str | None], flat: Any, full: Any, dynamic: str, gemm: bool) -> None:
        proto = self.between(x, flat, full, gemm=gemm, dynamic=dynamic)
        check_lift(proto, linears=1)
        done, result = run(proto)
        assert [n.op_type for n in result.graph.node if n.op_type != "Shape"] == ["WeightOnlyQuantMatmul"]
        assert "Reshape" in site(done, "linear").nodes[-1] or site(done, "linear").nodes[-1] == "n_y"

    @pytest.mark.parametrize(
        ("x", "flat", "full", "dynamic"),
        [
            ([2, 3, 8], [-1, 8], [3, 2, 4], ""),  # other leading dims
            ([2, 3, 8], [-1, 8], [6, 1, 4], ""),
            ([2, 4, 8], [-1, 8], [2, 8, 2], ""),  # other last dim
            ([2, 4, 8], [-1, 8], [2, 2, 8], ""),
            ([2, 3, 8], [-1, 8], [-1], ""),  # other rank
            ([2, 3, 8], [-1, 8], [2, 3, 2, 2], ""),
            ([2, 3, 16], [-1, 8], [2, 3, 8], ""),  # the first Reshape cuts rows
            ([2, 3, 16], [-1, 8], [2, 6, 4], ""),
            (["B", "S", 8], [-1, 8], None, "1 0"),  # batch and sequence swapped
            (["B", "S", 8], [-1, 8], [1, -1, 4], ""),
            (["B", 2, "H"], [-1, 8], [-1, 2, 4], ""),  # the width of x is not known
        ],
    )
    @pytest.mark.parametrize("spec", ["w8a16", "w8a8"])
    def test_deceptive_shapes(self, x: list[int | str | None], flat: Any, full: Any, dynamic: str, spec: str) -> None:
        proto = self.between(x, flat, full, dynamic=dynamic)
        given = {
            "x": np.random.default_rng(0)
            .standard_normal([d if isinstance(d, int) else 16 for d in x])
            .astype(np.float32)
        }
        check_lift(proto, linears=1, inputs=given)
        done, result = run(proto, spec)
        assert site(done, "linear").status == "rewritten"
        assert ops(result).count("Reshape") == 2
        assert error(proto, result, given) < 0.03

    def test_a_used_product_keeps_its_reshapes(self) -> None:
        g = Graph()
        a = g.op("Reshape", g.input("x", ["B", 3, 8]), g.const([-1, 8], np.int64))
        mm = g.op("Gemm", a, g.weight(8, 4))
        g.op("Relu", mm, out="z")
        proto = g.model(g.op("Reshape", mm, g.const([-1, 3, 4], np.int64), out="y"), "z")
        check_lift(proto, linears=1)


class TestUnknown:
    """Models that tell little: no shapes, no dtypes, operators that nobody knows."""

    def test_unknown_rank(self) -> None:
        g = Graph()
        x = g.op("Loose", g.input("x", ["B", 3, 8]), domain="other")
        mm = g.op("MatMul", x, g.weight(8, 4))
        g.op("Add", mm, g.weight(4), out="y")
        (linear,) = lifted(g.model("y", dims=["B", 3, 4]))
        assert linear.inputs[0].shape is None
        assert linear.inputs[0].dtype == linear.outputs[0].dtype == np.float32  # as the weight's
        assert len(linear.inputs) == 3

    def test_a_bias_of_higher_rank_is_not_folded_into_an_unknown_one(self) -> None:
        g = Graph()
        mm = g.op("MatMul", g.op("Loose", g.input("x", ["B", 8]), domain="other"), g.weight(8, 4))
        g.op("Add", mm, g.weight(1, 1, 4), out="y")
        (linear,) = lifted(g.model("y", dims=[1, "B", 4]))
        assert len(linear.inputs) == 2

    @pytest.mark.parametrize("spec", ["w8a16", "w4a16-g128", "w8a8"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_dtypes_come_from_the_weights(self, spec: str, dtype: Any) -> None:
        """Behind an operator that onnx does not know, all dtypes are unknown but those of the weights."""
        g = Graph()
        elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        x = g.op("Loose", g.input("x", ["B", 3, 128], elem), domain="other")
        n = g.op("LayerNormalization", x, g.gain(128, dtype))
        a = g.op("Relu", g.op("Add", g.op("MatMul", n, g.weight(128, 128, dtype=dtype)), g.weight(128, dtype=dtype)))
        g.op("MatMul", a, g.weight(128, 4, dtype=dtype), out="y")
        proto = g.model("y", dims=["B", 3, 4], dtype=elem)
        done, result = run(proto, spec)
        assert [s.status for s in done.ledger.of("linear")] == ["rewritten"] * 2
        proto.functions.append(_loose())
        result.functions.append(_loose())
        assert error(proto, result) < 0.3

    def test_an_unknown_dtype_is_declined(self) -> None:
        g = Graph()
        x = g.op("Loose", g.input("x", ["B", 3, 8]), domain="other")
        n = g.op("LayerNormalization", g.op("Loose", x, domain="other"), g.op("Loose", x, domain="other"))
        g.op("Loose", g.op("MatMul", n, n), domain="other", out="y")
        done, _ = run(g.model("y", dims=["B", 3, 4]))
        assert [s.status for s in done.ledger.sites] == ["near_miss"]


def _loose() -> onnx.FunctionProto:
    """What the unknown operator does, for ONNX Runtime."""
    node = helper.make_node("Mul", ["a", "a"], ["b"])
    return helper.make_function("other", "Loose", ["a"], ["b"], [node], [helper.make_opsetid("", 18)])


def test_infinite_weights_are_named() -> None:
    proto = graph("y = MatMul(x, w)", w=np.full((8, 4), np.nan))
    with pytest.raises(QpassError, match="weight 'w' holds NaN or infinite values"):
        run(proto)
