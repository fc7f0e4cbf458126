"""The writer: protos as they came, promises streamed into place, all files at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import TensorProto

from qpass.errors import QpassError
from qpass.graph.commit import Folder, Temporary, explain
from qpass.graph.dtypes import pack
from qpass.graph.emit import Emitted, Tensor, emit
from qpass.graph.load import point
from qpass.graph.promise import Result
from qpass.graph.stored import Stored
from qpass.graph.stream import Progress, Target, position, stream, write_all
from qpass.graph.wire import SMALL, layout_model

if TYPE_CHECKING:
    from qpass.graph.model import Model

#: Up to this much, weights are always kept inside the graph's file.
INSIDE = 64 << 20
#: Up to this much they are where the input had them inside. protobuf ends at 2 GiB.
INSIDE_AS_BEFORE = 3 << 29
#: Tensors in a data file begin at a page, so that a runtime can map them.
ALIGNMENT = 4096


@dataclass(frozen=True)
class SaveResult:
    """What a save did: bytes of the input's and of the output's files without sidecars, and all files written,
    the graph first.
    """

    bytes_before: int
    bytes_after: int
    files: tuple[Path, ...]


def save(
    model: Model,
    path: Path,
    sidecars: Mapping[Path, bytes],
    progress: Progress | None,
    max_memory: int | None,
) -> SaveResult:
    """See Model.save."""
    emitted = emit(model)
    inputs = model.weights.files()
    _check_place(path, sidecars, inputs)
    before = sum(p.stat().st_size for p in inputs)
    writer = _Writer(path, progress, max_memory)
    try:
        with Folder(path.parent) as folder:
            files = writer.write(folder, emitted, has_outside=len(inputs) > 1)
            names = [final for _, final in files]
            after = sum(os.fstat(temporary.fd).st_size for temporary, _ in files)
            for side, content in sidecars.items():
                temporary = folder.temporary(side.name)
                write_all(temporary.fd, memoryview(content), 0)
                files.insert(-1, (temporary, side))
            folder.commit(files, _old_data(path, keep=[*names, *inputs]))
    except OSError as error:
        raise explain(error, path, writer.needed) from error
    return SaveResult(before, after, (path, *(p for p in names if p != path), *sidecars))


def _check_place(path: Path, sidecars: Mapping[Path, bytes], inputs: list[Path]) -> None:
    """Refuse places where nothing may be written."""
    for target in (path, *sidecars):
        if target.parent != path.parent:
            raise ValueError(f"{target} must be beside {path} to appear together with it")
        if not target.parent.is_dir():
            raise QpassError(f"cannot write {target}: there is no folder {target.parent}; make it first")
        if target.is_dir():
            raise QpassError(f"cannot write {target}: it is a folder; give a file name")
        for source in inputs:
            if target.exists() and os.path.samefile(target, source):
                raise QpassError(f"{target} would overwrite the input {source}; choose another output with -o")


def _data_name(path: Path, digest: str) -> str:
    return f"{path.stem}.{digest}.data"


def _old_data(path: Path, keep: list[Path]) -> Iterator[Path]:
    """Data files of earlier outputs of the same name."""
    pattern = re.compile(re.escape(_data_name(path, "\0")).replace(re.escape("\0"), "[0-9a-f]{16}"))
    for candidate in path.parent.iterdir():
        if pattern.fullmatch(candidate.name) and not any(k.exists() and candidate.samefile(k) for k in keep):
            yield candidate


class _Writer:
    def __init__(self, path: Path, progress: Progress | None, max_memory: int | None) -> None:
        self.path = path
        self.progress = progress
        self.max_memory = max_memory
        self.needed = 0

    def write(self, folder: Folder, emitted: Emitted, has_outside: bool) -> list[tuple[Temporary, Path]]:
        """Write the files into temporaries; returns them with their names, the graph last."""
        everything = [*emitted.initializers, *emitted.embedded]
        self.needed = sum(_size(t) for t in everything)
        limit = INSIDE if has_outside else INSIDE_AS_BEFORE
        if self.needed <= limit:
            return [(self._write_inside(folder, emitted), self.path)]
        data, name = self._write_data(folder, everything)
        graph = folder.temporary(self.path.name)
        texts, _, _ = layout_model(emitted.proto, [(t.proto, None) for t in emitted.initializers])
        for offset, text in texts:
            write_all(graph.fd, memoryview(text), offset)
        return [(data, self.path.with_name(name)), (graph, self.path)]

    def _write_inside(self, folder: Folder, emitted: Emitted) -> Temporary:
        for tensor in emitted.embedded:
            assert tensor.array is not None
            _fill(tensor.proto, tensor)
        graph = folder.temporary(self.path.name)
        texts, gaps, size = layout_model(
            emitted.proto,
            [(t.proto, None if t.array is None else t.array.nbytes) for t in emitted.initializers],
        )
        os.ftruncate(graph.fd, size)
        for offset, text in texts:
            write_all(graph.fd, memoryview(text), offset)
        self._stream(graph.fd, [(t, g) for t, g in zip(emitted.initializers, gaps, strict=True) if g is not None])
        return graph

    def _write_data(self, folder: Folder, tensors: list[Tensor]) -> tuple[Temporary, str]:
        """Write large tensors into a data file, in the order in which their sources lie, and fill in the small."""
        outside: list[tuple[Tensor, int]] = []
        for tensor in tensors:
            if tensor.array is None and _size(tensor) >= SMALL and tensor.proto.data_type != TensorProto.STRING:
                tensor.array = Stored.of(tensor.proto)
                for field in (
                    "raw_data",
                    "float_data",
                    "int32_data",
                    "int64_data",
                    "double_data",
                    "uint64_data",
                ):
                    tensor.proto.ClearField(field)
        offset = 0
        for tensor in sorted((t for t in tensors if t.array is not None), key=lambda t: position(t.array)):  # type: ignore[arg-type]
            assert tensor.array is not None
            if tensor.array.nbytes < SMALL and not isinstance(tensor.array, Result):
                _fill(tensor.proto, tensor)
                continue
            outside.append((tensor, offset))
            offset += -(-tensor.array.nbytes // ALIGNMENT) * ALIGNMENT
        data = folder.temporary(f"{self.path.stem}.data")
        os.ftruncate(data.fd, offset)
        digest = self._stream(data.fd, outside)
        name = _data_name(self.path, digest.hex()[:16])
        for tensor, begin in outside:
            assert tensor.array is not None
            point(tensor.proto, name, begin, tensor.array.nbytes)
        return data, name

    def _stream(self, fd: int, tensors: list[tuple[Tensor, int]]) -> bytes:
        targets = [Target(t.array, offset) for t, offset in tensors if t.array is not None]
        targets.sort(key=lambda t: position(t.array))
        return stream(fd, targets, self.progress, self.max_memory)


def _fill(proto: TensorProto, tensor: Tensor) -> None:
    """Put a tensor's values into its proto."""
    assert tensor.array is not None
    proto.ClearField("external_data")
    proto.ClearField("data_location")
    proto.raw_data = bytes(pack(tensor.array.load()))


def _size(tensor: Tensor) -> int:
    return tensor.proto.ByteSize() if tensor.array is None else tensor.array.nbytes
