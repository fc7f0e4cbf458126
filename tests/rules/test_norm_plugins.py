"""Norms as plugins where nothing quantizes them: the same numbers, an Add before them taken in, and only if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qpass.errors import QpassError
from qpass.spec import QuantSpec
from tests import zoo
from tests.rules.kit import Graph, error, ops, run
from tests.rules.spelling import HALF, Spelling, write
from tests.rules.test_residual import K, add, layer, minus_minus

PLUGINS = {"layer": "Layernorm", "rms": "Rmsnorm"}
LIMIT: dict[int, float] = {TensorProto.FLOAT: 1e-6, HALF: 2e-3}
"""Of the norm alone, beside the model with the same Linears and its own norms: float16 rounds in other places."""


def spec(preset: str = "w8a16", **changes: Any) -> QuantSpec:
    return QuantSpec.preset(preset, norm_plugins=True, **changes)


def norms(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.op_type in PLUGINS.values()]


@pytest.mark.parametrize("kind", PLUGINS)
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, HALF])
@pytest.mark.parametrize("shape", ["pre_norm", "post_norm", "only_norm"])
def test_a_norm_and_the_add_before_it(kind: str, dtype: int, shape: str) -> None:
    options: dict[str, Any] = {"kind": kind, "dtype": dtype} | ({} if shape == "pre_norm" else {shape: True})
    proto = layer(**options)
    done, result = run(proto, spec())
    left = [] if shape == "only_norm" else ["Add"]
    assert ops(result) == [PLUGINS[kind], "WeightOnlyQuantMatmul", *left, "Identity"]
    (norm,) = norms(result)
    assert len(norm.output) == 1 + (shape == "pre_norm"), "the sum, where somebody else reads it"
    assert [s.status for s in done.ledger.sites] == ["rewritten", "rewritten"]
    assert [s.op for s in done.ledger.of("norm")] == [PLUGINS[kind]]
    assert [s.fed_by for s in done.ledger.of("linear")] == [None], "it hands on floats"
    _, apart = run(proto, "w8a16")
    assert error(apart, result) <= LIMIT[dtype]

    twin = layer(**options, total=minus_minus)
    _, unsummed = run(twin, spec())
    assert ops(unsummed)[:3] == ["Neg", "Sub", PLUGINS[kind]]
    assert error(unsummed, result) <= (0 if dtype == TensorProto.FLOAT else 2e-3)


@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
def test_only_where_the_spec_says_so(preset: str) -> None:
    proto = layer()
    _, result = run(proto, preset)
    assert not norms(result)
    assert QuantSpec.preset(preset).norm_plugins is False


def test_a_quantizing_norm_comes_first() -> None:
    """Only the norms that no int8 Linear reads are left for it."""
    g = Graph()
    h = write(g, g.input("x", ["B", "S", K]), Spelling(kind="rms"), k=K)
    y = g.op("MatMul", h, g.weight(K, K))
    g.op("Identity", write(g, y, Spelling(kind="layer"), k=K), out="y")
    proto = g.model("y")
    done, result = run(proto, spec("w8a8"))
    assert ops(result) == ["RmsnormQuantization", "SmoothQuantGemm", "Layernorm", "Identity"]
    assert [s.op for s in done.ledger.of("norm")] == ["RmsnormQuantization", "Layernorm"]
    _, apart = run(proto, "w8a8")
    assert error(apart, result) <= 1e-6


@pytest.mark.parametrize(
    ("x", "r"),
    [(("B", "S", K), (1, "S", K)), ((1, "S", K), ("B", "S", K)), (("B", 3, K), (K,)), (("B", "S", K), (None, None, K))],
)
def test_a_sum_that_broadcasts_over_rows(x: Any, r: Any) -> None:
    proto = layer(x_dims=x, r_dims=r)
    _, result = run(proto, spec())
    assert [len(n.output) for n in norms(result)] == [2]
    assert "Neg" not in ops(result)
    _, apart = run(proto, "w8a16")
    assert error(apart, result) <= 1e-6


@pytest.mark.parametrize("r", [("B", "S", 1), (1,), (), ("B", "S", None)])
def test_a_sum_that_broadcasts_within_rows_stays(r: Any) -> None:
    proto = layer(r_dims=r)
    _, result = run(proto, spec())
    assert ops(result)[:2] == ["Add", PLUGINS["rms"]]
    _, apart = run(proto, "w8a16")
    rows = np.random.default_rng(0)
    dims = [{"B": 2, "S": 3, None: K}.get(d, d) for d in r]
    given = {name: np.asarray(rows.normal(size=d), np.float32) for name, d in {"x": [2, 3, K], "r": dims}.items()}
    assert error(apart, result, given) <= 1e-6


def test_a_norm_that_widens_float16_stays_wide() -> None:
    """The sum is float16, the norm's result float32 and read as that: the plugin computes on what is cast."""
    g = Graph()
    total = add(g, g.input("x", ["B", "S", K], HALF), g.input("r", ["B", "S", K], HALF))
    h = write(g, g.op("Cast", total, to=TensorProto.FLOAT), Spelling(kind="rms"), k=K)
    g.op("MatMul", h, g.weight(K, K), out="y")
    proto = g.model("y")
    _, result = run(proto, spec())
    assert ops(result)[:3] == ["Add", "Cast", "Rmsnorm"]
    _, apart = run(proto, "w8a16")
    assert error(apart, result) <= 1e-6


def test_two_norms_of_one_sum() -> None:
    """One takes the Add in and hands the sum to the other."""
    g = Graph()
    total = add(g, g.input("x", ["B", "S", K]), g.input("r", ["B", "S", K]))
    for out in "ab":
        g.op("MatMul", write(g, total, Spelling(kind="rms"), k=K), g.weight(K, 4), out=out)
    proto = g.model("a", "b")
    done, result = run(proto, spec())
    assert sorted(ops(result)) == [*["Rmsnorm"] * 2, *["WeightOnlyQuantMatmul"] * 2]
    assert sorted(len(n.output) for n in norms(result)) == [1, 2]
    assert {s.status for s in done.ledger.sites} == {"rewritten"}
    _, apart = run(proto, "w8a16")
    assert error(apart, result) <= 1e-6


def test_sum_and_norm_are_outputs_and_keep_their_names() -> None:
    g = Graph()
    total = g.op("Add", g.input("x", ["B", "S", K]), g.input("r", ["B", "S", K]), out="total")
    g.op("LayerNormalization", total, g.gain(K), g.gain(K), out="normed", axis=-1)
    g.op("MatMul", "normed", g.weight(K, 4), out="y")
    proto = g.model("total", "normed", "y")
    _, result = run(proto, spec())
    assert [list(n.output) for n in norms(result)] == [["normed", "total"]]
    _, apart = run(proto, "w8a16")
    assert error(apart, result) <= 1e-6


def test_no_norm_in_it_is_no_mistake() -> None:
    g = Graph()
    g.op("MatMul", g.input("x", ["B", K]), g.weight(K, 4), out="y")
    _, result = run(g.model("y"), spec())
    assert ops(result) == ["WeightOnlyQuantMatmul"]


def test_what_nearly_is_a_norm_stays() -> None:
    """Divided by the variance and not by its root."""
    g = Graph()
    x = g.input("x", ["B", "S", K])
    square = g.op("ReduceMean", g.op("Mul", x, x), g.const([-1], np.int64), keepdims=1)
    h = g.op("Mul", g.op("Div", x, g.op("Add", square, g.const(1e-6))), g.gain(K))
    g.op("MatMul", h, g.weight(K, 4), out="y")
    proto = g.model("y")
    _, result = run(proto, spec())
    assert not norms(result)
    _, apart = run(proto, "w8a16")
    assert error(apart, result) == 0


def test_an_excluded_norm_stays() -> None:
    """Which is the way out for one within an If, where TensorRT-RTX takes no plugin."""
    g = Graph()
    h = g.op("LayerNormalization", g.input("x", ["B", K]), g.gain(K), name="first", axis=-1)
    h = g.op("LayerNormalization", g.op("MatMul", h, g.weight(K, K), name="lin"), g.gain(K), name="second", axis=-1)
    proto = g.model(g.op("Identity", h, out="y"))
    done, result = run(proto, spec(exclude=["second"]))
    assert ops(result) == ["Layernorm", "WeightOnlyQuantMatmul", "LayerNormalization", "Identity"]
    norm = done.ledger.of("norm")[1]
    assert (norm.status, norm.reason) == ("excluded", "excluded by exclude[0] 'second'")
    _, apart = run(proto, "w8a16")
    assert error(apart, result) <= 1e-6
    with pytest.raises(QpassError, match="'second' matches no Linear"):  # it would be no plugin
        run(proto, QuantSpec.preset("w8a16", exclude=["second"]))
    with pytest.raises(QpassError, match="'third' matches no Linear"):
        run(proto, spec(exclude=["third"]))


@zoo.each(*zoo.FEW)
def test_every_norm_of_the_zoo(path: Path) -> None:
    proto = onnx.load(path)
    done, result = run(proto, spec())
    assert {s.status for s in done.ledger.of("norm")} == {"rewritten"}
    assert len(norms(result)) == len(done.ledger.of("norm"))
    _, apart = run(proto, "w8a16")
    assert error(apart, result, zoo.samples(path)[0]) <= (3e-3 if "fp16" in path.stem else 2e-6)


def test_a_recipe_says_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("preset: w4a16-g128\nnorm_plugins: true\n")
    asked = QuantSpec.from_yaml(path)
    assert asked.norm_plugins
    assert "norm plugins" in asked.describe()
    assert QuantSpec(**asked.to_dict()) == asked
    path.write_text(asked.to_yaml())
    assert QuantSpec.from_yaml(path) == asked
