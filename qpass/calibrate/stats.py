"""Calibration statistics of a whole model, in memory and as a file."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from qpass.calibrate.statistics import ActivationStats, Histogram
from qpass.errors import QpassError
from qpass.graph.commit import Folder, explain
from qpass.graph.load import Weights, read, tensors
from qpass.graph.stored import Stored

VERSION = 1
_FORMAT = "qpass calibration"


@dataclass(frozen=True)
class Key:
    """What statistics are of: equal keys, equal statistics.

    model: file name of the model, for messages. model_id, data_id: digests of their content. mask: the input
    that told padding from tokens. rows, seed: how many rows are sampled of each activation, and which.
    """

    model: str
    model_id: str
    data_id: str
    mask: str | None
    rows: int
    seed: int

    def same(self, other: Key) -> bool:
        """Whether both are of the same thing, however the model is called."""
        return asdict(self) | {"model": ""} == asdict(other) | {"model": ""}


class Stats:
    """Statistics of a model's activations by tensor name; a finished file or one that a run goes on from.

    key: what they are of. done, total: samples taken in and in all. tensors: what there is; of a file, read
    anew whenever it is asked for.
    """

    def __init__(
        self,
        key: Key,
        done: int,
        total: int,
        tensors: Mapping[str, ActivationStats],
        path: Path | None = None,
    ) -> None:
        self.key, self.done, self.total, self.tensors, self.path = key, done, total, tensors, path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stats:
        """Read a file's header; the rest is read when asked for.

        Raises:
            QpassError: there is no such file, or it is not of qpass calibrate, of another version or damaged.
        """
        path = Path(path)
        header = read_header(path)
        if header is None:
            raise QpassError(f"{path} holds no statistics; make them with `qpass calibrate`")
        if header["version"] != VERSION:
            raise QpassError(
                f"{path} has version {header['version']} of the format, this qpass reads {VERSION}; "
                "run `qpass calibrate` again"
            )
        key = Key(**header["key"])
        return cls(key, header["done"], header["total"], _Kept(path, key, header["tensors"]), path)

    @property
    def tokens(self) -> int:
        """The largest number of tokens that an activation has seen."""
        if isinstance(self.tensors, _Kept):  # without reading them
            return max(self.tensors.counts.values(), default=0)
        return max((s.count for s in self.tensors.values()), default=0)

    def get(self, tensor: str) -> ActivationStats | None:
        """The statistics of an activation, by the name of its tensor in the original model."""
        return self.tensors.get(tensor)

    def check(self, model: str | os.PathLike[str]) -> None:
        """Raises QpassError unless these are complete and of this very model, wherever it is."""
        model = Path(model)
        name = str(self.path or "the calibration")
        command = f"run `qpass calibrate {model} --data FOLDER -o {self.path or 'stats.npz'}`"
        if self.done < self.total:
            raise QpassError(f"{name} covers {self.done} of {self.total} samples; {command} to go on")
        if model_fingerprint(model) != self.key.model_id:
            raise QpassError(
                f"{name} is the calibration of another model: of {self.key.model} as it was then, "
                f"not of {model} as it is; {command}"
            )

    def save(self, path: Path) -> None:
        """Write the file: the whole of it or nothing. Same statistics, same bytes.

        Raises:
            QpassError: it cannot be written.
        """
        size = sum(s.rows.nbytes for s in self.tensors.values())
        try:
            with Folder(path.parent) as folder:
                temporary = folder.temporary(path.name)
                with os.fdopen(os.dup(temporary.fd), "wb") as file:
                    _write(file, self)
                folder.commit([(temporary, path)], iter(()))
        except OSError as error:
            raise explain(error, path, size) from error


def _write(file: Any, stats: Stats) -> None:
    header: dict[str, Any] = {
        "format": _FORMAT,
        "version": VERSION,
        "key": asdict(stats.key),
        "done": stats.done,
        "total": stats.total,
        "tensors": {name: s.count for name, s in stats.tensors.items()},
    }
    with zipfile.ZipFile(file, "w") as archive:
        _put(archive, "header", np.array(json.dumps(header)))
        for number, s in enumerate(stats.tensors.values()):
            bins = np.flatnonzero(s.histogram.counts)
            arrays: dict[str, NDArray[Any]] = {
                "amax": s.amax,
                "square_sum": s.square_sum,
                "bins": bins.astype(np.int32),
                "counts": s.histogram.counts[bins],
                "rows": s.rows,
                "tokens": s.tokens,
            }
            for part, array in arrays.items():
                _put(archive, f"{number}/{part}", array)


def _put(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    """As numpy.savez, but without the time."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a statistics file, None for a file that is something else. QpassError without a file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
    except FileNotFoundError:
        raise QpassError(f"no such file: {path}; make it with `qpass calibrate`") from None
    except OSError as error:
        raise QpassError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None
    known = isinstance(header, dict) and header.get("format") == _FORMAT
    return header if known else None


class _Kept(Mapping[str, ActivationStats]):
    """The statistics in a file, each read anew when it is asked for."""

    def __init__(self, path: Path, key: Key, counts: dict[str, int]) -> None:
        self.path, self.key, self.counts = path, key, counts
        self._numbers = {name: number for number, name in enumerate(counts)}

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __getitem__(self, name: str) -> ActivationStats:
        number = self._numbers[name]
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                amax, square_sum, bins, counts, rows, tokens = (
                    archive[f"{number}/{part}"] for part in ("amax", "square_sum", "bins", "counts", "rows", "tokens")
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise QpassError(f"{self.path} is damaged ({error}); remove it and run `qpass calibrate` again") from error
        histogram = Histogram()
        histogram.counts[bins] = counts
        count, capacity, seed = self.counts[name], self.key.rows, self.key.seed
        return ActivationStats(amax, square_sum, count, histogram, rows, tokens, capacity, seed)


# -- what a model is

_PIECES, _PIECE = 8, 512


def model_fingerprint(path: Path) -> str:
    """A digest of a model: all of its file, and of each external tensor its length and eight pieces of it.

    So another training of the same architecture is another model, for the price of a few reads. Neither names
    nor times of files matter, but where the model says that its data is does. Raises QpassError for a model
    that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise QpassError(f"cannot read {path}: {error.strerror}") from error
    proto, inside = read(path)
    weights = Weights(path)
    for tensor in tensors(proto):
        if tensor.data_location != TensorProto.EXTERNAL or tensor.name in inside:
            continue
        stored = weights.of(tensor)
        assert isinstance(stored, Stored)
        digest.update(f"{tensor.name}:{stored.nbytes};".encode())
        last = max(stored.nbytes - _PIECE, 0)
        for start in sorted({last * i // (_PIECES - 1) for i in range(_PIECES)}):
            digest.update(stored.read(start, min(start + _PIECE, stored.nbytes)))
    return digest.hexdigest()
