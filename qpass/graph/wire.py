"""Model files as protobuf lays them out, so that weights inside a file can stay in it.

Parsing a model whose weights are inside costs their size twice. But a raw initializer is just a range of
bytes of the file: the reader takes those ranges out before protobuf sees the rest, and the writer leaves gaps
for them. Encoding: https://protobuf.dev/programming-guides/encoding; field numbers: onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx

#: Smaller raw data stays in the proto: shape inference reads it (Reshape targets and the like).
SMALL = 1024

_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW = 7, 5, 9
_BYTES = 2  # the wire type of what has a length


class WireError(Exception):
    """The bytes are not a protobuf message; the text says where."""


def read_model(path: Path) -> tuple[onnx.ModelProto, dict[int, tuple[int, int]]]:
    """The model without large raw data of the main graph's initializers, and where that lies.

    Returns the proto and, for each initializer whose data was left out, its index → (offset, length) in the
    file. Raises WireError, google.protobuf's DecodeError or OSError.
    """
    ranges: dict[int, tuple[int, int]] = {}
    with path.open("rb") as file:
        size = file.seek(0, 2)
        model = onnx.ModelProto.FromString(b"".join(_strip_model(file, size, ranges)))
    return model, ranges


def _strip_model(file: BinaryIO, size: int, ranges: dict[int, tuple[int, int]]) -> Iterator[bytes]:
    count = 0
    for tag, start, stop in _fields(file, 0, size):
        if tag != _key(_MODEL_GRAPH):
            yield _copy(file, start, stop)
            continue
        graph: list[bytes] = []
        for inner, begin, end in _fields(file, *_body(file, start, stop)):
            if inner == _key(_GRAPH_INITIALIZER):
                body = b"".join(_strip_tensor(file, *_body(file, begin, end), count, ranges))
                graph += [_varint(inner), _varint(len(body)), body]
                count += 1
            else:
                graph.append(_copy(file, begin, end))
        yield _varint(_key(_MODEL_GRAPH)) + _varint(sum(map(len, graph)))
        yield from graph


def _strip_tensor(
    file: BinaryIO, start: int, stop: int, index: int, ranges: dict[int, tuple[int, int]]
) -> Iterator[bytes]:
    if stop - start < SMALL:
        yield _copy(file, start, stop)
        return
    for tag, begin, end in _fields(file, start, stop):
        if tag == _key(_TENSOR_RAW):
            raw, end = _body(file, begin, end)
            if end - raw >= SMALL:
                ranges[index] = raw, end - raw
                continue
        yield _copy(file, begin, end)


def _fields(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(tag, offset of the tag, offset after the field) of each field between two offsets."""
    while start < stop:
        file.seek(start)
        tag = _read_varint(file)
        match tag & 7:
            case 0:
                _read_varint(file)
                end = file.tell()
            case 1:
                end = file.tell() + 8
            case 2:
                length = _read_varint(file)
                end = file.tell() + length
            case 5:
                end = file.tell() + 4
            case _:
                raise WireError(f"byte {start} starts no protobuf field")
        if end > stop:
            raise WireError(f"the field at byte {start} needs {end - stop} bytes more than there are")
        yield tag, start, end
        start = end


def _body(file: BinaryIO, start: int, stop: int) -> tuple[int, int]:
    """Where the content of a length-delimited field lies."""
    file.seek(start)
    _read_varint(file)
    _read_varint(file)
    return file.tell(), stop


def _copy(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _read_varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise WireError("the file ends inside a field")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise WireError(f"byte {file.tell()} starts no protobuf field")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(field: int) -> int:
    return field << 3 | _BYTES


def layout_model(
    model: onnx.ModelProto, initializers: Iterable[tuple[onnx.TensorProto, int | None]]
) -> tuple[list[tuple[int, bytes]], list[int | None], int]:
    """How a model is written whose initializers' raw data comes later.

    `model` holds no initializers; each of `initializers` comes with the length of its raw data, or None where
    the proto is complete as it is. Returns the (offset, bytes) to write, the offset for each initializer's
    raw data (None where there is none) and the size of the file.
    """
    items: list[tuple[bytes, int | None]] = []
    for proto, length in initializers:
        head = proto.SerializeToString(deterministic=True)
        if length is not None:
            head += _varint(_key(_TENSOR_RAW)) + _varint(length)
        items.append((_varint(_key(_GRAPH_INITIALIZER)) + _varint(len(head) + (length or 0)) + head, length))
    graph = model.graph.SerializeToString(deterministic=True)
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    graph_length = len(graph) + sum(len(head) + (length or 0) for head, length in items)

    texts: list[tuple[int, bytes]] = []
    gaps: list[int | None] = []
    offset = 0

    def put(data: bytes) -> None:
        nonlocal offset
        texts.append((offset, data))
        offset += len(data)

    put(rest.SerializeToString(deterministic=True))
    put(_varint(_key(_MODEL_GRAPH)) + _varint(graph_length) + graph)
    for head, length in items:
        put(head)
        gaps.append(None if length is None else offset)
        offset += length or 0
    return texts, gaps, offset
