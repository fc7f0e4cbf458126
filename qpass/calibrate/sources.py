"""Where samples come from, and how they become what a model is fed."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qpass.errors import QpassError
from qpass.runtime import Feeds, Input

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]


class Header(NamedTuple):
    """What is known of an array before it is read."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Source(Protocol):
    """Items of calibration data, each one sample or several along the batch axis.

    An item is held in memory while it is run, the others are not. `str` of a source says what it is.
    """

    def __len__(self) -> int:
        """The number of items."""

    def name(self, item: int) -> str:
        """What messages call it."""

    def headers(self, item: int) -> Mapping[str, Header]:
        """Its arrays by input name. Cheap: all items are looked at before the first is run."""

    def read(self, item: int) -> dict[str, Array]:
        """Its arrays' values."""

    def fingerprint(self) -> str:
        """A digest of the content of all items, whatever they are called and wherever they are."""


class NpzFiles:
    """.npz files keyed by input name, or folders of them (taken in the order of their names).

    Raises QpassError for what is no such file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.files: list[Path] = []
        for path in paths:
            if path.is_dir():
                inside = sorted(path.glob("*.npz"))
                if not inside:
                    raise QpassError(f"the folder {path} holds no .npz file; write samples with numpy.savez")
                self.files += inside
            elif path.exists():
                self.files.append(path)
            else:
                raise QpassError(f"no such file: {path}")
        if not self.files:
            raise QpassError("no data; give .npz files keyed by input name, or folders of them")

    def __str__(self) -> str:
        return ", ".join(str(p) for p in self.paths)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, item: int) -> str:
        return str(self.files[item])

    def headers(self, item: int) -> dict[str, Header]:
        found = {}
        with _opened(self.files[item]) as archive:
            for info in archive.infolist():
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        read = np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)
                found[info.filename.removesuffix(".npy")] = Header(dtype, shape)
        return found

    def read(self, item: int) -> dict[str, Array]:
        path = self.files[item]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise QpassError(f"cannot read {path}: {error}; write it again with numpy.savez") from error

    def fingerprint(self) -> str:
        """From the sizes and checksums in the files' directories: nothing is read but those."""
        digest = hashlib.sha256()
        for path in self.files:
            with _opened(path) as archive:
                members = sorted((i.filename, i.file_size, i.CRC) for i in archive.infolist())
            digest.update(repr(members).encode())
        return digest.hexdigest()


def source_of(data: str | Path | Sequence[str | Path] | Source) -> Source:
    """The source that a caller means: itself, or files and folders of them."""
    if isinstance(data, str | Path):
        return NpzFiles([Path(data)])
    return NpzFiles([Path(p) for p in data]) if isinstance(data, Sequence) else data


class _opened(zipfile.ZipFile):
    """The archive of an .npz file; what is wrong with it is a QpassError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            super().__init__(path)
        except zipfile.BadZipFile:
            raise QpassError(f"{path} is no .npz file, or is truncated; write it with numpy.savez") from None
        except OSError as error:
            raise QpassError(f"cannot read {path}: {error.strerror}") from error

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> None:
        super().__exit__(kind, error, at)
        if isinstance(error, ValueError | zipfile.BadZipFile | zlib.error):
            raise QpassError(f"{self._path} holds what is no array ({error}); write it with numpy.savez") from error


@dataclass(frozen=True)
class Batch:
    """What is run at a time: `size` samples of an item, from its sample `first` on.

    `start` is the number of the first among all samples; `whole` says whether this is all of the item.
    """

    item: str
    first: int
    size: int
    start: int
    whole: bool
    feeds: Feeds

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.whole:
            return self.item
        last = self.first + self.size - 1
        return f"{self.item}, sample {last}" if self.size == 1 else f"{self.item}, samples {self.first} to {last}"

    def sample(self, index: int) -> str:
        """What messages call one of its samples."""
        return self.item if self.whole and self.size == 1 else f"{self.item}, sample {self.first + index}"


class Samples:
    """A source as a model takes it: checked, converted, and cut along the batch axis.

    The batch axis is what all inputs with two dims or more name alike as their first dim; a model of a fixed
    batch size takes that many samples at a time. Arrays without a batch axis are one sample. Integers and
    floats of another width than the model's are cast. Past keys and values that an item leaves out are empty.

    Args:
        source: the data. Every item is checked here, before any is run.
        inputs: of the model.
        note: told what is done about inexact data.

    Raises:
        QpassError: an item lacks an input, or has one of another type or shape.
    """

    def __init__(self, source: Source, inputs: Mapping[str, Input], note: Callable[[str], None] | None = None) -> None:
        self.source, self.inputs = source, inputs
        self._axes, self._fixed = _batch_axes(inputs)
        self.shapes: list[Shapes] = []  # of each item, batch axis included
        self.sizes: list[int] = []  # samples in each item
        ignored: set[str] = set()
        empty: set[str] = set()
        for item in range(len(source)):
            headers = source.headers(item)
            shapes = self._check(source.name(item), headers)
            ignored |= headers.keys() - inputs.keys()
            empty |= shapes.keys() - headers.keys()
            self.shapes.append(shapes)
            self.sizes.append(self._size(source.name(item), shapes))
        if note is not None and ignored:
            note(f"the data's {_quoted(ignored)} are no inputs of the model and not used")
        if note is not None and empty:
            note(f"the data lacks {_quoted(empty)}, taken as empty")

    @property
    def total(self) -> int:
        """The number of samples."""
        return sum(self.sizes)

    def one(self, item: int) -> Shapes:
        """The shapes of a single sample of an item."""
        return {
            name: tuple(self._fixed or 1 if a == self._axes.get(name) else d for a, d in enumerate(shape))
            for name, shape in self.shapes[item].items()
        }

    def batches(self, limit: Callable[[int], int], start: int = 0) -> Iterator[Batch]:
        """All samples from number `start` on; at most `limit(item)` at a time."""
        begin = 0
        for item, size in enumerate(self.sizes):
            first = max(start - begin, 0)
            if first < size:
                arrays = self._read(item)
                step = self._fixed or max(1, limit(item))
                for at in range(first, size, step):
                    yield self._part(item, arrays, begin, at, min(step, size - at))
                del arrays
            begin += size

    def _part(self, item: int, arrays: dict[str, Array], begin: int, at: int, count: int) -> Batch:
        whole = count == self.sizes[item]
        if not whole:
            arrays = {name: self._slice(name, array, at, at + count) for name, array in arrays.items()}
        return Batch(self.source.name(item), at, count, begin + at, whole, arrays)

    def _slice(self, name: str, array: Array, start: int, stop: int) -> Array:
        axis = self._axes.get(name)
        return array if axis is None else array[(slice(None),) * axis + (slice(start, stop),)]

    def _read(self, item: int) -> dict[str, Array]:
        arrays = self.source.read(item)
        out = {}
        for name, shape in self.shapes[item].items():
            dtype = self.inputs[name].dtype
            array = arrays[name] if name in arrays else np.zeros(shape, dtype)
            out[name] = array.astype(dtype, copy=False).reshape(shape)
        return out

    def _check(self, where: str, headers: Mapping[str, Header]) -> dict[str, tuple[int, ...]]:
        """The shape of every input in an item, with the batch axis that it may lack."""
        here = {name: h for name, h in headers.items() if name in self.inputs}
        missing = [i for i in self.inputs.values() if i.name not in here and not i.optional]
        lacking = [i for i in missing if not _is_cache(i)]
        if lacking:
            have = _quoted(headers) if headers else "nothing"
            raise QpassError(f"{where} lacks the input {lacking[0]}; it has {have}")
        bare = bool(here) and all(
            len(h.shape) + 1 == len(self.inputs[n].shape or ()) and self._axes.get(n) == 0 for n, h in here.items()
        )
        shapes = {n: (1, *h.shape) if bare else h.shape for n, h in here.items()}
        for name, header in here.items():
            self._fits(where, self.inputs[name], header, shapes[name])
        known = {
            d: n for name, shape in shapes.items() for d, n in zip(self.inputs[name].shape or (), shape, strict=False)
        }
        for i in missing:
            assert i.shape is not None
            shapes[i.name] = tuple(d if isinstance(d, int) else known.get(d, 0) for d in i.shape)
        return shapes

    def _fits(self, where: str, wanted: Input, header: Header, shape: tuple[int, ...]) -> None:
        got = f"{where}: '{wanted.name}' is {header.dtype}{list(header.shape)}"
        kinds = "biuf" if wanted.dtype.kind == "f" else "biu"
        if header.dtype != wanted.dtype and (header.dtype.kind not in kinds or wanted.dtype.kind not in "biuf"):
            raise QpassError(f"{got}, the model wants {wanted}")
        if wanted.shape is None:
            return
        fits = len(shape) == len(wanted.shape) and all(
            not isinstance(w, int) or w == d or (a == self._axes.get(wanted.name) and self._fixed)
            for a, (w, d) in enumerate(zip(wanted.shape, shape, strict=False))
        )
        if not fits:
            raise QpassError(f"{got}, the model wants {wanted}")

    def _size(self, where: str, shapes: Shapes) -> int:
        """How many samples an item has."""
        sizes = {n: shapes[n][a] for n, a in self._axes.items() if n in shapes}
        if not sizes:
            return 1
        first, size = next(iter(sizes.items()))
        for name, other in sizes.items():
            if other != size:
                raise QpassError(f"{where}: '{first}' holds {size} samples but '{name}' {other}")
        if self._fixed and size % self._fixed:
            raise QpassError(
                f"{where} holds {size} samples, but the model takes {self._fixed} at a time; "
                "fill the batch up, or export the model with a dynamic batch axis"
            )
        return size


def _is_cache(wanted: Input) -> bool:
    """Whether an input is past keys or values, which may be empty."""
    return "past" in wanted.name and wanted.dtype.kind == "f" and wanted.shape is not None


def _batch_axes(inputs: Mapping[str, Input]) -> tuple[dict[str, int], int | None]:
    """The batch axis of each input that has one, and the batch size where it is fixed."""
    first = {i.shape[0] for i in inputs.values() if i.shape is not None and len(i.shape) > 1}
    if len(first) != 1 or None in first:
        return {}, None
    batch = first.pop()
    axes = {i.name: i.shape.index(batch) for i in inputs.values() if i.shape is not None and batch in i.shape}
    if isinstance(batch, int):
        axes = {n: 0 for n, i in inputs.items() if i.shape is not None and len(i.shape) > 1}
        return axes, batch
    twice = any((i.shape or ()).count(batch) > 1 for i in inputs.values())
    return ({}, None) if twice else (axes, None)


def _quoted(names: Any) -> str:
    names = [f"'{n}'" for n in names] if not isinstance(names, set) else [f"'{n}'" for n in sorted(names)]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
