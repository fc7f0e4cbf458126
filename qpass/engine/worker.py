"""The process that builds: `python -m qpass.engine.worker`, Jobs on its standard input, one a line, and events on its
standard output. It ends with its input, with its parent, and with a build that fails.

A process of its own, so that TensorRT's crashes and its library search path stay here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import onnx

from qpass import gpu
from qpass.engine import backends, prove
from qpass.engine.backends import Backend
from qpass.engine.job import Built, Job, event
from qpass.errors import QpassError
from qpass.ops import PLUGIN
from qpass.plugins import Library

_PR_SET_PDEATHSIG = 1


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process if it wants to
    sys.stdout = os.fdopen(os.dup(1), "w")  # for events alone
    os.dup2(2, 1)  # what TensorRT prints by itself could end in the middle of a line
    session = None
    for line in sys.stdin:
        job = Job.from_json(line)
        if os.getppid() != job.parent:  # it died before we asked to die with it
            return 1
        try:
            session = session or Session(job.backend)
            built = session.build(job)
        except QpassError as error:
            event("failed", text=str(error))
            return 1
        event("built", **vars(built))
    return 0


def die_with_parent() -> None:
    """End this process when the thread that started it ends, however it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Session:
    """TensorRT, started, for builds one after the other. All that is of one build is released with it.

    Args:
        backend: its name.

    Raises:
        QpassError: it is not installed, or does not start here.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backends.choose(backend)
        self._trt = self._backend.load()
        self._logger = _logger(self._trt)
        self._library: Library | None = None
        try:
            self._builder = self._trt.Builder(self._logger)
        except TypeError:  # of pybind11, which was given none
            raise QpassError("TensorRT does not start on this machine; it wants a CUDA GPU and its driver") from None

    def build(self, job: Job) -> Built:
        """Parse, build, prove and write the engine.

        Raises:
            QpassError: TensorRT refuses the model, or a plugin node did not become a plugin layer.
        """
        began = time.monotonic()
        trt, backend = self._trt, self._backend
        self._logger.verbose = job.verbose
        library = self._plugins(job)
        lowered = backend.lowered(job.model, library, job.precision)
        network = self._builder.create_network(backend.network_flags(trt))
        parser = trt.OnnxParser(network, self._logger)
        _parse(parser, job.model, lowered.model)
        parsed = [_layer_of(network.get_layer(i)) for i in range(network.num_layers)]
        if library is not None and (gone := prove.missing(job.nodes, parsed)):
            raise QpassError(f"not every plugin node became a plugin layer: {_few(gone)}")
        config = _config(trt, self._builder, network, job)
        backend.configure(trt, config, network, lowered)
        if job.capability is not None:
            backend.target(trt, config, job.capability)
        cache = _timing_cache(config, job)
        engine = self._builder.build_serialized_network(network, config)
        if engine is None:
            raise QpassError("TensorRT built no engine")
        data = memoryview(engine)
        checked, layers = _check(trt, backend, self._logger, data, job, parsed)
        with open(job.engine, "r+b") as file:
            file.write(data)
            file.truncate()
        wrote = False
        if cache is not None and job.timing_out is not None:
            Path(job.timing_out).write_bytes(memoryview(cache.serialize()))
            wrote = True
        plugins = list(job.nodes) if library is not None else []
        seconds = time.monotonic() - began
        return Built(trt.__version__, prove.summary(layers), plugins, checked, _tensors(trt, network), seconds, wrote)

    def _plugins(self, job: Job) -> Library | None:
        """The library of a job. It is loaded once; the parent sees to it that there is no other in this process."""
        if job.plugins is None:
            return None
        registry = self._trt.get_plugin_registry()
        if self._library is None:
            if registry.load_library(job.plugins) is None:
                raise QpassError(f"TensorRT could not load the plugins {job.plugins}")
            self._library = Library(Path(job.plugins))
        wanted = PLUGIN["plugin_version"], PLUGIN["plugin_namespace"]
        creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
        there = {c.name for c in creators if (c.plugin_version, c.plugin_namespace) == wanted}
        if gone := sorted(set(job.nodes.values()) - there):
            raise QpassError(f"TensorRT does not find the plugin {', '.join(gone)} in {job.plugins}")
        return self._library


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc] # TensorRT has no type hints
        """Hands messages to the parent, as events. The first of a process gets all of TensorRT's."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.verbose = False

        def log(self, severity: Any, text: str) -> None:
            level = int(severity)
            if level <= int(trt.ILogger.Severity.WARNING) or self.verbose:
                event("log", level=level, text=text)

    return Logger()


def _parse(parser: Any, path: str, lowered: onnx.ModelProto | None) -> None:
    done = parser.parse_from_file(path) if lowered is None else parser.parse(lowered.SerializeToString(), path)
    if not done:
        told = "; ".join(_error_of(parser.get_error(i), lowered) for i in range(min(parser.num_errors, 5)))
        raise QpassError(f"TensorRT cannot parse the model: {told or 'it does not say why'}")


def _error_of(error: Any, lowered: onnx.ModelProto | None) -> str:
    where = error.node_name() if hasattr(error, "node_name") else ""  # 8.6 has a number
    if not where and lowered is not None and 0 <= error.node() < len(lowered.graph.node):
        node = lowered.graph.node[error.node()]
        where = f"{node.name} ({node.op_type})"
    return f"{where or 'the model'}: {error.desc()}"


def _layer_of(layer: Any) -> prove.Layer:
    metadata = str(getattr(layer, "metadata", "") or "")
    origin = metadata.removeprefix("[ONNX Layer: ").removesuffix("]") if metadata.startswith("[ONNX Layer: ") else ""
    return prove.Layer(layer.name, str(layer.type).rpartition(".")[2], origin)


def _config(trt: Any, builder: Any, network: Any, job: Job) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if job.level is not None:
        config.builder_optimization_level = job.level
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt)
    if job.profiles:
        profile = builder.create_optimization_profile()
        shape_tensors = {t.name for t in (network.get_input(i) for i in range(network.num_inputs)) if t.is_shape_tensor}
        for name, p in job.profiles.items():
            if name in shape_tensors:
                raise QpassError(f"the input '{name}' holds a shape; make it a constant of the model")
            profile.set_shape(name, p.min, p.opt, p.max)
        config.add_optimization_profile(profile)
    return config


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # TensorRT has no type hints
        """Tells the parent of the outermost phase's steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                event("step", phase=phase, done=step + 1, total=self._steps[phase])
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            if steps := self._steps.pop(phase, 0):
                event("step", phase=phase, done=steps, total=steps)

    return Monitor()


def _timing_cache(config: Any, job: Job) -> Any:
    """The cache of earlier builds, in the config; None where the backend keeps none."""
    if job.timing_cache is None:
        return None
    known = Path(job.timing_cache)
    content = known.read_bytes() if known.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    if content:  # it will not be overwritten: who knows what it is
        raise QpassError(f"{known} is no timing cache of this TensorRT and GPU; remove it, or name another")
    return None


def _check(
    trt: Any, backend: Backend, logger: Any, engine: memoryview, job: Job, parsed: list[prove.Layer]
) -> tuple[str, list[prove.Layer]]:
    """See the layers of the finished engine: how, and which."""
    loaded = None
    if not backend.needs_gpu and not gpu.capabilities():
        pass  # nothing can be loaded here, and trying writes errors
    else:
        loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is not None:
        layers = prove.inspected(
            loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        )
        if job.plugins is not None and (gone := prove.missing(job.nodes, layers)):
            raise QpassError(f"plugin nodes are not in the finished engine: {_few(gone)}")
        return "inspector", layers
    if job.plugins is not None and (gone := prove.unnamed(job.nodes, bytes(engine))):
        raise QpassError(f"plugin nodes are not in the finished engine: {_few(gone)}")
    return "names", parsed


def _tensors(trt: Any, network: Any) -> list[dict[str, Any]]:
    """Inputs and outputs as the sidecar lists them."""

    def of(t: Any, mode: str) -> dict[str, Any]:
        return {"name": t.name, "mode": mode, "dtype": str(t.dtype).rpartition(".")[2].lower(), "shape": list(t.shape)}

    inputs = [of(network.get_input(i), "input") for i in range(network.num_inputs)]
    return inputs + [of(network.get_output(i), "output") for i in range(network.num_outputs)]


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


if __name__ == "__main__":
    sys.exit(main())
