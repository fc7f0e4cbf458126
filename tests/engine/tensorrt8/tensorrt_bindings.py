"""Plays TensorRT 8.6.1 without a GPU: takes what its parser takes, refuses what it refuses, and builds an engine that
lists the layers, and what it was told, for tests to read. TENSORRT8_DOES says how a build ends, or the name of the
first input where that is one of those.
"""

from __future__ import annotations

import enum
import json
import os
from types import SimpleNamespace
from typing import Any

import onnx

from qpass.plugins import Library

__version__ = "8.6.1"


class _Named(enum.IntEnum):
    pass


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL = range(5)


class BuilderFlag(_Named):
    FP16, INT8, TF32 = 0, 1, 7


class NetworkDefinitionCreationFlag(_Named):
    EXPLICIT_BATCH = 0


class MemoryPoolType(_Named):
    WORKSPACE = 0


class TacticSource(_Named):
    CUBLAS, CUBLAS_LT, CUDNN, EDGE_MASK_CONVOLUTIONS, JIT_CONVOLUTIONS = range(5)


class ProfilingVerbosity(_Named):
    DETAILED = 2


class LayerInformationFormat(_Named):
    JSON = 1


LayerType = enum.Enum("LayerType", ["PLUGIN_V2", "CONSTANT", "SHUFFLE", "OTHER"])
_DTYPES = {
    1: DataType.FLOAT,
    10: DataType.HALF,
    3: DataType.INT8,
    6: DataType.INT32,
    7: DataType.INT32,
    9: DataType.BOOL,
}


class ILogger:
    class Severity(_Named):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None: ...

    def log(self, severity: Severity, text: str) -> None: ...


class _Registry:
    def __init__(self) -> None:
        self.plugin_creator_list: list[Any] = []

    def load_library(self, path: str) -> object:
        if self.plugin_creator_list:
            return None  # as the real one does the second time
        library = Library(__import__("pathlib").Path(path))
        assert library.interface == "IPluginV2DynamicExt", "the process would end here"
        self.plugin_creator_list = [
            SimpleNamespace(name=n, plugin_version=o.version, plugin_namespace=o.namespace)
            for n, o in library.ops.items()
        ]
        return library


_REGISTRY = _Registry()


def get_plugin_registry() -> _Registry:
    return _REGISTRY


class _Tensor:
    is_shape_tensor = False

    def __init__(self, name: str, dtype: DataType = DataType.FLOAT, shape: tuple[int, ...] = ()) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.range: tuple[float, float] | None = None

    def set_dynamic_range(self, low: float, high: float) -> None:
        self.range = low, high


class _Layer:
    metadata = ""

    def __init__(self, node: onnx.NodeProto, tensors: dict[str, _Tensor]) -> None:
        plugin, moves = node.domain == "qpass", node.op_type in ("Reshape", "Transpose")
        self.name = node.name
        self.type = LayerType.PLUGIN_V2 if plugin else LayerType.SHUFFLE if moves else LayerType.OTHER
        self._in = [tensors.setdefault(i, _Tensor(i)) for i in node.input if i]
        self._out = [tensors.setdefault(o, _Tensor(o)) for o in node.output if o]
        self.num_inputs, self.num_outputs = len(self._in), len(self._out)

    def get_input(self, i: int) -> _Tensor:
        return self._in[i]

    def get_output(self, i: int) -> _Tensor:
        return self._out[i]


class _Network:
    living = 0

    def __init__(self) -> None:
        _Network.living += 1
        self.layers: list[_Layer] = []
        self.tensors: dict[str, _Tensor] = {}
        self.inputs: list[_Tensor] = []
        self.outputs: list[_Tensor] = []
        self.attributes: dict[str, dict[str, Any]] = {}

    def __del__(self) -> None:
        _Network.living -= 1

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_layer(self, i: int) -> _Layer:
        return self.layers[i]

    def get_input(self, i: int) -> _Tensor:
        return self.inputs[i]

    def get_output(self, i: int) -> _Tensor:
        return self.outputs[i]


class _Error:
    def __init__(self, node: int, text: str) -> None:
        self._node, self._text = node, text

    def node(self) -> int:
        return self._node

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network = network
        self._errors: list[_Error] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, i: int) -> _Error:
        return self._errors[i]

    def parse(self, data: bytes, path: str) -> bool:
        model = onnx.load_from_string(data)
        versions = {o.domain: o.version for o in model.opset_import}
        assert versions[""] <= 17, "it would read later nodes as if they were older"
        assert not model.functions
        assert all(w.data_type != onnx.TensorProto.INT8 for w in model.graph.initializer), "INT8 weights are refused"
        known = {c.name for c in _REGISTRY.plugin_creator_list}
        n = self._network
        for value in model.graph.input:
            t = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in t.shape.dim)
            n.inputs.append(n.tensors.setdefault(value.name, _Tensor(value.name, _DTYPES[t.elem_type], shape)))
        for i, node in enumerate(model.graph.node):
            if node.op_type == "Hardmax" or (node.domain == "qpass" and node.op_type not in known):
                self._errors.append(_Error(i, "Assertion failed: Plugin not found"))
            n.layers.append(_Layer(node, n.tensors))
        n.outputs = [n.tensors[o.name] for o in model.graph.output]
        plugins = (x for x in model.graph.node if x.domain == "qpass")
        n.attributes = {x.name: {a.name: list(a.ints) or a.i for a in x.attribute} for x in plugins}
        return not self._errors


class _Config:
    profiling_verbosity: Any = None
    builder_optimization_level: int | None = None

    def __init__(self) -> None:
        self.flags: list[str] = ["TF32"]

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.append(flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.remove(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        assert pool == MemoryPoolType.WORKSPACE
        assert size > 0

    def get_tactic_sources(self) -> int:
        return 0b11111

    def set_tactic_sources(self, sources: int) -> None:
        assert sources & 0b11000 == 0b11000, "these need no library"

    def add_optimization_profile(self, profile: Any) -> None: ...

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: content + b".")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return True


_LOGGERS: list[ILogger] = []


class Builder:
    started = 0

    def __init__(self, logger: ILogger) -> None:
        Builder.started += 1
        _LOGGERS.append(logger)
        self._logger = _LOGGERS[0]  # the first gets all

    def create_network(self, flags: int) -> _Network:
        assert flags == 1, "explicit batch"
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda *shape: None)

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        does = os.environ.get("TENSORRT8_DOES", network.inputs[0].name.replace("_", " "))
        for name in network.tensors:
            text = f"Missing scale and zero-point for tensor {name}, expect fall back to non-int8 implementation"
            self._logger.log(ILogger.Severity.WARNING, text)
        self._logger.log(ILogger.Severity.WARNING, "a warning of note")
        self._logger.log(ILogger.Severity.INFO, "a remark")
        if does == "crashes":
            os.write(2, b"terminate called without an active exception\n")
            os.abort()
        if does == "is killed":
            os.kill(os.getpid(), 9)
        if does == "prints":
            os.write(1, b"something without an end")
        if does == "runs out":
            self._logger.log(ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (no further information)")
            return None
        layers = [
            {"Name": x.name, "LayerType": "PluginV2" if x.type == LayerType.PLUGIN_V2 else "Myelin"}
            for x in network.layers
            if not (does == "forgets" and x.type == LayerType.PLUGIN_V2)
        ]
        ranges = {t.name: t.range for t in network.tensors.values() if t.range}
        level = config.builder_optimization_level
        told = {"flags": config.flags, "level": level, "ranges": ranges, "attributes": network.attributes}
        told |= {"pid": os.getpid(), "networks": _Network.living, "builders": Builder.started}
        return json.dumps({"Layers": layers, "told": told}).encode()


class Runtime:
    def __init__(self, logger: ILogger) -> None: ...

    def deserialize_cuda_engine(self, data: memoryview) -> Any:
        text = bytes(data).decode()
        return SimpleNamespace(
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda format: text)
        )
