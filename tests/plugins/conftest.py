"""The plugin library as tests have it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qpass.plugins import Library
from tests.plugins.emulated import compile_emulated
from tests.plugins.shells import compile_shells, cuda_include


def _folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Where what is compiled by the CPU's compiler lies, one for all workers."""
    if shutil.which("g++") is None or cuda_include() is None:
        pytest.skip("no g++, or no CUDA headers: pip install nvidia-cuda-runtime")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def _shells(tmp_path_factory: pytest.TempPathFactory, tensorrt: str) -> Library:
    return compile_shells(_folder(tmp_path_factory, f"shells{tensorrt}"), tensorrt=tensorrt)


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


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernels compiled for the CPU (tests/plugins/emulated)."""
    return compile_emulated(_folder(tmp_path_factory, "emulated"))
