"""The streamed evaluation: right bytes whatever the threads do, clean ends, little memory."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qpass.graph import Blockwise, Given, Kept
from qpass.graph import stream as stream_module
from qpass.graph.dtypes import Array, pack
from qpass.graph.lazy import Lazy
from qpass.graph.stream import Target, stream
from tests.graph.models import floats, int8_rows
from tests.graph.test_lazy import stored


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "BLOCK", 4096)
    monkeypatch.setattr(stream_module, "PIECE", 1024)


def write(path: Path, arrays: Sequence[Lazy], max_memory: int | None = None) -> tuple[bytes, bytes]:
    """What the file holds, and the digest."""
    offset, targets = 0, []
    for array in arrays:
        targets.append(Target(array, offset))
        offset += array.nbytes + 5
    with path.open("wb+") as file:
        digest = stream(file.fileno(), targets, max_memory=max_memory)
    return path.read_bytes(), digest


def test_every_kind_of_array(tmp_path: Path) -> None:
    weight, other = floats(100, 60), floats(77, 200, dtype=np.float16)
    source = stored(weight, tmp_path)
    made = Blockwise(source.T, int8_rows, [((60, 100), np.int8), ((60,), np.float32)], "w")
    kept = Kept((60,), np.float32, lambda: np.abs(source.load()).max(axis=0))
    arrays: list[Lazy] = [
        made.results[1],  # the results of one promise, apart and in another order
        stored(other, tmp_path),
        made.results[0],
        source * kept,
        kept,
        Given(np.array(3, np.float32)),
    ]
    packed, scale = int8_rows(weight.T)
    expected = [scale, other, packed, weight * np.abs(weight).max(axis=0), np.abs(weight).max(axis=0)]
    content = b"".join(bytes(pack(a)) + b"\0" * 5 for a in [*expected, np.array(3, np.float32)])
    first = write(tmp_path / "a", arrays)
    assert first[0] == content[:-5]
    assert write(tmp_path / "b", arrays, max_memory=1) == first


def test_sub_byte_results(tmp_path: Path) -> None:
    """Blocks begin at a byte, whatever the length of a row."""

    def fn(block: Array) -> tuple[Array, ...]:
        return (np.clip(np.rint(block), -8, 7).astype(ml_dtypes.int4),)

    weight = floats(301, 33) * 3
    made = Blockwise(Given(weight), fn, [((301, 33), ml_dtypes.int4)], "w")
    content, _ = write(tmp_path / "x", made.results)
    assert content == bytes(pack(fn(weight)[0]))


def test_the_digest_tells_content_and_place(tmp_path: Path) -> None:
    a, b = Given(floats(40, 50)), Given(floats(40, 50, seed=1))
    digests = {write(tmp_path / "x", arrays)[1] for arrays in ([a, b], [b, a], [a, a], [a])}
    assert len(digests) == 4


def test_results_are_computed_once(tmp_path: Path) -> None:
    seen: list[int] = []

    def fn(block: Array) -> tuple[Array, ...]:
        seen.append(len(block))
        return block, block[:, 0], block[:, 1]

    shapes = [((500, 8), np.float32), ((500,), np.float32), ((500,), np.float32)]
    write(tmp_path / "x", list(Blockwise(Given(floats(500, 8)), fn, shapes, "w").results))
    assert sum(seen) == 500


@pytest.mark.parametrize("error", [ValueError("bad block"), KeyboardInterrupt(), MemoryError()])
def test_the_first_error_stops_everything(tmp_path: Path, error: BaseException) -> None:
    started = []

    def fn(block: Array) -> tuple[Array, ...]:
        started.append(1)
        if len(started) == 3:
            raise error
        time.sleep(0.01)
        return (block,)

    made = Blockwise(Given(floats(8000, 16)), fn, [((8000, 16), np.float32)], "w")
    with pytest.raises(type(error)):
        write(tmp_path / "x", list(made.results))
    assert len(started) < 10
    assert threading.active_count() == 1


def test_an_interrupt_in_the_waiting_thread_is_prompt(tmp_path: Path) -> None:
    made = Blockwise(Given(floats(80000, 16)), _slow, [((80000, 16), np.float32)], "w")
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with (tmp_path / "x").open("wb+") as file, pytest.raises(KeyboardInterrupt):
        stream(file.fileno(), [Target(made.results[0], 0)], progress)
    assert time.perf_counter() - start < 0.5
    assert threading.active_count() == 1


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    array = stored(floats(100, 100), tmp_path)
    with (tmp_path / "x").open("wb+") as file:
        stream(file.fileno(), [Target(array, 0)], lambda *call: calls.append(call))
    assert calls[-1] == (40000, 40000)
    assert calls == sorted(calls)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_full_disk_is_an_error_wherever_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(stream_module, "FLUSH_SECONDS", 0.001)
    made = Blockwise(Given(floats(800, 16)), _slow, [((800, 16), np.float32)], "w")
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "x", list(made.results))


def _slow(block: Array) -> tuple[Array, ...]:
    time.sleep(0.01)
    return (block,)


def test_kept_values_of_kept_values_do_not_lock_up(tmp_path: Path) -> None:
    source = stored(floats(400, 60), tmp_path)
    first = Kept((60,), np.float32, lambda: np.abs(source.load()).max(axis=0))
    second = Kept((60,), np.float32, lambda: first.load() + 1)
    arrays: list[Lazy] = [source * second, source / second, source * first, second, first]
    content, _ = write(tmp_path / "x", arrays)
    assert content.startswith(bytes(pack(np.asarray(source.load() * (first.load() + 1)))))


def test_kept_values_are_computed_before_they_are_waited_for(tmp_path: Path) -> None:
    order: list[str] = []

    def compute() -> Array:
        order.append("kept")
        return np.ones(1, np.float32)

    kept = Kept((1,), np.float32, compute)
    source = Given(floats(3000, 16))

    def fn(name: str) -> Blockwise:
        def block(rows: Array) -> tuple[Array, ...]:
            order.append(name)
            return (rows,)

        return Blockwise(source, block, [((3000, 16), np.float32)], name, needs=[kept] if name == "b" else [])

    write(tmp_path / "x", [fn("a").results[0], fn("b").results[0]], max_memory=1)
    assert 0 < order.index("kept") < order.index("b") - 1
    assert order.count("kept") == 1
