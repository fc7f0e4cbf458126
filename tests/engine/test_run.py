"""Running engines: what is checked before a GPU is asked, and on a GPU the buffers, the stream and the graph.

No TensorRT that builds without a GPU runs on every GPU, so its part is played here by a module with the same calls,
whose engine hands its input on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass import gpu
from qpass.engine import Engine, sidecar
from qpass.engine.backends.tensorrt import TensorRT
from qpass.errors import QpassError
from tests.conftest import Run
from tests.engine.fake_gpu import CudaError, CudaMemoryError, FakeGpu, Shaped, write_engine


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine's two files; what is in the engine is for the stand-in alone."""
    path = tmp_path / "m.engine"
    path.write_bytes(b"engine")
    facts = {
        "version": 1,
        "backend": {"name": "tensorrt", "version": "10.0"},
        "engine": {"sha256": sidecar.digest(path)},
        "plugins": None,
        "profiles": {"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}},
        "tensors": [
            {"name": "x", "mode": "input", "dtype": "float", "shape": [-1, 4]},
            {"name": "y", "mode": "output", "dtype": "float", "shape": [-1, 4]},
        ],
    }
    sidecar.of(path).write_text(json.dumps(facts))
    return path


X = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_feeds_are_checked(engine: Path) -> None:
    loaded = Engine(engine)
    assert loaded.check({"x": X})["x"].shape == (2, 4)
    for feeds, said in (
        ({}, r"needs its input 'x'; it has x"),
        ({"x": X, "z": X}, r"has no input 'z'; it has x"),
        ({"x": X.astype(np.float64)}, r"the input 'x' is float64, wants float32"),
        ({"x": X[0]}, r"'x' has shape \[4\], the engine was built for from \[1, 4\] to \[8, 4\]"),
        ({"x": np.zeros((9, 4), np.float32)}, r"'x' has shape \[9, 4\]"),
    ):
        with pytest.raises(QpassError, match=said):
            loaded.check(feeds)


def test_files(engine: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(QpassError, match="no such engine; build one with `qpass build`"):
        Engine(tmp_path / "none.engine")
    engine.write_bytes(b"another")
    with pytest.raises(QpassError, match=r"is not of this m\.engine; build the engine again"):
        Engine(engine)
    sidecar.of(engine).write_text("{")
    with pytest.raises(QpassError, match="not the sidecar of an engine"):
        Engine(engine)
    sidecar.of(engine).unlink()
    refused = run("run", engine, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert refused.code == 2
    assert "it comes with the engine from `qpass build`" in refused.err


def test_inputs_file(engine: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "x.npz").write_text("no arrays")
    refused = run("run", engine, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert (refused.code, "not an .npz file that can be read" in refused.err) == (2, True)


def no_gpu() -> str | None:
    try:
        gpu.driver()
    except QpassError as error:
        return str(error)
    return None


def test_without_a_gpu_it_says_so(engine: Path, tmp_path: Path, run: Run) -> None:
    if no_gpu() is None:
        pytest.skip("there is a GPU")
    np.savez(tmp_path / "x.npz", x=X)
    refused = run("run", engine, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert refused.code == 2
    assert "pip install 'qpass[gpu]'" in refused.err or "GPU" in refused.err
    assert not (tmp_path / "y.npz").exists()


def test_the_first_logger_outlives_its_engine(fake: FakeGpu, two: list[Path]) -> None:
    """TensorRT keeps the first logger of a process for all that comes later, and crashes where that is gone."""
    for path in two:
        engine = Engine(path)
        engine.load()
        del engine
        gc.collect()


def test_words_are_of_the_engine_that_failed(fake: FakeGpu, two: list[Path], tmp_path: Path) -> None:
    """One logger serves all engines; what was said of one is not said of the next."""
    large, other = write_engine(tmp_path / "large.engine", [1.0], memory=16 << 30), Engine(two[0]).load()
    with pytest.raises(QpassError, match="out of memory"):
        Engine(large).load()
    fake.free = 8 << 30
    later = Engine(two[1]).load()
    assert not later._said
    assert later._said is other._said


ILLEGAL = "cuStreamSynchronize failed: an illegal memory access was encountered"


@pytest.mark.parametrize("flags", [(), ("--cuda-graph",)])
def test_cuda_errors_are_said_in_a_line(fake: FakeGpu, tmp_path: Path, run: Run, flags: tuple[str, ...]) -> None:
    """Of a kernel, of memory of either side, and of copies: no traceback, and no output."""
    np.savez(tmp_path / "x.npz", x=X)
    good = write_engine(tmp_path / "good.engine", [1.0])
    bad = write_engine(tmp_path / "bad.engine", [1.0], breaks=ILLEGAL)

    def refused(engine: Path) -> str:
        done = run("run", engine, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz", *flags)
        assert (done.code, done.err.count("\n"), done.out) == (2, 1, "")
        assert not (tmp_path / "y.npz").exists()
        return done.err

    fake.free = 1 << 20  # as much as the engine takes
    assert "the GPU is out of memory: 32 bytes were asked for, 0 free" in refused(good)
    fake.free = 1 << 30
    assert refused(bad) == f"error: CUDA: {ILLEGAL}; compute-sanitizer, put before the command, names the kernel\n"
    fake.broken = CudaError("cuLaunchKernel failed: unspecified launch failure")
    assert "CUDA: cuLaunchKernel failed: unspecified launch failure" in refused(good)
    fake.broken = CudaMemoryError("cuStreamSynchronize failed: out of memory")
    assert "the GPU is out of memory: cuStreamSynchronize failed: out of memory; use smaller shapes" in refused(good)


def test_a_dtype_that_is_not_known(fake: FakeGpu, tmp_path: Path, run: Run) -> None:
    np.savez(tmp_path / "x.npz", x=X)
    path = write_engine(tmp_path / "a.engine", [1.0], dtype="fp8")
    for args in (("run", path, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz"), ("bench", path)):
        refused = run(*args)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "a.engine.json: '" in refused.err
        assert "' is of the dtype fp8, which qpass cannot feed or fetch; it knows float" in refused.err


class Context(Shaped):
    """Copies x to y."""

    def __init__(self) -> None:
        self.address: dict[str, int] = {}
        self.driver = ctypes.CDLL("libcuda.so.1")

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        size = ctypes.c_size_t(4 * int(np.prod(self.shape)))
        to, source = ctypes.c_void_p(self.address["y"]), ctypes.c_void_p(self.address["x"])
        return not self.driver.cuMemcpyDtoDAsync_v2(to, source, size, ctypes.c_void_p(stream))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `tensorrt` whose engines hand their input on."""
    if (why := no_gpu()) is not None:
        pytest.skip(why)
    module: Any = types.ModuleType("tensorrt")

    class Logger:
        Severity = types.SimpleNamespace(ERROR=1)

        def __init__(self) -> None: ...

    loaded = types.SimpleNamespace(create_execution_context=Context)
    module.ILogger = Logger
    module.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda data: loaded)
    module.__spec__ = types.SimpleNamespace()
    module.__version__ = "10.0"
    monkeypatch.setattr(TensorRT, "version", lambda self: "10.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu(engine: Path, stand_in: None, cuda_graph: bool) -> None:
    """Shapes change, buffers grow, graphs are replayed and made again: outputs are of the feeds of their own run."""
    loaded = Engine(engine, cuda_graph)
    rng = np.random.default_rng(0)
    for rows in (2, 2, 2, 8, 8, 1, 2, 8, 1):
        x = rng.normal(size=(rows, 4)).astype(np.float32)
        y = loaded.run({"x": x})["y"]
        assert np.array_equal(y, x)
