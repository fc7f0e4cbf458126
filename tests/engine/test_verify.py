"""Engines against ONNX Runtime: the limits that hold, and what is owed to rounding. ONNX Runtime plays the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qpass
from qpass import runtime
from qpass.engine import sidecar
from qpass.engine.rounding import rounded
from qpass.engine.verify import ROUNDINGS, TOLERANCE, verify_engine
from qpass.errors import QpassError
from qpass.graph.walk import all_nodes
from qpass.testing import feeds, model, outputs
from qpass.verify import Difference
from tests.conftest import Run

Arrays = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Enough Linears, one behind the other, that codes moved in one move more in the next."""
    nodes = [f"h{i} = LayerNormalization(y{i}, g) m{i} = MatMul(h{i}, w{i}) y{i + 1} = Relu(m{i})" for i in range(6)]
    weights = ", ".join(f"float[64, 64] w{i}" for i in range(6))
    text = f"""<ir_version: 10, opset_import: ["" : 17]>
    deep (float[batch, length, 64] y0) => (float[batch, length, 64] y6)
    <float[64] g, {weights}> {{ {" ".join(nodes)} }}"""
    onnx.save(model(text, g=np.ones(64)), tmp_path / "deep.onnx")
    return tmp_path / "deep.onnx"


@pytest.fixture
def path(deep: Path) -> Path:
    return qpass.rewrite(deep, spec="w8a8").output


@pytest.fixture
def plays(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes an engine of `path` that is ONNX Runtime, activations in float16 or not, off by a share of the outputs."""

    def make(precision: str = "fp16", half: bool = True, off: float = 0.0) -> Path:
        proto = runtime.load(path)
        runner = runtime.Runner(path, rounded(path, proto) if half else proto, optimize=False)

        class Engine:
            def __init__(self, file: Path, library: Path | None = None) -> None:
                self.path, self.library = file, library
                self.facts = json.loads(sidecar.of(file).read_text())

            def load(self) -> None:
                if self.library is not None:
                    raise QpassError(f"loaded {self.library}")

            def run(self, given: Arrays) -> dict[str, np.ndarray[Any, Any]]:
                rng = np.random.default_rng(0)
                found = {}
                for name, y in next(runner.run(given)).items():
                    noise = rng.standard_normal(y.shape).astype(np.float32)
                    found[name] = y + noise * (off * np.linalg.norm(y) / np.linalg.norm(noise))
                return found

        monkeypatch.setattr("qpass.engine.verify.Engine", Engine)
        engine = path.with_suffix(".engine")
        engine.write_bytes(b"engine")
        shape = [2, 8, 64]
        facts = {
            "precision": precision,
            "backend": {"name": "tensorrt", "version": "8.6.1"},
            "engine": {},
            "model": {"name": path.name, "sha256": sidecar.digest(path)},
            "profiles": {"y0": {"min": shape, "opt": shape, "max": shape}},
        }
        sidecar.of(engine).write_text(json.dumps(facts))
        return engine

    return make


def test_rounding_is_no_failure(deep: Path, plays: Callable[..., Path]) -> None:
    """Codes that rounding moves exceed the plain tolerance; the engine's limit is a multiple of just that."""
    found = verify_engine(deep, plays())
    (arithmetic,), (rounding,) = found.arithmetic, found.rounding
    assert arithmetic.relative_error == rounding.relative_error > TOLERANCE / ROUNDINGS
    assert found.limits == {"y6": ROUNDINGS * rounding.relative_error}
    assert found.passed
    assert found.to_dict()["limits"] == found.limits


def test_what_rounding_does_not_explain_is_a_failure(deep: Path, plays: Callable[..., Path]) -> None:
    owed = verify_engine(deep, plays()).rounding[0].relative_error
    found = verify_engine(deep, plays(off=2.5 * owed))
    assert not found.passed
    assert found.failures == [
        f"y6: arithmetic is off by {found.arithmetic[0].relative_error:.3g}, at most {2 * owed:.3g}"
    ]


def test_types_of_the_model_are_not_rounded(deep: Path, plays: Callable[..., Path]) -> None:
    """Of an engine that computes in float32, the same error is a failure."""
    for precision in ("fp32", "the model's"):
        found = verify_engine(deep, plays(precision, off=0.011))
        assert (found.rounding, found.limits) == ((), {"y6": TOLERANCE})
        assert not found.passed
        assert verify_engine(deep, plays(precision, half=False, off=0.005)).passed


def test_a_tolerance_that_is_given_holds(deep: Path, plays: Callable[..., Path]) -> None:
    engine = plays()
    assert not verify_engine(deep, engine, tolerance=1e-4).passed
    assert verify_engine(deep, plays(off=0.05), tolerance=0.2).limits == {"y6": 0.2}


def test_what_overflows_allows_nothing(tmp_path: Path, plays: Callable[..., Path], deep: Path, path: Path) -> None:
    """Where rounding gives infinities, the plain tolerance stays."""
    for file in (deep, path):
        proto = onnx.load(file)
        scale = [helper.make_node("Mul", ["small", "large"], ["much"], "up")]
        scale.append(helper.make_node("Div", ["much", "large"], ["y6"], "down"))
        next(n for n in proto.graph.node if "y6" in n.output).output[0] = "small"
        proto.graph.node.extend(scale)
        proto.graph.initializer.append(helper.make_tensor("large", TensorProto.FLOAT, [], [1e6]))
        onnx.save(proto, file)
    found = verify_engine(deep, plays(half=False))
    assert found.rounding[0].relative_error == np.inf
    assert found.limits == {"y6": TOLERANCE}
    assert any("overflow float16" in n for n in found.notes)
    assert found.passed


def test_command(deep: Path, path: Path, plays: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    engine = plays()
    said = run("verify", deep, engine)
    assert said.code == 0, said.err
    assert "of rounding to float16" in said.out
    limit = json.loads(run("verify", deep, engine, "--json").out)["limits"]["y6"]
    assert f"arithmetic ≤ {limit:.3g}" in said.out
    strict = run("verify", deep, engine, "--tolerance", "0.0001")
    assert (strict.code, "at most 0.0001" in strict.out) == (1, True)
    named = run("verify", deep, engine, "--plugins", tmp_path / "mine.so")
    assert (named.code, "loaded" in named.err) == (2, True), named.err
    for flag, value in (("--plugins", "mine.so"), ("--tolerance", "0.1"), ("--rewritten", path)):
        refused = run("verify", deep, path, flag, value)
        assert (refused.code, f"{flag} is of engines" in refused.err) == (2, True)


def test_what_is_rounded(tmp_path: Path) -> None:
    """Floats that nodes make, in branches too; not integers, constants, scales of plugins, and the model's outputs."""
    text = """<ir_version: 10, opset_import: ["" : 17]>
    g (float[B, 64] x, bool c) => (float[B, 32] y, int64[2] s) <float[64, 32] w, float[32] b> {
        k = Constant<value_float = 0.1>()
        a = Mul(x, k)
        s = Shape(a)
        t = If(c) <then_branch = g1 () => (float[B, 64] p) { p = Neg(a) },
                   else_branch = g2 () => (float[B, 64] q) { r = Sin(a) q = Cos(r) }>
        m = MatMul(t, w)
        y = Add(m, b)
    }"""
    proto = model(text)
    onnx.save(proto, tmp_path / "m.onnx")
    done = rounded(tmp_path / "m.onnx", proto)
    halves = {n.output[0] for n in all_nodes(done.graph.node) if n.op_type == "Cast" and n.output[0] in "aptmqrsyk"}
    assert halves == set("aptmqr")
    given = feeds(proto)
    for side in (False, True):
        fed = {**given, "c": np.array(side)}
        want, got = outputs(proto, fed), outputs(done, fed)
        assert 1e-5 < Difference.of(want[0], got[0]).relative_error < 1e-3
    path = qpass.rewrite(tmp_path / "m.onnx", spec="w8a8").output
    proto = onnx.load(path)
    done = rounded(path, proto)
    quantized = next(n for n in proto.graph.node if n.op_type == "QuantizePerToken")
    made = {o for n in done.graph.node if n.op_type == "QuantizePerToken" for o in n.output}
    assert made == set(quantized.output), "neither its codes nor its scales are rounded"
    assert proto.SerializeToString() == onnx.load(path).SerializeToString(), "the model that is given stays"
