"""The writer: protos as they came, promises streamed into place, all files at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpass.graph.commit import Folder, Temporary, check_place, explain
from qpass.graph.emit import Emitted, emit
from qpass.graph.load import point
from qpass.graph.promise import Result
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
    writer = _Writer(path, emitted, progress, max_memory)
    try:
        with Folder(path.parent) as folder:
            folder.need(writer.needed)
            files = writer.write(folder, has_outside=len(inputs) > 1)
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
        check_place(target, inputs)


def _data_name(path: Path, digest: str) -> str:
    return f"{path.stem}.{digest}.data"


def _old_data(path: Path, keep: list[Path]) -> Iterator[Path]:
    """Data files of earlier outputs of the same name."""
    pattern = re.compile(re.escape(_data_name(path, "\0")).replace(re.escape("\0"), "[0-9a-f]{16}"))
    for candidate in path.parent.iterdir():
        if pattern.fullmatch(candidate.name) and not any(k.exists() and candidate.samefile(k) for k in keep):
            yield candidate


class _Writer:
    """Writes the temporaries of one output."""

    def __init__(self, path: Path, emitted: Emitted, progress: Progress | None, max_memory: int | None) -> None:
        self.path = path
        self.emitted = emitted
        self.tensors = [*emitted.initializers, *emitted.embedded]
        self.needed = sum(t.nbytes for t in self.tensors)
        self.progress = progress
        self.max_memory = max_memory

    def write(self, folder: Folder, has_outside: bool) -> list[tuple[Temporary, Path]]:
        """Write the files into temporaries; returns them with their names, the graph last."""
        if self.needed <= (INSIDE if has_outside else INSIDE_AS_BEFORE):
            return [(self._write_inside(folder), self.path)]
        data, name = self._write_data(folder)
        graph = folder.temporary(self.path.name)
        self._write_graph(graph, [None] * len(self.emitted.initializers))
        return [(data, self.path.with_name(name)), (graph, self.path)]

    def _write_inside(self, folder: Folder) -> Temporary:
        """One file; the values of initializers are streamed into gaps of the proto around them."""
        for tensor in self.emitted.embedded:
            tensor.fill()
        graph = folder.temporary(self.path.name)
        tensors = self.emitted.initializers
        gaps = self._write_graph(graph, [None if t.array is None else t.array.nbytes for t in tensors])
        pairs = zip(tensors, gaps, strict=True)
        self._stream(graph, [Target(t.array, g) for t, g in pairs if t.array is not None and g is not None])
        return graph

    def _write_graph(self, graph: Temporary, lengths: Sequence[int | None]) -> list[int | None]:
        """Write the proto; returns the offsets of the gaps for initializers that come later."""
        headers = [t.proto for t in self.emitted.initializers]
        texts, gaps, size = layout_model(self.emitted.proto, zip(headers, lengths, strict=True))
        os.ftruncate(graph.fd, size)
        for offset, text in texts:
            write_all(graph.fd, memoryview(text), offset)
        return gaps

    def _write_data(self, folder: Folder) -> tuple[Temporary, str]:
        """The large tensors in a data file, in the order in which their sources lie; its name tells its content."""
        targets, protos, offset = [], [], 0
        for tensor in sorted(self.tensors, key=lambda t: position(t.array)):
            array = tensor.take() if tensor.nbytes >= SMALL else tensor.array
            if array is None:  # strings, and small ones that are in the proto already
                continue
            small = array.nbytes < SMALL and not tensor.outside
            if small and not isinstance(array, Result):  # results come with those they are made with
                tensor.fill()
                continue
            targets.append(Target(array, offset))
            protos.append(tensor.proto)
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        data = folder.temporary(f"{self.path.stem}.data")
        os.ftruncate(data.fd, offset)
        name = _data_name(self.path, self._stream(data, targets).hex()[:16])
        for proto, target in zip(protos, targets, strict=True):
            point(proto, name, target.offset, target.array.nbytes)
        return data, name

    def _stream(self, file: Temporary, targets: list[Target]) -> bytes:
        in_file_order = sorted(targets, key=lambda t: position(t.array))
        return stream(file.fd, in_file_order, self.progress, self.max_memory)
