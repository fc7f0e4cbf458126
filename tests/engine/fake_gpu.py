"""A GPU whose clock is a number, and a TensorRT whose engines take the time that their files say.

What is asked of them is in `FakeGpu.log`, so a test can see what ran, in what order, and when.
"""

from __future__ import annotations

import json
import types
import weakref
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from qpass.engine import sidecar
from qpass.engine.bench import Method

MEMSET_US, COPY_US = 40.0, 3.0
L2 = 1 << 20
VERSION = "10.0"


class CudaError(Exception):
    """Stands for pycuda.driver.Error."""


class CudaMemoryError(CudaError):
    """Stands for pycuda.driver.MemoryError."""


class FakeGpu:
    """What qpass uses of pycuda.driver.

    `now` is its clock in µs, `log` what was done, `free` the bytes left, `broken` what it answers once a kernel failed.
    """

    Error, MemoryError = CudaError, CudaMemoryError
    device_attribute = types.SimpleNamespace(L2_CACHE_SIZE="l2")

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.free = 8 << 30
        self.capability = (8, 9)
        self.capturing = False
        self.captures = True
        self.broken: Exception | None = None
        gpu = self

        class Stream:
            handle = 7

            def synchronize(self) -> None:
                gpu.check()

        class Event:
            def record(self, stream: Stream) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                gpu.check()

            def time_till(self, end: Event) -> float:
                return (end.at - self.at) * 1e-3

        class Allocation:
            def __init__(self, size: int) -> None:
                if size > gpu.free:
                    raise CudaMemoryError("out of memory")
                gpu.free -= size
                self.size = size

            def __int__(self) -> int:
                return id(self)

            def __del__(self) -> None:
                gpu.free += getattr(self, "size", 0)

        class Graph:
            def __init__(self, work: Callable[[Any], None]) -> None:
                from qpass.errors import QpassError

                if not gpu.captures:
                    raise QpassError("CUDA graphs: cuStreamEndCapture failed with error 901")
                self.stream, self._work = Stream(), work
                gpu.capturing = True
                work(self.stream)
                gpu.capturing = False

            def launch(self) -> None:
                gpu.log.append("graph")
                self._work(self.stream)

        self.Stream, self.Event, self.mem_alloc, self.Graph = Stream, Event, Allocation, Graph
        self.Context = types.SimpleNamespace(synchronize=self.check)

    def check(self) -> None:
        """Raise what has failed before, as CUDA does from then on."""
        if self.broken is not None:
            raise self.broken

    def done(self, what: str, us: float) -> None:
        self.log.append(what)
        self.now += us

    def memset_d8_async(self, address: int, value: int, size: int, stream: Any) -> None:
        self.done(f"memset {size}", MEMSET_US)

    def memcpy_htod(self, address: int, array: Any) -> None:
        self.check()
        self.done("copy", COPY_US)

    def memcpy_htod_async(self, address: int, array: Any, stream: Any) -> None:
        self.done("copy", COPY_US)

    memcpy_dtoh_async = memcpy_htod_async

    def pagelocked_empty(self, size: int, dtype: Any) -> Any:
        return np.empty(size, dtype)

    def mem_get_info(self) -> tuple[int, int]:
        return self.free, 8 << 30

    def get_driver_version(self) -> int:
        return 13000

    def Device(self, number: int) -> Any:
        return types.SimpleNamespace(
            name=lambda: "Fake GPU",
            compute_capability=lambda: self.capability,
            multiprocessor_count=100,
            total_memory=lambda: 8 << 30,
            get_attribute={"l2": L2}.__getitem__,
            pci_bus_id=lambda: "0000:01:00.0",
        )


class Shaped:
    """What contexts have in common: outputs of the input's shape."""

    shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape


class Context(Shaped):
    """Of an engine whose file is JSON: `us`, what its executions take, one after the other and again from the start;
    `layers`, their names and shares."""

    def __init__(self, gpu: FakeGpu, told: dict[str, Any]) -> None:
        self._gpu, self._told = gpu, told
        self._times: Iterator[float] = cycle(told["us"])
        self._executions = 0
        self.profiler: Any = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not self._gpu.capturing:
            us = next(self._times)
            self._gpu.done(self._told["name"], us)
            if self.profiler is not None:
                for name, share in self._told["layers"].items():
                    self.profiler.report_layer_time(name, us * share * 1e-3)
        ill = self._executions >= self._told.get("after", 0)
        self._executions += 1
        if "breaks" in self._told and ill:
            self._gpu.broken = CudaError(self._told["breaks"])
        return not (self._told.get("fails") and ill)


def tensorrt(gpu: FakeGpu) -> Any:
    """A module `tensorrt` of such engines. Loading one takes the memory that its file says."""
    module: Any = types.ModuleType("tensorrt")
    libraries: list[str] = []

    class Logger:
        Severity = types.SimpleNamespace(ERROR=1)

    def loaded(data: bytes) -> Any:
        told = json.loads(data)
        if gpu.free < told["memory"]:
            return None
        gpu.free -= told["memory"]
        layers = [{"Name": n, "LayerType": "PluginV3", "Metadata": f"[ONNX Layer: {o}]"} for n, o in told["of"].items()]
        inspector = types.SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": layers}))
        return types.SimpleNamespace(
            create_execution_context=lambda: Context(gpu, told),
            create_engine_inspector=lambda: inspector,
            device_memory_size_v2=told["memory"] // 4,
        )

    first: list[weakref.ref[Any]] = []

    def runtime(logger: Any) -> Any:
        first[:] = first or [weakref.ref(logger)]
        if first[0]() is None:
            raise SystemError("segmentation fault: TensorRT calls the first logger it was given, which is gone")

        def deserialize(data: bytes) -> Any:
            found = loaded(data)
            if found is None:
                logger.log(1, "Requested size was 12 bytes: Cuda Runtime (out of memory)")
            return found

        return types.SimpleNamespace(deserialize_cuda_engine=deserialize)

    def load_library(path: str) -> str | None:
        libraries.append(path)
        return path if len(libraries) == 1 else None  # as TensorRT does

    module.ILogger, module.IProfiler, module.Runtime = Logger, type("IProfiler", (), {}), runtime
    module.LayerInformationFormat = types.SimpleNamespace(JSON=1)
    module.get_plugin_registry = lambda: types.SimpleNamespace(load_library=load_library)
    module.__spec__ = types.SimpleNamespace()
    module.__version__ = VERSION
    return module


def write_engine(
    path: Path,
    us: list[float],
    *,
    memory: int = 1 << 20,
    dtype: str = "float",
    plugins: dict[str, str] | None = None,
    layers: dict[str, float] | None = None,
    library: Path | None = None,
    fails: bool = False,
    breaks: str | None = None,
    after: int = 0,
    **changes: Any,
) -> Path:
    """An engine's two files.

    Args:
        us: what its executions take.
        memory: bytes that it takes on the GPU.
        dtype: of its one input, x of up to 8 rows of 4, and its output y.
        plugins: plugin node → op.
        layers: what TensorRT calls its layers → their share of the time.
        fails: TensorRT refuses to run it.
        breaks: what CUDA says once it has run, and to everything after that.
        after: so many executions go well before it fails or breaks.
        changes: keys of the sidecar.
    """
    told = {"name": path.stem, "us": us, "memory": memory, "layers": layers or {}, "fails": fails, "of": {}}
    told |= {"after": after} | ({"breaks": breaks} if breaks is not None else {})
    path.write_text(json.dumps(told))
    facts = {
        "version": 1,
        "backend": {"name": "tensorrt", "version": VERSION},
        "engine": {"sha256": sidecar.digest(path)},
        "plugins": None if library is None else {"path": str(library), "sha256": sidecar.digest(library)},
        "profiles": {"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}},
        "tensors": [
            {"name": "x", "mode": "input", "dtype": dtype, "shape": [-1, 4]},
            {"name": "y", "mode": "output", "dtype": dtype, "shape": [-1, 4]},
        ],
        "dims": {"x": ["batch", 4]},
        "plugin_layers": plugins or {},
        "seconds": 1.5,
    }
    sidecar.of(path).write_text(json.dumps(facts | changes))
    return path


def quick(runs: int = 1, **changes: Any) -> Method:
    """Without warm-up."""
    return Method(runs, warm_up_seconds=0.0, warm_up_runs=0, **changes)
