"""Merging siblings: q, k, v or gate, up become one GEMM; integers, results and ledger are those of the ones apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import qpass
from qpass.pipeline import Rewritten
from qpass.spec import QuantSpec
from qpass.testing import feeds
from tests.rules.kit import Graph, error, ops, recipe, run
from tests.rules.spelling import HALF, Spelling, write

K = 32
PRESETS = ("w8a16", "w4a16", "w4a16-g128", "w4a16-g128-zp", "w8a8")


def spec(preset: str, **changes: Any) -> QuantSpec:
    return QuantSpec.preset(preset, 32 if "g128" in preset else None, **changes)


def attention(
    dtype: int = TensorProto.FLOAT, biases: str = "qv", norm: bool = True, widths: tuple[int, ...] = (24, 8, 12)
) -> onnx.ModelProto:
    """q, k, v of different widths behind a norm (or nothing), some with a bias."""
    g = Graph()
    kind: Any = np.float16 if dtype == HALF else np.float32
    x = g.input("x", ["B", "S", K], dtype)
    h = write(g, x, Spelling(casts="around" if dtype == HALF else "none"), k=K) if norm else x
    for name, n in zip("qkv", widths, strict=True):
        y = g.op("MatMul", h, g.weight(K, n, dtype=kind, name=f"{name}.weight"), name=f"{name}_proj")
        y = g.op("Add", y, g.gain(n, dtype=kind)) if name in biases else y
        g.op("Relu", y, out=name)
    return g.model("q", "k", "v")


def initializers(proto: onnx.ModelProto, ending: str) -> list[Any]:
    return [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith(ending)]


def gemms(proto: onnx.ModelProto) -> int:
    return sum("Gemm" in op or "Matmul" in op for op in ops(proto))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, HALF])
@pytest.mark.parametrize("biases", ["qv", "", "qkv"])
def test_one_gemm_with_the_same_integers(preset: str, dtype: int, biases: str) -> None:
    proto = attention(dtype, biases)
    _, apart = run(proto, spec(preset))
    done, merged = run(proto, spec(preset, merge_siblings=True))
    assert gemms(apart) == 3
    assert gemms(merged) == 1
    assert ops(merged).count("Split") == 1
    for name in "weight", "scale", "scale_w", "zero":
        rows = [a for a in initializers(apart, f".{name}") if a.dtype in (np.int8, np.float32)]
        one = [a for a in initializers(merged, f".{name}") if a.dtype in (np.int8, np.float32)]
        if rows:
            assert np.array_equal(np.concatenate(rows), one[0]), name
    assert error(apart, merged) <= (1e-6 if dtype == TensorProto.FLOAT else 1e-3)
    assert_told(done)


def assert_told(done: Rewritten) -> None:
    """Each Linear has its entry; they share the new nodes, and the bytes by output channels."""
    linears = done.ledger.of("linear")
    assert [s.nodes[0] for s in linears] == ["q_proj", "k_proj", "v_proj"]
    assert {s.status for s in linears} == {"rewritten"}
    assert len({tuple(s.new_nodes) for s in linears}) == 1
    assert linears[0].op is not None
    sizes = [s.weight.bytes_after for s in linears if s.weight is not None]
    assert sizes[0] == 3 * sizes[1] == 2 * sizes[2]


@pytest.mark.parametrize("preset", ["w8a8", "w8a8-static"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, HALF])
def test_the_same_smoother_and_range(preset: str, dtype: int, tmp_path: Path) -> None:
    """What the calibration decides for three wide Linears it decides for the one that they become."""
    proto = attention(dtype, widths=(600, 40, 300))
    onnx.save(proto, tmp_path / "m.onnx")
    x = feeds(proto, B=4, S=6)["x"]
    x[..., 3] *= 30
    np.savez(tmp_path / "sample.npz", allow_pickle=False, x=x)
    stats = qpass.calibrate(tmp_path / "m.onnx", [tmp_path / "sample.npz"], tmp_path / "stats.npz")
    apart, merged = (
        run(proto, spec(preset, merge_siblings=merge, smoothing="search"), calibration=stats) for merge in (False, True)
    )
    notes = [{s.reason for s in done.ledger.of("linear")} for done, _ in (apart, merged)]
    assert notes[0] == notes[1]
    assert "smoothing" in str(notes[0])
    assert error(apart[1], merged[1], {"x": x}) == 0


def test_they_share_the_norm() -> None:
    done, result = run(attention(), spec("w8a8", merge_siblings=True))
    assert ops(result)[:3] == ["LayernormQuantization", "SmoothQuantGemm", "Split"]
    assert [s.fed_by for s in done.ledger.of("linear")] == [0, 0, 0]


def test_without_a_norm() -> None:
    proto = attention(norm=False)
    done, result = run(proto, spec("w8a8", merge_siblings=True))
    assert ops(result)[:3] == ["QuantizePerToken", "SmoothQuantGemm", "Split"]
    assert error(proto, result) < 0.03
    assert [s.fed_by for s in done.ledger.of("linear")] == [None] * 3


def test_only_where_the_spec_says_so() -> None:
    _, result = run(attention(), "w8a8")
    assert "Split" not in ops(result)


def test_what_the_spec_tells_apart_stays_apart() -> None:
    mode = QuantSpec.preset("w8a8").mode
    overrides = [{"match": "k_proj", "preset": "w8a16"}]
    done, result = run(attention(), recipe(mode, merge_siblings=True, overrides=overrides))
    assert sorted(op for op in ops(result) if "Gemm" in op or "Matmul" in op) == [
        "SmoothQuantGemm",
        "WeightOnlyQuantMatmul",
    ]
    excluded, result = run(attention(), spec("w8a16", merge_siblings=True, exclude=["v_proj"]))
    assert [s.status for s in excluded.ledger.of("linear")] == ["rewritten", "rewritten", "excluded"]
    assert sorted(op for op in ops(result) if "Mat" in op) == ["MatMul", "WeightOnlyQuantMatmul"]
    assert [s.status for s in done.ledger.of("linear")] == ["rewritten"] * 3


def test_other_inputs_and_types_stay_apart() -> None:
    g = Graph()
    x, z = g.input("x", ["B", K]), g.input("z", ["B", K])
    for out, of in (("a", x), ("b", z)):
        g.op("MatMul", of, g.weight(K, 8), out=out)
    h = g.op("Cast", x, to=HALF)
    g.op("MatMul", h, g.weight(K, 8, dtype=np.float16), out="c")
    proto = g.model("a", "b", "c")
    done, result = run(proto, spec("w8a16", merge_siblings=True))
    assert gemms(result) == 3
    assert [s.status for s in done.ledger.of("linear")] == ["rewritten"] * 3


def test_a_linear_behind_its_sibling_stays_apart() -> None:
    """The gate of one reads the result of another: they read different values."""
    g = Graph()
    x = g.input("x", ["B", K])
    a = g.op("MatMul", x, g.weight(K, K), out="a")
    g.op("MatMul", g.op("Add", x, a), g.weight(K, K), out="b")
    _, result = run(g.model("a", "b"), spec("w8a16", merge_siblings=True))
    assert gemms(result) == 2


def test_a_shared_weight_and_a_node_between() -> None:
    """Siblings may come in any order, and nodes between them may read one of them."""
    g = Graph()
    x = g.input("x", ["B", K])
    w = g.weight(K, K)
    a = g.op("MatMul", x, w, out="a")
    g.op("Tanh", a, out="t")
    g.op("MatMul", x, g.op("Identity", w), out="b")
    proto = g.model("t", "b")
    done, result = run(proto, spec("w8a16", merge_siblings=True))
    assert gemms(result) == 1
    assert error(proto, result) < 0.02
    assert [s.status for s in done.ledger.of("linear")] == ["rewritten"] * 2


def test_what_the_spec_leaves_is_not_merged() -> None:
    proto = attention()
    excluded = spec("w8a16", merge_siblings=True, exclude=["q_proj"], overrides=[{"match": "*_proj", "mode": "none"}])
    done, result = run(proto, excluded)
    assert [n.SerializeToString() for n in result.graph.node] == [n.SerializeToString() for n in proto.graph.node]
    assert [s.status for s in done.ledger.of("linear")] == ["excluded", "kept", "kept"]


def test_odd_k_is_declined_for_each() -> None:
    g = Graph()
    x = g.input("x", ["B", 33])
    for out in "ab":
        g.op("MatMul", x, g.weight(33, 8), out=out, name=f"{out}_proj")
    proto = g.model("a", "b")
    done, result = run(proto, spec("w4a16", merge_siblings=True))
    assert ops(result) == ["MatMul", "MatMul"]
    assert [(s.nodes, s.status) for s in done.ledger.sites] == [(["a_proj"], "declined"), (["b_proj"], "declined")]
    assert all("K=33 is odd" in (s.reason or "") for s in done.ledger.sites)
