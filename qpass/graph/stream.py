"""Evaluates promises straight into a file: in blocks, by a few threads, in the order of what they read."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qpass.graph.dtypes import file_bytes, pack
from qpass.graph.lazy import Lazy
from qpass.graph.promise import Blockwise, Result
from qpass.graph.stored import Stored

#: Bytes of a block. The same everywhere, since the content hash is made of the blocks' hashes.
BLOCK = 16 << 20
#: What a worker holds at most: a block, what is computed from it and the scratch between.
WORKER = 4 * BLOCK

Chunk = tuple[int, memoryview]


@dataclass(frozen=True)
class Target:
    """An array and where in the file it goes."""

    array: Lazy
    offset: int


@dataclass(frozen=True)
class _Task:
    run: Callable[[], Sequence[Chunk]]
    first: Stored | None = None  # a tensor that this task is the first to read


def position(array: Lazy) -> tuple[str, int]:
    """Where the first tensor lies that a promise reads; those that read nothing come first."""
    for stored in array.sources():
        return stored.place
    return "", 0


def stream(
    fd: int,
    targets: Sequence[Target],
    progress: Callable[[int, int], None] | None = None,
    max_memory: int | None = None,
) -> bytes:
    """Compute every array and write it; returns a digest of all that was written.

    The digest depends on content and layout alone, not on threads. What a worker raises is raised here, once
    all have stopped; so is KeyboardInterrupt. `progress(done, total)` is called in this thread with bytes
    written.
    """
    tasks = list(_tasks(targets))
    total = sum(t.array.nbytes for t in targets)
    crew = _Crew(fd, tasks)
    crew.run(_workers(max_memory), progress, total)
    digest = hashlib.sha256()
    for part in crew.digests:
        digest.update(part)
    return digest.digest()


def _workers(max_memory: int | None) -> int:
    limit = min(4, os.cpu_count() or 1)
    return limit if max_memory is None else max(1, min(limit, max_memory // WORKER))


class _Crew:
    """Threads that take tasks in order until none is left or one has failed."""

    def __init__(self, fd: int, tasks: Sequence[_Task]) -> None:
        self.fd = fd
        self.tasks = tasks
        self.digests = [b""] * len(tasks)
        self._next = iter(range(len(tasks)))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._news: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def run(self, workers: int, progress: Callable[[int, int], None] | None, total: int) -> None:
        threads = [
            threading.Thread(target=self._work, name="qpass-writer", daemon=True) for _ in range(workers)
        ]
        for thread in threads:
            thread.start()
        done, error = 0, None
        try:
            running = len(threads)
            while running:
                news = self._news.get()
                if news is None:
                    running -= 1
                elif isinstance(news, BaseException):
                    error = error or news
                elif progress is not None:
                    done += news
                    progress(done, total)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if error is not None:
            raise error

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    index = next(self._next, None)
                if index is None:
                    break
                self._news.put(self._do(index))
        except BaseException as error:  # the waiting thread raises it
            self._stop.set()
            self._news.put(error)
        finally:
            self._news.put(None)

    def _do(self, index: int) -> int:
        task = self.tasks[index]
        if task.first is not None:
            task.first.prefetch()
        digest, written = hashlib.sha256(), 0
        for offset, data in task.run():
            digest.update(f"{offset}:{len(data)};".encode())
            digest.update(data)
            write_all(self.fd, data, offset)
            written += len(data)
        self.digests[index] = digest.digest()
        return written


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """pwrite until everything is written."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _tasks(targets: Sequence[Target]) -> Iterator[_Task]:
    groups: dict[Blockwise, list[Target]] = {}
    for target in targets:
        if isinstance(target.array, Result):
            groups.setdefault(target.array.group, []).append(target)
    for target in targets:
        array = target.array
        if isinstance(array, Result):
            if array.group in groups:  # all results of a promise are made at the place of its first
                yield from _blockwise(array.group, groups.pop(array.group))
        elif isinstance(array, Stored):
            yield from _copy(array, target.offset)
        else:
            yield from _rows(array, target.offset)


def _blockwise(group: Blockwise, targets: list[Target]) -> Iterator[_Task]:
    def run(start: int, stop: int) -> list[Chunk]:
        arrays = group.block(start, stop)
        chunks = []
        for target in targets:
            assert isinstance(target.array, Result)
            chunks.append((_row_offset(target, start), pack(arrays[target.array.index])))
        return chunks

    first = next(group.source.sources(), None)
    for start, stop in _spans(group.source, *(r for r in group.results)):
        yield _Task(lambda start=start, stop=stop: run(start, stop), first if start == 0 else None)  # type: ignore[misc]


def _copy(array: Stored, offset: int) -> Iterator[_Task]:
    for start in range(0, array.nbytes, BLOCK):
        stop = min(start + BLOCK, array.nbytes)
        yield _Task(
            lambda start=start, stop=stop: [(offset + start, array.read(start, stop))],  # type: ignore[misc]
            array if start == 0 else None,
        )


def _rows(array: Lazy, offset: int) -> Iterator[_Task]:
    target = Target(array, offset)
    if array.nbytes <= BLOCK or array.ndim == 0:
        yield _Task(lambda: [(offset, pack(array.load()))])
        return
    first = next(array.sources(), None)
    for start, stop in _spans(array):
        yield _Task(
            lambda start=start, stop=stop: [(_row_offset(target, start), pack(array.rows(start, stop)))],  # type: ignore[misc]
            first if start == 0 else None,
        )


def _spans(*arrays: Lazy) -> Iterator[tuple[int, int]]:
    """Row ranges whose blocks take about BLOCK bytes of the largest of arrays that have the same rows.

    Multiples of 8 rows, so that sub-byte types begin at a byte.
    """
    count = arrays[0].shape[0]
    row = max(1, max(a.nbytes for a in arrays) // max(count, 1))
    step = max(8, BLOCK // row // 8 * 8)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _row_offset(target: Target, row: int) -> int:
    return target.offset + file_bytes(target.array.dtype, (row, *target.array.shape[1:]))
