"""Run an engine through pycuda: buffers kept, host memory pinned, one stream, and a CUDA graph a shape if asked for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qpass import gpu, plugins
from qpass.engine import backends, prove, sidecar
from qpass.errors import QpassError
from qpass.plugins import runs_on

Array = NDArray[Any]

_DTYPES = {
    "float": np.dtype(np.float32),
    "half": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
}


class Engine:
    """An engine that `qpass build` wrote, with its sidecar; loaded onto the GPU when it is first run.

    Args:
        cuda_graph: capture what the engine does at a shape, once, and replay it.
        library: the plugins; by default those that it was built with, or where these are gone `qpass.plugins.find()`.

    Raises:
        QpassError: a file is missing or is not the sidecar's.
    """

    def __init__(self, path: str | Path, cuda_graph: bool = False, library: str | Path | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise QpassError(f"{self.path}: no such engine; build one with `qpass build`")
        self.facts = sidecar.read(self.path)
        self._cuda_graph = cuda_graph
        self.library = library
        self._session: Session | None = None

    @property
    def inputs(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of every input, −1 for a dynamic dim."""
        return self._tensors("input")

    @property
    def outputs(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        return self._tensors("output")

    def _tensors(self, mode: str) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        mine = [t for t in self.facts["tensors"] if t["mode"] == mode]
        for t in mine:
            if t["dtype"] not in _DTYPES:
                raise QpassError(
                    f"{sidecar.of(self.path)}: '{t['name']}' is of the dtype {t['dtype']}, which qpass cannot feed or "
                    f"fetch; it knows {', '.join(_DTYPES)}: cast it to one of them in the model, and build that"
                )
        return {t["name"]: (_DTYPES[t["dtype"]], tuple(t["shape"])) for t in mine}

    def check(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The feeds, contiguous, if they are what the engine takes.

        Raises:
            QpassError: a name, dtype or shape is not.
        """
        wanted = self.inputs
        if missing := sorted(wanted.keys() - feeds.keys()):
            raise QpassError(f"{self.path.name} needs its input '{missing[0]}'; it has {', '.join(wanted)}")
        if unknown := sorted(feeds.keys() - wanted.keys()):
            raise QpassError(f"{self.path.name} has no input '{unknown[0]}'; it has {', '.join(wanted)}")
        checked = {}
        for name, (dtype, shape) in wanted.items():
            x = np.asarray(feeds[name])
            if dtype == ml_dtypes.bfloat16:  # .npz files have no bfloat16: two bytes without a name, or float32
                x = x.view(dtype) if x.dtype == np.dtype("V2") else x.astype(dtype) if x.dtype == np.float32 else x
            if x.dtype == np.int64 and dtype == np.int32:  # as TensorRT 8.6 takes a model's int64
                limits = np.iinfo(dtype)
                if x.size and (x.min() < limits.min or x.max() > limits.max):
                    raise QpassError(f"the input '{name}' has numbers beyond int32, which the engine takes")
                x = x.astype(dtype)
            if x.dtype != dtype:
                raise QpassError(f"the input '{name}' is {x.dtype}, wants {dtype}")
            profile = self.facts["profiles"].get(name, {"min": shape, "max": shape})
            low, high = profile["min"], profile["max"]
            if len(low) != x.ndim or not all(a <= d <= b for a, d, b in zip(low, x.shape, high, strict=True)):
                span = f"from {list(low)} to {list(high)}" if low != high else str(list(low))
                raise QpassError(f"the input '{name}' has shape {list(x.shape)}, the engine was built for {span}")
            checked[name] = np.ascontiguousarray(x)
        return checked

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs.

        Args:
            feeds: every input by name, of the engine's dtypes and within its profile's shapes.

        Raises:
            QpassError: the feeds do not fit, there is no usable GPU, or CUDA or TensorRT failed.
        """
        checked = self.check(feeds)
        return self.load().run(checked, self._cuda_graph)

    def load(self) -> Session:
        """Put it onto the GPU, once.

        Raises:
            QpassError: there is no usable GPU, or TensorRT refuses the engine or has no memory for it.
        """
        if self._session is None:
            with gpu.explained():
                self._session = Session(self)
        return self._session


class _Buffers:
    """Device memory and pinned host memory of one tensor; grows, never shrinks."""

    def __init__(self) -> None:
        self.device: gpu.Buffer | None = None
        self.host: Any = None

    def hold(self, size: int) -> gpu.Buffer:
        if self.device is None or self.device.size < size:
            self.device = gpu.Buffer(size)
            self.host = gpu.driver().pagelocked_empty(max(size, 1), np.uint8)
        return self.device

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """The host memory as an array."""
        view: Array = self.host[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return view


def _library(built_with: Mapping[str, Any], named: str | Path | None, interface: str) -> Path:
    """The plugin library to load: the one named, else that of the build, else this machine's."""
    there = Path(built_with["path"])
    if named is None and there.is_file() and sidecar.digest(there) == built_with["sha256"]:
        return there
    here = gpu.capability()
    found = plugins.find(named, here, interface)
    if not runs_on(found.architectures, here):
        made = ", ".join(found.architectures)
        raise QpassError(f"{found.path} is compiled for {made}, not for this GPU's {here}: `qpass plugins build`")
    return found.path


_LOGGERS: dict[str, Any] = {}
"""By backend the logger of this process. TensorRT keeps the first that it is given, and calls it for whatever comes
later, also when what it was given with is gone: it must never go."""


def logger_of(trt: Any, backend: str) -> Any:
    """The logger of a backend; its `said` holds the last errors, of whichever engine is at work."""
    if backend in _LOGGERS:
        return _LOGGERS[backend]

    class Logger(trt.ILogger):  # type: ignore[misc] # TensorRT has no type hints
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.said.append(" ".join(text.split()))

    return _LOGGERS.setdefault(backend, Logger())


_REGISTERED: dict[str, Path] = {}
"""By backend the plugin library that TensorRT was given in this process: it takes plugins of a name only once."""


def _register(trt: Any, backend: str, library: Path, said: Iterable[str]) -> None:
    """Make TensorRT know the plugins of a library."""
    there = _REGISTERED.get(backend)
    if there is None:
        if trt.get_plugin_registry().load_library(str(library)) is None:
            raise QpassError(f"TensorRT could not load the plugins {library}: {'; '.join(said)}")
        _REGISTERED[backend] = library
    elif there != library and sidecar.digest(there) != sidecar.digest(library):
        raise QpassError(
            f"the plugins {there} are loaded, and TensorRT does not take those of {library} too; "
            "name one library for all engines with --plugins, or run them one at a time"
        )


class Session:
    """A loaded engine with its context. Feeds are what `Engine.check` gives; `library` are its plugins, if any.

    Raises:
        QpassError: CUDA or TensorRT failed, in any of the methods.
    """

    def __init__(self, engine: Engine) -> None:
        facts = engine.facts
        self._engine = engine
        self._cuda = gpu.driver()
        backend = backends.choose(facts["backend"]["name"])
        backend.preload()
        built_by = facts["backend"].get("version", "")
        self._trt = trt = backend.load()
        if built_by != trt.__version__:
            here = f"{backend.name} {trt.__version__}"
            raise QpassError(f"{engine.path.name} was built by {built_by}, {here} is installed; build it again")
        self._logger = logger_of(trt, backend.name)
        self._said = said = self._logger.said
        said.clear()
        self.library: Path | None = None
        if facts["plugins"] is not None:
            self.library = _library(facts["plugins"], engine.library, backend.interface)
            _register(trt, backend.name, self.library, said)
        self._runtime = trt.Runtime(self._logger)
        self._loaded = self._runtime.deserialize_cuda_engine(engine.path.read_bytes())
        if self._loaded is None:
            raise QpassError(f"{engine.path} cannot be loaded on this GPU: {'; '.join(said)}")
        self._context = self._loaded.create_execution_context()
        if self._context is None:
            raise QpassError(f"{engine.path} cannot be run on this GPU: {self._words()}")
        self._stream = self._cuda.Stream()
        self._buffers = {name: _Buffers() for name in (*engine.inputs, *engine.outputs)}
        self._graphs: dict[tuple[tuple[int, ...], ...], gpu.Graph] = {}

    @gpu.explained()
    def run(self, feeds: Mapping[str, Array], cuda_graph: bool) -> dict[str, Array]:
        results = self._place(feeds)
        for name, x in feeds.items():
            self._buffers[name].view(x.dtype, x.shape)[...] = x
        key = tuple(x.shape for x in feeds.values())
        if cuda_graph and key in self._graphs:
            graph = self._graphs[key]
            graph.launch()
            graph.stream.synchronize()
        else:
            self._work(feeds, results, self._stream)
            self._stream.synchronize()
            if cuda_graph:  # TensorRT wants one run at a shape before it is captured
                self._graphs[key] = gpu.Graph(partial(self._work, feeds, results))
        return {n: self._buffers[n].view(d, s).copy() for n, (d, s) in results.items()}

    @gpu.explained()
    def prepare(self, feeds: Mapping[str, Array]) -> Callable[[Any], None]:
        """Put the inputs on the GPU. What is returned enqueues the engine, and no copies, on a pycuda stream; it may be
        called until the next `prepare` or `run`."""
        self._place(feeds)
        for name, x in feeds.items():
            self._buffers[name].hold(x.nbytes).upload(x)
        return self._execute

    @property
    def activation_bytes(self) -> int:
        """Device memory that the engine asks for beside its weights, at its largest shapes."""
        newer = getattr(self._loaded, "device_memory_size_v2", None)  # the other one is deprecated where this is
        return int(self._loaded.device_memory_size if newer is None else newer)

    def layers(self) -> list[prove.Layer]:
        """The layers of the finished engine."""
        inspector = self._loaded.create_engine_inspector()
        return prove.inspected(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def report_layers(self, report: Callable[[str, float], None]) -> None:
        """Have TensorRT tell, from now on, the name and milliseconds of each layer of each execution."""

        class Profiler(self._trt.IProfiler):  # type: ignore[misc, name-defined] # TensorRT has no type hints
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                report(layer_name, ms)

        self._context.profiler = Profiler()

    def _place(self, feeds: Mapping[str, Array]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Set shapes and addresses; the outputs' dtypes and shapes."""
        self._said.clear()
        for name, x in feeds.items():
            if not self._context.set_input_shape(name, x.shape):
                raise QpassError(f"TensorRT refuses the shape {list(x.shape)} of '{name}': {self._words()}")
        if unknown := self._context.infer_shapes():
            raise QpassError(f"the shape of '{unknown[0]}' is not known from the inputs' shapes")
        results = {n: (d, tuple(self._context.get_tensor_shape(n))) for n, (d, _) in self._engine.outputs.items()}
        moved = False
        for name, (dtype, shape) in {**{n: (x.dtype, x.shape) for n, x in feeds.items()}, **results}.items():
            before = self._buffers[name].device
            buffer = self._buffers[name].hold(math.prod(shape) * dtype.itemsize)
            moved |= buffer is not before
            self._context.set_tensor_address(name, buffer.address)
        if moved:
            self._graphs.clear()  # they hold the old addresses
        return results

    def _words(self) -> str:
        """The last that TensorRT said."""
        return "; ".join(self._said) or "TensorRT does not say why"

    def _work(
        self, feeds: Mapping[str, Array], results: Mapping[str, tuple[Any, tuple[int, ...]]], stream: Any
    ) -> None:
        """Enqueue copies in, the engine, copies out."""
        for name, x in feeds.items():
            buffers = self._buffers[name]
            if x.nbytes and buffers.device is not None:
                self._cuda.memcpy_htod_async(buffers.device.address, buffers.host[: x.nbytes], stream)
        self._execute(stream)
        for name, (dtype, shape) in results.items():
            buffers, size = self._buffers[name], math.prod(shape) * dtype.itemsize
            if size and buffers.device is not None:
                self._cuda.memcpy_dtoh_async(buffers.host[:size], buffers.device.address, stream)

    def _execute(self, stream: Any) -> None:
        """Enqueue the engine."""
        if not self._context.execute_async_v3(stream.handle):
            raise QpassError(f"{self._engine.path.name} failed: {self._words()}")
