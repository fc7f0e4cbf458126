"""What tests of engines share: TensorRT-RTX, the plugin library's shells, and models to build."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest

from qpass.plugins import Library
from qpass.testing import model
from tests.plugins.conftest import shells, shells8

__all__ = ["shells", "shells8"]

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
