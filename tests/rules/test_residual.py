"""The residual before a norm: the Add becomes a part of the quantizing norm, its sum an output where it is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.rules.kit import Graph, error, ops, run
from tests.rules.spelling import HALF, Spelling, write

K = 16
KINDS = {"layer": "LayernormQuantization", "rms": "RmsnormQuantization"}


def add(g: Graph, a: str, b: str) -> str:
    return g.op("Add", a, b)


def minus_minus(g: Graph, a: str, b: str) -> str:
    """The same sum, bit for bit, which is no Add."""
    return g.op("Sub", a, g.op("Neg", b))


def fused(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The quantizing norms that take a residual."""
    flags = ((n, a) for n in proto.graph.node for a in n.attribute if a.name == "has_residual")
    return [n for n, a in flags if a.i]


def layer(
    kind: str = "rms",
    dtype: int = TensorProto.FLOAT,
    total: Any = add,
    x_dims: Any = ("B", "S", K),
    r_dims: Any = ("B", "S", K),
    post_norm: bool = False,
    only_norm: bool = False,
) -> onnx.ModelProto:
    """x + r → norm → Linear → + the sum (pre-norm), or + the norm (post-norm), or nothing."""
    g = Graph()
    kinds: dict[int, Any] = {TensorProto.FLOAT: np.float32, HALF: np.float16}
    s = total(g, g.input("x", x_dims, dtype), g.input("r", r_dims, dtype))
    h = write(g, s, Spelling(kind=kind, casts="none" if dtype == TensorProto.FLOAT else "around"), k=K)
    y = g.op("MatMul", h, g.weight(K, K, dtype=kinds[dtype]))
    if not only_norm:
        y = g.op("Add", h if post_norm else s, y)
    g.op("Identity", y, out="y")
    return g.model("y")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, HALF])
@pytest.mark.parametrize("shape", ["pre_norm", "post_norm", "only_norm"])
def test_an_add_goes_into_the_norm(kind: str, dtype: int, shape: str) -> None:
    options: dict[str, Any] = {"kind": kind, "dtype": dtype, shape: True} if shape != "pre_norm" else {"kind": kind}
    options["dtype"] = dtype
    proto = layer(**options)
    done, result = run(proto, "w8a8")
    rest = ["SmoothQuantGemm", *([] if shape == "only_norm" else ["Add"]), "Identity"]
    assert ops(result) == [KINDS[kind], *rest]
    (norm,) = fused(result)
    assert len(norm.output) == 2 + (shape != "only_norm"), "the sum in a pre-norm model, y in a post-norm one"
    assert [s.status for s in done.ledger.sites] == ["rewritten", "rewritten"]
    assert error(proto, result) < 0.03

    twin = layer(**options, total=minus_minus)
    _, apart = run(twin, "w8a8")
    assert ops(apart)[:3] == ["Neg", "Sub", KINDS[kind]]
    assert not fused(apart)
    # ONNX Runtime computes a float16 Sub in float32 and hands that on unrounded
    assert error(apart, result) <= (0 if dtype == TensorProto.FLOAT else 2e-3)


@pytest.mark.parametrize(
    ("x", "r"),
    [
        (("B", "S", K), (1, "S", K)),
        ((1, "S", K), ("B", "S", K)),
        (("B", 3, K), (3, K)),
        (("B", 3, K), (K,)),
        (("B", 1, K), (1, "S", K)),
        (("B", "S", K), (None, None, K)),
    ],
)
def test_a_sum_that_broadcasts_over_rows(x: Any, r: Any) -> None:
    proto = layer(x_dims=x, r_dims=r)
    _, result = run(proto, "w8a8")
    assert len(fused(result)) == 1
    _, apart = run(layer(x_dims=x, r_dims=r, total=minus_minus), "w8a8")
    assert error(apart, result) == 0
    assert error(proto, result) < 0.03


@pytest.mark.parametrize("r", [("B", "S", 1), (1,), (), ("B", "S", None)])
def test_a_sum_that_broadcasts_within_rows_stays(r: Any) -> None:
    """Or that may: of a residual of unknown width nobody knows."""
    proto = layer(r_dims=r)
    _, result = run(proto, "w8a8")
    assert not fused(result)
    assert ops(result)[:2] == ["Add", KINDS["rms"]]


def test_other_operators_stay() -> None:
    for op in "Sub", "Mul", "Max":
        proto = layer(total=lambda g, a, b, op=op: g.op(op, a, b))
        _, result = run(proto, "w8a8")
        assert not fused(result)
        assert ops(result)[:2] == [op, KINDS["rms"]]
        assert error(proto, result) < 0.03


def test_a_sum_that_is_widened_before_the_norm_stays() -> None:
    """The norm's result is float32 and needed as that: a sum in float16 cannot go in."""
    g = Graph()
    total = g.op("Add", g.input("x", ["B", "S", K], HALF), g.input("r", ["B", "S", K], HALF))
    h = write(g, g.op("Cast", total, to=TensorProto.FLOAT), Spelling(kind="rms"), k=K)
    g.op("Add", h, g.op("MatMul", h, g.weight(K, K)), out="y")
    proto = g.model("y")
    _, result = run(proto, "w8a8")
    assert not fused(result)
    assert ops(result)[:2] == ["Add", "Cast"]
    assert error(proto, result) < 0.03


def test_two_norms_of_one_sum() -> None:
    g = Graph()
    total = g.op("Add", g.input("x", ["B", "S", K]), g.input("r", ["B", "S", K]))
    for out in "ab":
        g.op("MatMul", write(g, total, Spelling(kind="rms"), k=K), g.weight(K, 4), out=out)
    proto = g.model("a", "b")
    done, result = run(proto, "w8a8")
    assert len(fused(result)) == 1
    assert "Add" not in ops(result)
    assert [s.status for s in done.ledger.sites] == ["rewritten"] * 4
    assert error(proto, result) < 0.03


def test_the_sum_is_an_output_and_keeps_its_name() -> None:
    g = Graph()
    total = g.op("Add", g.input("x", ["B", "S", K]), g.input("r", ["B", "S", K]), out="total")
    g.op("MatMul", write(g, total, Spelling(), k=K), g.weight(K, 4), out="y")
    proto = g.model("total", "y")
    _, result = run(proto, "w8a8")
    assert [list(n.output)[-1] for n in fused(result)] == ["total"]
    assert error(proto, result) < 0.03


def test_the_sum_is_read_in_a_subgraph() -> None:
    g = Graph()
    x, r, flag = g.input("x", ["B", "S", K]), g.input("r", ["B", "S", K]), g.input("flag", [], TensorProto.BOOL)
    total = g.op("Add", x, r, out="total")
    g.op("MatMul", write(g, total, Spelling(), k=K), g.weight(K, K), out="mm")
    info = onnx.helper.make_tensor_value_info("then", TensorProto.FLOAT, ["B", "S", K])
    other = onnx.helper.make_tensor_value_info("else", TensorProto.FLOAT, ["B", "S", K])
    then = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["total"], ["then"])], "t", [], [info])
    els = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["mm"], ["else"])], "e", [], [other])
    g.op("If", flag, out="y", then_branch=then, else_branch=els)
    proto = g.model("y", dims=["B", "S", K])
    _, result = run(proto, "w8a8")
    assert [list(n.output)[-1] for n in fused(result)] == ["total"]
    for value in (True, False):
        given = {n: np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32) for n in ("x", "r")}
        assert error(proto, result, given | {"flag": np.array(value)}) < 0.03


@pytest.mark.parametrize("r", [("B", "S", K), (None, None, K)])
def test_who_reads_the_norms_shape_reads_another(r: Any) -> None:
    """The norm's result goes; its shape is the sum's, which is an output then if no operand is known to have it."""
    g = Graph()
    total = g.op("Add", g.input("x", [None, None, K]), g.input("r", r))
    h = write(g, total, Spelling(kind="rms"), k=K)
    mm = g.op("MatMul", h, g.weight(K, K))
    proto = g.model(g.op("Reshape", mm, g.op("Shape", h), out="y"))
    _, result = run(proto, "w8a8")
    assert len(fused(result)) == 1
    assert "Sqrt" not in ops(result)
    assert error(proto, result) < 0.03
