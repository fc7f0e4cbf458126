"""Evaluates promises straight into a file: in blocks, by a few threads, in the order of what they read."""

from __future__ import annotations

import collections
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from qpass.graph.dtypes import file_bytes, pack
from qpass.graph.lazy import Kept, Lazy
from qpass.graph.promise import Blockwise, Result
from qpass.graph.stored import Stored

#: Bytes of a block. The same on every machine, since the content hash is made of the blocks' hashes.
BLOCK = 16 << 20
#: Bytes that are copied at a time: read, hashed and written while they are in the cache.
PIECE = 1 << 20
#: What a worker holds at most: a block, what is computed from it and the scratch between.
WORKER = 4 * BLOCK
#: Bytes of tensors that the system is asked to read before a worker needs them.
AHEAD = 64 << 20
#: How many tasks before its first use a kept value is computed, so that nobody has to wait for it.
HEAD_START = 8
#: How often written data is sent to the disk.
FLUSH_SECONDS = 0.25

Progress = Callable[[int, int], None]
Chunk = tuple[int, memoryview]


@dataclass(frozen=True)
class Target:
    """An array and where in the file it goes."""

    array: Lazy
    offset: int


@dataclass(frozen=True)
class _Task:
    run: Callable[[], Iterable[Chunk]]
    opens: tuple[Lazy, ...] = ()  # stored tensors and kept values that this task is the first to need


def position(array: Lazy | None) -> tuple[str, int]:
    """Where the first tensor lies that a promise reads; those that read nothing come first."""
    leaves = () if array is None else array.leaves()
    return next((leaf.place for leaf in leaves if isinstance(leaf, Stored)), ("", 0))


def stream(
    fd: int, targets: Sequence[Target], progress: Progress | None = None, max_memory: int | None = None
) -> bytes:
    """Compute every array and write it; returns a digest of all that was written.

    The digest depends on content and layout alone, not on threads. What a worker raises is raised here, once
    all have stopped; so is KeyboardInterrupt. `progress(done, total)` is called in this thread with bytes
    written.
    """
    tasks = _with_head_start(list(_tasks(targets)))
    crew = _Crew(fd, tasks)
    crew.run(_workers(max_memory), progress, sum(t.array.nbytes for t in targets))
    return hashlib.sha256(b"".join(crew.digests)).digest()


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """pwrite until everything is written."""
    done = 0
    while done < len(data):
        written = os.pwrite(fd, data[done:], offset + done)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += written


def _workers(max_memory: int | None) -> int:
    limit = min(4, len(os.sched_getaffinity(0)))  # more would only wait for the disk
    return limit if max_memory is None else max(1, min(limit, max_memory // WORKER))


class _Crew:
    """Threads that take tasks in order until none is left or something fails."""

    def __init__(self, fd: int, tasks: Sequence[_Task]) -> None:
        self.fd = fd
        self.tasks = tasks
        self.digests = [b""] * len(tasks)
        self._error: BaseException | None = None
        self._next = iter(range(len(tasks)))
        self._ahead = collections.deque(_read_ahead(tasks))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._written: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # bytes; None: a worker has ended

    def run(self, workers: int, progress: Progress | None, total: int) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        threads.append(threading.Thread(target=self._flush, daemon=True))
        for thread in threads:
            thread.start()
        done = 0
        try:
            while workers:
                written = self._written.get()
                if written is None:
                    workers -= 1
                elif progress is not None:
                    done += written
                    progress(done, total)
        finally:
            self._stop.set()
            for thread in threads:
                while thread.is_alive():  # who has been impatient twice still must not close the file under a writer
                    with suppress(KeyboardInterrupt):
                        thread.join()
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        self._stop.set()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    index = next(self._next, None)
                    if index is None:
                        break
                    soon = []
                    while self._ahead and self._ahead[0][0] <= index:
                        soon.append(self._ahead.popleft()[1])
                for stored in soon:
                    stored.prefetch()
                self._do(index)
        except BaseException as error:
            self._fail(error)
        finally:
            self._written.put(None)

    def _do(self, index: int) -> None:
        digest = hashlib.sha256()
        for offset, data in self.tasks[index].run():
            digest.update(b"%d %d;" % (offset, len(data)))
            digest.update(data)
            write_all(self.fd, data, offset)
            self._written.put(len(data))
            if self._stop.is_set():
                return
        self.digests[index] = digest.digest()

    def _flush(self) -> None:
        """Send what is written to the disk while the rest is computed, instead of all of it at the end."""
        try:
            while not self._stop.wait(FLUSH_SECONDS):
                os.fdatasync(self.fd)
        except OSError as error:
            self._fail(error)


def _tasks(targets: Sequence[Target]) -> Iterator[_Task]:
    groups: dict[Blockwise, list[Target]] = {}
    for target in targets:
        if isinstance(target.array, Result):
            groups.setdefault(target.array.group, []).append(target)
    for target in targets:
        array = target.array
        if isinstance(array, Stored):
            tasks = [partial(_copy, target, *span) for span in _spans(array.nbytes, BLOCK)]
        elif isinstance(array, Result):
            if array.group not in groups:
                continue  # all results of a promise are made at the place of its first
            group = array.group
            spans = _row_spans(group.source, *group.results)
            tasks = [partial(_block, group, groups[group], *span) for span in spans]
            del groups[group]
        elif array.ndim == 0 or array.nbytes <= BLOCK:
            tasks = [partial(_whole, target)]
        else:
            tasks = [partial(_rows, target, *span) for span in _row_spans(array)]
        opens = tuple(array.leaves())
        for task in tasks:
            yield _Task(task, opens)
            opens = ()


def _copy(target: Target, start: int, stop: int) -> Iterator[Chunk]:
    assert isinstance(target.array, Stored)
    for begin in range(start, stop, PIECE):
        yield target.offset + begin, target.array.read(begin, min(begin + PIECE, stop))


def _whole(target: Target) -> Iterator[Chunk]:
    yield target.offset, pack(target.array.load())


def _rows(target: Target, start: int, stop: int) -> Iterator[Chunk]:
    yield _row_offset(target, start), pack(target.array.rows(start, stop))


def _block(group: Blockwise, targets: Sequence[Target], start: int, stop: int) -> Iterator[Chunk]:
    arrays = group.block(start, stop)
    for target in targets:
        assert isinstance(target.array, Result)
        yield _row_offset(target, start), pack(arrays[target.array.index])


def _row_offset(target: Target, row: int) -> int:
    array = target.array.made if isinstance(target.array, Result) else target.array
    return target.offset + file_bytes(array.dtype, (row, *array.shape[1:]))


def _row_spans(*arrays: Lazy) -> Iterator[tuple[int, int]]:
    """Row ranges whose blocks take about BLOCK bytes of the largest of arrays that have the same rows.

    Multiples of 8 rows, so that sub-byte types begin at a byte.
    """
    count = arrays[0].shape[0]
    row = max(1, max(a.nbytes for a in arrays) // max(count, 1))
    return _spans(count, max(8, BLOCK // row // 8 * 8))


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _with_head_start(tasks: Sequence[_Task]) -> list[_Task]:
    """The tasks with one more for each kept value that later ones need, well before the first of those."""
    due: dict[int, list[Kept]] = {}
    seen: set[Kept] = set()
    for index, task in enumerate(tasks):
        for leaf in task.opens:
            if isinstance(leaf, Kept) and leaf not in seen:
                seen.add(leaf)
                due.setdefault(max(0, index - HEAD_START), []).append(leaf)
    result = []
    for index, task in enumerate(tasks):
        result += [_Task(partial(_keep, kept)) for kept in due.get(index, ())]
        result.append(task)
    return result


def _keep(kept: Kept) -> Iterable[Chunk]:
    kept.load()
    return ()


def _read_ahead(tasks: Sequence[_Task]) -> Iterator[tuple[int, Stored]]:
    """Each tensor that is read, with the task at whose start the system is asked for it: AHEAD bytes earlier."""
    window: collections.deque[tuple[int, Stored]] = collections.deque()
    held = 0
    for index, task in enumerate(tasks):
        for leaf in task.opens:
            if isinstance(leaf, Stored):
                while window and held > AHEAD:
                    held -= window.popleft()[1].nbytes
                yield window[0][0] if window else index, leaf
                window.append((index, leaf))
                held += leaf.nbytes
