"""From a file to a proto whose weights stay where they are. Everything that is wrong with a file is said here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # ships no hints
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from qpass.errors import QpassError
from qpass.graph.dtypes import file_bytes, to_numpy
from qpass.graph.lazy import Kept, Lazy
from qpass.graph.stored import FileSource, Stored
from qpass.graph.wire import WireError, read_model

OLDEST_OPSET = 13


def read(path: Path) -> tuple[ModelProto, dict[str, TensorProto]]:
    """The model proto, with large weights left on disk, and the headers of those that lie inside the file, by
    name.

    In the proto those are external data in the file itself, so there is one way to read weights; the header
    is the tensor as it was, less its raw data. Raises QpassError.
    """
    if path.exists() and not path.is_dir() and not path.is_file():
        raise QpassError(f"{path} is no regular file; write the model to a file first")
    try:
        proto, ranges = read_model(path)
    except FileNotFoundError:
        raise QpassError(f"no such file: {path}") from None
    except IsADirectoryError:
        models = sorted(path.glob("*.onnx"))
        hint = f"; did you mean {models[0]}?" if models else "; give the .onnx file in it"
        raise QpassError(f"{path} is a folder{hint}") from None
    except OSError as error:
        raise QpassError(f"cannot read {path}: {error.strerror}") from error
    except (WireError, DecodeError) as error:
        raise QpassError(f"{path} {_diagnose(path, error)}") from None
    if not proto.HasField("graph") or not proto.ir_version:
        raise QpassError(f"{path} {_diagnose(path, None)}")
    _check_versions(path, proto)

    inside: dict[str, TensorProto] = {}
    for index, (offset, length) in ranges.items():
        tensor = proto.graph.initializer[index]
        if not is_external(tensor):
            inside[tensor.name] = header = TensorProto()
            header.CopyFrom(tensor)
            point(tensor, path.name, offset, length)
    return proto, inside


def point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor without data external data at a place."""
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _diagnose(path: Path, error: Exception | None) -> str:
    """What a file is that does not parse as a model."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip archive, not an ONNX model; unpack it, or export a checkpoint with torch.onnx.export"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself; run `git lfs pull`"
    if head[:1] == b"\x08" and len(head) > 2 and head[1] < 0x40:  # ir_version: where every model begins
        detail = f" ({error})" if isinstance(error, WireError) else ""
        return f"is truncated or damaged{detail}; copy or export it again"
    return "is not an ONNX model; export one with torch.onnx.export or optimum-cli"


def _check_versions(path: Path, proto: ModelProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    if proto.ir_version > onnx.IR_VERSION:
        raise QpassError(
            f"{path} has ir_version {proto.ir_version}, but the installed onnx {onnx.__version__} knows "
            f"up to {onnx.IR_VERSION}; upgrade with `pip install -U onnx`"
        )
    opset = default_opset(proto)
    if opset is None:
        raise QpassError(f"{path} imports no opset of the default domain; export it with opset {OLDEST_OPSET} orup")
    if opset < OLDEST_OPSET:
        raise QpassError(
            f"{path} has opset {opset}, older than {OLDEST_OPSET}; export it again, or convert it "
            f"with onnx.version_converter.convert_version(model, {OLDEST_OPSET})"
        )
    if opset > newest:
        raise QpassError(
            f"{path} has opset {opset}, but the installed onnx {onnx.__version__} knows up to {newest}; "
            "upgrade with `pip install -U onnx`"
        )


def default_opset(proto: ModelProto | FunctionProto) -> int | None:
    """The version of the default domain ("" or its alias "ai.onnx")."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor of a model: initializers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.TENSORS:
                yield from attribute.tensors
            elif attribute.type == AttributeProto.GRAPH:
                yield from _graph_tensors(attribute.g)
            elif attribute.type == AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    yield from _graph_tensors(graph)


class Weights:
    """Finds the values of a model's tensors; each data file is opened once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, FileSource] = {}

    def of(self, tensor: TensorProto) -> Lazy:
        """The values of a tensor. Raises QpassError where its external data is missing, short or out of bounds."""
        where = f"{self.path}: tensor '{tensor.name}'"
        try:
            dtype = to_numpy(tensor.data_type)
        except ValueError as error:
            raise QpassError(f"{where} has an {error}; upgrade with `pip install -U onnx`") from None
        shape = tuple(tensor.dims)
        if any(d < 0 for d in shape):
            raise QpassError(f"{where} has the shape {list(shape)}; the model is damaged, export it again")
        if is_external(tensor):
            source, offset = self._external(tensor, file_bytes(dtype, shape), where)
            return Stored(source, offset, dtype, shape)
        if dtype.kind == "O":
            return Kept(shape, dtype, lambda: onnx.numpy_helper.to_array(tensor))
        if tensor.HasField("segment"):
            raise QpassError(f"{where} is stored in segments, which no current tool reads; export the model again")
        try:
            return Stored.of(tensor)
        except ValueError as error:
            raise QpassError(f"{where} is damaged: {error}; export the model again") from None

    def files(self) -> list[Path]:
        """The model file and every other file that holds some of its tensors."""
        return [self.path, *(source.path for name, source in self._files.items() if name != self.path.name)]

    def _external(self, tensor: TensorProto, size: int, where: str) -> tuple[FileSource, int]:
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        source = self._open(location, where)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or size)
        except ValueError:
            raise QpassError(f"{where}: offset or length of its external data is not a number: {entries}") from None
        if offset < 0 or offset > source.size:
            raise QpassError(f"{where} lies at offset {offset} of {source.path} ({source.size} bytes); export it again")
        if length != size:
            raise QpassError(f"{where} needs {size} bytes but its external data says length {length}; export it again")
        if offset + size > source.size:
            raise QpassError(
                f"{where} needs bytes {offset} to {offset + size} of {source.path}, which has {source.size}; "
                "the data file is truncated or of another model, copy it again"
            )
        return source, offset

    def _open(self, location: str, where: str) -> FileSource:
        if location not in self._files:
            path = self._resolve(location, where)
            try:
                if path.exists() and not path.is_file():
                    raise QpassError(
                        f"{where} lies in {path}, which is no regular file; copy the data beside the model"
                    )
                self._files[location] = FileSource(path)
            except FileNotFoundError:
                raise QpassError(f"{where} lies in {path}, which is missing; copy it beside the model") from None
            except OSError as error:
                raise QpassError(f"{where} lies in {path}, which cannot be read: {error.strerror}") from None
        return self._files[location]

    def _resolve(self, location: str, where: str) -> Path:
        """Where external data is. It may not leave the model's folder: a model from anywhere could name any
        file.

        A link may lead to the folder where the model's own link leads (as in a Hugging Face cache).
        """
        refuse = f"{where} lies in '{location}', outside the model's folder; move the data beside the model"
        if not location or "\0" in location:
            raise QpassError(f"{where} is external data without a location; export the model again")
        pure = Path(location)
        if pure.is_absolute() or ".." in pure.parts or "\\" in location:
            raise QpassError(refuse)
        path = self.path.parent / pure
        real = Path(os.path.realpath(path))
        homes = (Path(os.path.realpath(self.path.parent)), Path(os.path.realpath(self.path)).parent)
        if not any(real.is_relative_to(home) for home in homes):
            raise QpassError(refuse)
        return path
