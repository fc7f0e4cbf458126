"""ONNX Runtime: the one place that makes its sessions and understands its errors.

A model is run for tensors of it, inner ones too, that are asked for in groups. Each group is computed by a
session of its own that holds just the nodes which earlier groups did not need; what later ones need is handed
on. So all activations of a big model can be looked at without holding more than a group of them at a time,
and no node runs twice. The model's files are only read: a session gets its nodes from memory and its weights
from where they are.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from qpass.errors import QpassError
from qpass.graph.dtypes import to_numpy
from qpass.graph.load import Weights, read, tensors

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Input:
    """An input of a model. `shape` has an int, a symbol or None a dim, and is None where the rank is unknown.

    `optional` ones have a default.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    optional: bool = False

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.shape or ())
        return f"'{self.name}' {self.dtype}" + ("" if self.shape is None else f"[{dims}]")


#: Bytes of fp32 weights that kernels may copy into the layout they like best. Of more than that the copies cost
#: memory and time to make, while what is mapped from a file counts as cache: 2.3 GB of weights take 0.5 GB
#: instead of 2.5, for a sixth more work a run.
PACKED = 1 << 30


def load(path: Path) -> ModelProto:
    """The model, its large weights left on disk. Raises QpassError for whatever is wrong with its files."""
    proto, _ = read(path)
    weights = Weights(path)
    for tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            weights.of(tensor)
    return proto


def inputs_of(proto: ModelProto) -> dict[str, Input]:
    """What a model is fed, by name. bfloat16 inputs are fed as fp32, see `Runner`."""
    defaults = {t.name for t in proto.graph.initializer}
    found = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        if value.type.WhichOneof("value") != "tensor_type":
            raise QpassError(f"input '{value.name}' is no tensor; qpass runs models with tensor inputs only")
        dtype = to_numpy(tensor.elem_type)
        if dtype.name == "bfloat16":
            dtype = np.dtype(np.float32)
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
        found[value.name] = Input(value.name, dtype, shape, value.name in defaults)
    return found


class Runner:
    """Runs a model for groups of its tensors.

    Args:
        path: the model's file; its weights and its name in messages.
        proto: the model as `load` gives it; not changed.
        groups: names of tensors, a group after the other; graph outputs, inputs and inner tensors alike.
            Cheapest in the order of the graph. None for one group of the graph's outputs.
        optimize: let ONNX Runtime rewrite the graph as it likes. Otherwise it keeps to what leaves the
            numbers as the nodes say.

    A model that computes in bfloat16 is computed in fp32, on its bfloat16 weights: ONNX Runtime has next to
    no bfloat16 kernels for the CPU.

    Raises QpassError where ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        path: Path,
        proto: ModelProto,
        groups: Sequence[Sequence[str]] | None = None,
        *,
        optimize: bool = True,
    ) -> None:
        self.path = path
        self.inputs = inputs_of(proto)
        self.groups = [tuple(g) for g in groups] if groups else [tuple(o.name for o in proto.graph.output)]
        self._mapped = _fp32_bytes(proto) > PACKED
        self._pieces = _cut(proto, self.groups)
        home, moved = _home(path, proto)
        upcast = _uses_bfloat16(proto)
        types = {v.name: v.type for v in proto.graph.input}
        self._sessions: list[Any] = []
        for piece in self._pieces:
            if not piece.nodes and not piece.outputs:
                self._sessions.append(None)
                continue
            model = _model(proto, piece, types)
            for tensor in tensors(model):
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = moved[entry.value]
            if upcast:
                _to_fp32(model)
            session = self._session(model, home, optimize)
            types |= {o.name: _type(o.type, o.shape) for o in session.get_outputs()}
            self._sessions.append(session)

    def run(self, feeds: Feeds, sample: str = "the inputs") -> Iterator[dict[str, Array]]:
        """Run on one set of inputs: the tensors of each group by name, a group after the other.

        The arrays are views of ONNX Runtime's memory, to be let go before the next group is asked for.
        `sample` names the inputs in messages. Raises QpassError where the model cannot run on them.
        """
        import onnxruntime as ort

        fed = {name: np.asarray(value, order="C") for name, value in feeds.items() if name in self.inputs}
        with _explained(f"{self.path}: cannot run on {sample}"):
            alive = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in fed.items()}
        for piece, session, group in zip(self._pieces, self._sessions, self.groups, strict=True):
            if session is not None:
                wanted = {name: alive[name] for name in piece.inputs if name in alive}
                with _explained(f"{self.path}: cannot run on {sample}"):
                    values = session.run_with_ort_values(piece.outputs, wanted)
                alive.update(zip(piece.outputs, values, strict=True))
                del values, wanted
            # a view of an input's OrtValue would not keep the memory of that input alive
            found = {n: fed[n] if n in fed else alive[n].numpy() for n in group if alive[n].is_tensor()}
            for name in piece.last:
                alive.pop(name, None)
            yield found
            del found

    def _session(self, model: ModelProto, home: Path, optimize: bool) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and said once
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(home))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others work in between
        if len(self.groups) > 1:
            # An arena keeps what it once needed; those of many sessions together would hold every activation.
            options.enable_cpu_mem_arena = False
        if self._mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        with _explained(f"ONNX Runtime {ort.__version__} cannot load {self.path}"):
            return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what ONNX Runtime raises, which is all kinds of Exception, into a QpassError of one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        for pattern, better in _NOISE:
            text = re.sub(pattern, better, text)
        if "Failed to allocate" in text or isinstance(error, MemoryError):
            text += "; use smaller batches or shorter samples"
        raise QpassError(f"{what}: {text[:500]}") from error


_NOISE = (
    (r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", ""),
    (r"Non-zero status code .*? running (\S+) node\. Name:'([^']*)' Status Message: ", r"\1 '\2': "),
    (r"\S*/onnxruntime/\S+ ", ""),  # where in its sources
)


# -- cutting a graph into pieces


@dataclass(frozen=True)
class _Piece:
    """Nodes that one session runs.

    `outputs` are what the group or later pieces need, `last` what nothing needs any more after this piece.
    """

    nodes: list[NodeProto]
    inputs: list[str]
    outputs: list[str]
    last: list[str]


def reads(node: NodeProto) -> Iterator[str]:
    """Names of the tensors a node reads, in its subgraphs too (with names that are defined there)."""
    yield from (name for name in node.input if name)
    for graph in _subgraphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from reads(inner)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def descendants(graph: GraphProto, roots: Iterable[str]) -> set[str]:
    """Names of everything that is computed from the values of some tensors, these included.

    What depends on nothing but their shapes is not: exporters take a batch size from any input.
    """
    found = set(roots)
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and not found.isdisjoint(reads(node)):
            found.update(node.output)
    return found


def _cut(proto: ModelProto, groups: Sequence[Sequence[str]]) -> list[_Piece]:
    """One piece a group: the nodes that it needs and earlier groups did not."""
    graph = proto.graph
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    constants = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    fed = {v.name for v in graph.input}
    constants -= fed
    known = maker.keys() | constants | fed
    pieces: list[list[int]] = []
    placed: set[int] = set()
    for group in groups:
        if unknown := [name for name in group if name not in known]:
            raise ValueError(f"the graph has no tensor '{unknown[0]}'")
        here: set[int] = set()
        todo = [maker[name] for name in group if name in maker]
        while todo:
            i = todo.pop()
            if i not in here and i not in placed:
                here.add(i)
                todo += (maker[name] for name in reads(graph.node[i]) if name in maker)
        placed |= here
        pieces.append(sorted(here))

    last: dict[str, int] = {}  # tensor → the last piece that needs it
    for p, (piece, group) in enumerate(zip(pieces, groups, strict=True)):
        last |= dict.fromkeys(group, p) | dict.fromkeys((n for i in piece for n in reads(graph.node[i])), p)
    result = []
    for p, (piece, group) in enumerate(zip(pieces, groups, strict=True)):
        asked = set(group)
        made = dict.fromkeys(name for i in piece for name in graph.node[i].output if name)
        needed = dict.fromkeys(n for i in piece for n in reads(graph.node[i]))
        result.append(
            _Piece(
                nodes=[graph.node[i] for i in piece],
                inputs=[n for n in needed if n in fed or (n in maker and n not in made)],
                outputs=[n for n in made if n in asked or last.get(n, -1) > p]
                + [n for n in dict.fromkeys(group) if n in constants],
                last=[n for n, q in last.items() if q == p],
            )
        )
    return result


def _model(proto: ModelProto, piece: _Piece, types: Mapping[str, TypeProto]) -> ModelProto:
    """A model of one piece; what it does not need of the initializers is left out."""
    model = ModelProto(ir_version=proto.ir_version)
    model.opset_import.extend(proto.opset_import)
    model.functions.extend(proto.functions)
    model.graph.name = proto.graph.name or "qpass"
    model.graph.node.extend(piece.nodes)
    model.graph.input.extend(ValueInfoProto(name=name, type=types[name]) for name in piece.inputs)
    model.graph.output.extend(ValueInfoProto(name=name) for name in piece.outputs)  # types are inferred
    needed = {name for node in piece.nodes for name in reads(node)} | set(piece.outputs)
    graph = proto.graph
    model.graph.initializer.extend(t for t in graph.initializer if t.name in needed)
    model.graph.sparse_initializer.extend(t for t in graph.sparse_initializer if t.values.name in needed)
    return model


def _type(text: str, shape: Sequence[int | str | None]) -> TypeProto:
    """The type that ONNX Runtime writes as "tensor(float)" or "seq(tensor(int64))"."""
    kind, _, inner = text.partition("(")
    inner = inner[:-1]
    if kind == "seq":
        return helper.make_sequence_type_proto(_type(inner, ()))
    if kind == "optional":
        return helper.make_optional_type_proto(_type(inner, ()))
    element = TensorProto.DataType.Value({"float": "FLOAT"}.get(inner, inner.upper()))
    return helper.make_tensor_type_proto(element, list(shape) or None)  # [] may also be an unknown rank


def _fp32_bytes(proto: ModelProto) -> int:
    return sum(4 * math.prod(t.dims) for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT)


def _home(path: Path, proto: ModelProto) -> tuple[Path, dict[str, str]]:
    """A folder that holds all data files, and where in it each location of the model leads.

    The model's own folder, unless links lead out of it (a Hugging Face cache), which ONNX Runtime refuses.
    """
    locations = {e.value for t in tensors(proto) for e in t.external_data if e.key == "location"}
    real = {location: Path(os.path.realpath(path.parent / location)) for location in locations}
    home = Path(os.path.realpath(path.parent))
    if not all(file.is_relative_to(home) for file in real.values()):
        home = Path(os.path.commonpath([file.parent for file in real.values()]))
    return home, {location: file.relative_to(home).as_posix() for location, file in real.items()}


# -- bfloat16

_BF16, _FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT


def _uses_bfloat16(proto: ModelProto) -> bool:
    inputs = any(v.type.tensor_type.elem_type == _BF16 for v in proto.graph.input)
    return inputs or any(t.data_type == _BF16 for t in tensors(proto))


def _to_fp32(model: ModelProto) -> None:
    """Let a model compute in fp32 what it computes in bfloat16; its weights are cast as they are read."""
    _graph_to_fp32(model.graph)
    for function in model.functions:
        for node in function.node:
            _node_to_fp32(node)


def _graph_to_fp32(graph: GraphProto) -> None:
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == _BF16:
            casts.append(helper.make_node("Cast", [f"{tensor.name}/bfloat16"], [tensor.name], to=_FP32))
            tensor.name = f"{tensor.name}/bfloat16"
    for node in graph.node:
        _node_to_fp32(node)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == _BF16:
            value.type.tensor_type.elem_type = _FP32


def _node_to_fp32(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.INT and attribute.i == _BF16 and attribute.name in _DTYPES:
            attribute.i = _FP32
        elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type == _BF16:
            values = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(values, attribute.t.name))
    for graph in _subgraphs(node):
        _graph_to_fp32(graph)


#: Attributes that hold a data type.
_DTYPES = frozenset({"to", "dtype", "output_dtype", "output_type", "stash_type", "softmax_precision"})
