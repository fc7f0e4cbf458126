"""The plugin library as tests have it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qpass.plugins import Library
from tests.plugins.shells import compile_shells, cuda_include


def _shells(tmp_path_factory: pytest.TempPathFactory, tensorrt: str) -> Library:
    if shutil.which("g++") is None or cuda_include() is None:
        pytest.skip("no g++, or no CUDA headers: pip install nvidia-cuda-runtime")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / f"shells{tensorrt}"
    folder.mkdir(exist_ok=True)
    return compile_shells(folder, tensorrt=tensorrt)


@pytest.fixture(scope="session")
def shells(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The library without kernels, one for all workers."""
    return _shells(tmp_path_factory, "10")


@pytest.fixture(scope="session")
def shells8(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The same for TensorRT 8.6."""
    return _shells(tmp_path_factory, "8")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QPASS_PLUGINS", raising=False)
    return tmp_path / "cache" / "qpass" / "plugins"
