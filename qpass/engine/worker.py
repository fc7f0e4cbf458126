"""The process that builds: `python -m qpass.engine.worker`, a Job on its standard input, events on its standard output.

A process of its own, so that TensorRT's crashes and its library search path stay here. It dies with its parent.
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
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = Job.from_json(sys.stdin.read())
    if os.getppid() != job.parent:  # it died before we asked to die with it
        return 1
    try:
        built = build(job)
    except QpassError as error:
        event("failed", text=str(error))
        return 1
    event("built", **vars(built))
    return 0


def build(job: Job) -> Built:
    """Parse, build, prove and write the engine.

    Raises:
        QpassError: TensorRT refuses the model, or a plugin node did not become a plugin layer.
    """
    began = time.monotonic()
    backend = backends.choose(job.backend)
    trt = backend.load()
    logger = _logger(trt, job.verbose)
    library = Library(Path(job.plugins)) if job.plugins is not None else None
    if library is not None:
        _load_plugins(trt, library.path, set(job.nodes.values()))
    lowered = backend.lowered(job.model, library, job.precision)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # of pybind11, which was given none
        raise QpassError("TensorRT does not start on this machine; it wants a CUDA GPU and its driver") from None
    network = builder.create_network(backend.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    _parse(parser, job.model, lowered.model)
    parsed = [_layer_of(network.get_layer(i)) for i in range(network.num_layers)]
    if job.plugins is not None and (gone := prove.missing(job.nodes, parsed)):
        raise QpassError(f"not every plugin node became a plugin layer: {_few(gone)}")
    config = _config(trt, builder, network, job)
    backend.configure(trt, config, network, lowered)
    if job.capability is not None:
        backend.target(trt, config, job.capability)
    cache = _timing_cache(config, job)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise QpassError("TensorRT built no engine")
    data = memoryview(engine)
    checked, layers = _check(trt, backend, logger, data, job, parsed)
    with open(job.engine, "r+b") as file:
        file.write(data)
        file.truncate()
    wrote = False
    if cache is not None and job.timing_out is not None:
        Path(job.timing_out).write_bytes(memoryview(cache.serialize()))
        wrote = True
    plugins = list(job.nodes) if job.plugins is not None else []
    seconds = time.monotonic() - began
    return Built(trt.__version__, prove.summary(layers), plugins, checked, _tensors(trt, network), seconds, wrote)


def _load_plugins(trt: Any, library: Path, ops: set[str]) -> None:
    registry = trt.get_plugin_registry()
    if registry.load_library(str(library)) is None:
        raise QpassError(f"TensorRT could not load the plugins {library}")
    wanted = PLUGIN["plugin_version"], PLUGIN["plugin_namespace"]
    creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    there = {c.name for c in creators if (c.plugin_version, c.plugin_namespace) == wanted}
    if gone := sorted(ops - there):
        raise QpassError(f"TensorRT does not find the plugin {', '.join(gone)} in {library}")


def _logger(trt: Any, verbose: bool) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc] # TensorRT has no type hints
        """Hands every message to the parent, as an event."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            level = int(severity)
            if level <= int(trt.ILogger.Severity.WARNING) or verbose:
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
