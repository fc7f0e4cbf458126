"""What tests of engines share: TensorRT-RTX, the plugin library's shells, and models to build."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from qpass import gpu
from qpass.engine import run as running
from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.bench import points
from qpass.engine.builder import Finished
from qpass.engine.profiles import profiles_of
from qpass.graph import Model
from qpass.plugins import Library
from qpass.testing import model
from tests.engine import fake_gpu
from tests.engine.fake_gpu import FakeGpu, write_engine
from tests.plugins.conftest import shells, shells8

__all__ = ["shells", "shells8"]
STAND_IN = Path(__file__).with_name("tensorrt8")

TEXT = """
<ir_version: 10, opset_import: ["" : 17]>
block (float[batch, length, 64] x) => (float[batch, length, 64] y)
<float[64] gamma, float[64, 128] w1, float[128, 64] w2, float[64] b2>
{
    [norm] h = LayerNormalization<axis = -1>(x, gamma)
    [fc1] m1 = MatMul(h, w1)
    [act] r = Relu(m1)
    [fc2] m2 = MatMul(r, w2)
    [bias] a = Add(m2, b2)
    [residual] y = Add(a, x)
}
"""


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """A model of a norm, an MLP and a residual."""
    path = tmp_path / "block.onnx"
    onnx.save(model(TEXT), path)
    return path


@pytest.fixture
def library(shells: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The plugins as QPASS_PLUGINS, TensorRT-RTX to build with, and a cache of the test's own."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'qpass[rtx]'")
    monkeypatch.setenv("QPASS_PLUGINS", str(shells.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shells


@pytest.fixture
def tensorrt8(shells8: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TensorRT 8.6.1 as `tensorrt_bindings`, its plugins, and a cache of the test's own."""
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{STAND_IN}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("QPASS_PLUGINS", str(shells8.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    sys.modules.pop("tensorrt_bindings", None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """A GPU, TensorRT 10 on it, a plugin library, and no nvidia-smi."""
    there = FakeGpu()
    monkeypatch.setattr(gpu, "driver", lambda: there)
    monkeypatch.setattr(gpu, "capabilities", lambda: (gpu.capability(),))
    monkeypatch.setattr(gpu, "Graph", there.Graph)
    monkeypatch.setattr("qpass.engine.bench.timing.monotonic", lambda: there.now * 1e-6)
    monkeypatch.setattr("qpass.engine.bench.machine.which", lambda name: None)
    monkeypatch.setattr(running, "_REGISTERED", {})
    monkeypatch.setattr(running, "_LOGGERS", {})
    monkeypatch.setattr(TensorRT, "version", lambda self: fake_gpu.VERSION)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_gpu.tensorrt(there))
    (tmp_path / "plugins.so").write_text("plugins")
    monkeypatch.setenv("QPASS_PLUGINS", str(tmp_path / "plugins.so"))
    return there


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write_engine(tmp_path / "a.engine", [100.0, 120.0]), write_engine(tmp_path / "b.engine", [50.0])]


@pytest.fixture
def built(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What builds were asked for; they are played here, and the more plugins an engine has the faster it is."""
    asked: list[dict[str, Any]] = []

    def build(path: Path, output: Path, **keywords: Any) -> Finished:
        asked.append({"model": path, "engine": output} | keywords)
        loaded = Model.load(path)
        nodes = {n.name: n.op for n in loaded.nodes() if n.domain == "qpass"}
        inputs = points.required(loaded.proto)
        profiles = profiles_of(inputs, *(keywords[f"{k}_shapes"] for k in ("min", "opt", "max")))
        tensors = [
            {"name": n, "mode": "input", "dtype": "float", "shape": [d if isinstance(d, int) else -1 for d in i.shape]}
            for n, i in inputs.items()
            if i.shape is not None
        ]
        write_engine(
            output,
            [1000.0 / (1 + len(nodes))],
            plugins=nodes,
            library=Path(os.environ["QPASS_PLUGINS"]) if nodes else None,
            origin=keywords["origin"],
            dims={n: list(i.shape or ()) for n, i in inputs.items()},
            profiles={n: {k: getattr(p, k) for k in ("min", "opt", "max")} for n, p in profiles.items()},
            tensors=tensors + [t | {"name": "y", "mode": "output"} for t in tensors[:1]],
        )
        facts = json.loads(output.with_name(f"{output.name}.json").read_text())
        return Finished(output, output.with_name(f"{output.name}.json"), None, facts)

    monkeypatch.setattr("qpass.engine.builder.build_files", build)
    monkeypatch.setattr("qpass.engine.builder.check_library", lambda *_: None)
    return asked
