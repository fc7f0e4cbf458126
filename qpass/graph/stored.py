"""Tensors where they lie: in a file, read in pieces with pread, or in the bytes of a parsed proto."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from onnx import TensorProto, numpy_helper

from qpass.errors import QpassError
from qpass.graph.dtypes import Array, DType, file_bytes, pack, packed_bits, to_numpy, unpack
from qpass.graph.lazy import Cut, Lazy

#: Bytes of one advice to read ahead; Linux cuts longer ones off at the device's limit.
_READAHEAD = 256 << 10
#: Mapped bytes that one reader keeps resident at a time.
_RESIDENT = 4 << 20


class Source(Protocol):
    """Bytes that can be read anywhere. `name` is the file's, "" in memory."""

    name: str

    def read(self, offset: int, length: int) -> memoryview: ...

    def pieces(self, offset: int, length: int, step: int, count: int) -> Array:
        """`count` pieces of `length` bytes, `step` apart: uint8 [count, length]."""

    def prefetch(self, offset: int, length: int) -> None:
        """These bytes will be read soon."""


class FileSource:
    """A file on disk, `size` bytes long. Raises OSError, and QpassError at a read if the file has changed since.

    Opened for each read and no longer: some models have a file for every tensor. Whole ranges are read with pread.
    Many small pieces (a column slab of a [K, N] weight) are copied out of a mapping, several times faster than one
    system call each; mapped pages count as resident memory and are let go step by step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        stat = os.stat(path)
        self.size, self._state = stat.st_size, _state(stat)

    def read(self, offset: int, length: int) -> memoryview:
        buffer = np.empty(length, np.uint8)
        view, done = buffer.data, 0
        with self._open() as fd:
            while done < length:
                got = os.preadv(fd, [view[done:]], offset + done)
                if not got:
                    raise self._changed()
                done += got
        return view

    def pieces(self, offset: int, length: int, step: int, count: int) -> Array:
        out = np.empty((count, length), np.uint8)
        skip = offset % mmap.ALLOCATIONGRANULARITY
        span = skip + (count - 1) * step + length
        with self._open() as fd, mmap.mmap(fd, span, prot=mmap.PROT_READ, offset=offset - skip) as mapped:
            for i, stop in _turns(count, max(1, _RESIDENT // step)):
                begin, end = skip + i * step, skip + (stop - 1) * step + length
                flat = np.frombuffer(mapped, np.uint8, end - begin, begin)
                out[i:stop] = np.lib.stride_tricks.as_strided(flat, (stop - i, length), (step, 1))
                del flat  # the mapping cannot close while arrays look into it
                page = begin - begin % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_DONTNEED, page, end - page)
        return out

    def prefetch(self, offset: int, length: int) -> None:
        with self._open() as fd:
            for at in range(offset, offset + length, _READAHEAD):
                os.posix_fadvise(fd, at, _READAHEAD, os.POSIX_FADV_WILLNEED)

    @contextmanager
    def _open(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _state(os.fstat(fd)) != self._state:
                    raise self._changed()
                yield fd
            finally:
                os.close(fd)
        except OSError as error:
            raise QpassError(f"cannot read {self.path}: {error.strerror}") from error

    def _changed(self) -> QpassError:
        return QpassError(f"{self.path} has changed since it was opened; run again when nothing writes it")


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _turns(count: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, count)) for start in range(0, count, step))


class MemorySource:
    """Bytes that a parsed proto holds."""

    name = ""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = np.frombuffer(data, np.uint8)

    def read(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length].data

    def pieces(self, offset: int, length: int, step: int, count: int) -> Array:
        return np.lib.stride_tricks.as_strided(self._data[offset:], (count, length), (step, 1))

    def prefetch(self, offset: int, length: int) -> None:
        pass


class Stored(Lazy):
    """A tensor as a model stores it: `shape` elements of `dtype`, C order, little-endian, at `offset` of `source`."""

    def __init__(self, source: Source, offset: int, dtype: DType, shape: tuple[int, ...]) -> None:
        self.source, self.offset, self.dtype, self.shape = source, offset, dtype, shape

    @classmethod
    def of(cls, proto: TensorProto) -> Stored:
        """The tensor whose values are inside `proto`, in raw or in typed fields. Strings have no bytes: ValueError."""
        dtype, shape = to_numpy(proto.data_type), tuple(proto.dims)
        if dtype.kind == "O":
            raise ValueError("a string tensor has no fixed bytes")
        data = proto.raw_data if proto.HasField("raw_data") else pack(numpy_helper.to_array(proto))
        if len(data) != file_bytes(dtype, shape):
            raise ValueError(f"{dtype}{list(shape)} takes {file_bytes(dtype, shape)} bytes but {len(data)} are there")
        return cls(MemorySource(data), 0, dtype, shape)

    def rows(self, start: int, stop: int) -> Array:
        shape = (stop - start, *self.shape[1:])
        skipped = start * math.prod(self.shape[1:])
        if skipped * (packed_bits(self.dtype) or 8) % 8:
            return self.load()[start:stop]  # the row begins inside a byte
        begin = self.offset + file_bytes(self.dtype, (skipped,))
        return unpack(self.source.read(begin, file_bytes(self.dtype, shape)), self.dtype, shape)

    def columns(self, start: int, stop: int) -> Array:
        count, width = self.shape
        if (start, stop) == (0, width) or not self.nbytes:
            return self.load()[:, start:stop]
        if (bits := packed_bits(self.dtype)) is not None:
            return self._packed_columns(start, stop, bits)
        item = self.dtype.itemsize
        pieces = self.source.pieces(self.offset + start * item, (stop - start) * item, width * item, count)
        return pieces.view(self.dtype)

    def _packed_columns(self, start: int, stop: int, bits: int) -> Array:
        """Columns of which several share a byte: whole bytes are read where every row begins with one."""
        count, width = self.shape
        if 8 % bits or width * bits % 8:
            return self.load()[:, start:stop]
        first, last = start * bits // 8, -(-stop * bits // 8)
        pieces = self.source.pieces(self.offset + first, last - first, width * bits // 8, count)
        skipped = first * 8 // bits
        columns = unpack(np.ascontiguousarray(pieces), self.dtype, (count, (last - first) * 8 // bits))
        return columns[:, start - skipped : stop - skipped]

    def load(self) -> Array:
        return unpack(self.source.read(self.offset, self.nbytes), self.dtype, self.shape)

    def read(self, start: int, stop: int) -> memoryview:
        """The tensor's own bytes start..stop, as they are in the file."""
        return self.source.read(self.offset + start, stop - start)

    @property
    def place(self) -> tuple[str, int]:
        """Where it lies, to sort by."""
        return self.source.name, self.offset

    def prefetch(self) -> None:
        """Tell the system that the whole tensor will be read soon."""
        self.source.prefetch(self.offset, self.nbytes)

    def _cut(self, start: int, stop: int) -> Lazy:
        skipped = start * math.prod(self.shape[1:])
        if skipped * (packed_bits(self.dtype) or 8) % 8:
            return Cut(self, start, stop)  # the first row begins inside a byte
        offset = self.offset + file_bytes(self.dtype, (skipped,))
        return Stored(self.source, offset, self.dtype, (stop - start, *self.shape[1:]))

    def _reshaped(self, shape: tuple[int, ...]) -> Lazy:
        return Stored(self.source, self.offset, self.dtype, shape)
