"""How everything is timed: copies of the tensors against a warm cache, a CUDA graph against launches, medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qpass import gpu
from qpass.plugins.bench.jobs import Kind
from qpass.plugins.library import DeviceTensor

REPLAYS = 15
WARM_UP_US = 250e3
"""Replays before those that count. Where power bounds the clocks they take some 200 ms to settle: a product that takes
171 µs at first takes 198 from then on (`settling` in benchmarks/results/products_profile_h100.json)."""
_IN_A_GRAPH = 8
_LONG_US = 2e3
_TIMES_L2, _MOST_COPIES = 5, 64

Call = Callable[[int], Any]
"""Enqueues one call on the CUDA stream of this handle; what it gives is kept until all that was captured is done."""


@dataclass(frozen=True)
class Time:
    """The median of replays, µs a call, and the slowest over the fastest."""

    us: float
    spread: float


class Timer:
    """Times calls on the GPU, all on one stream, so that libraries keep one workspace for it.

    Raises:
        QpassError: there is no GPU.
    """

    def __init__(self) -> None:
        self.stream = gpu.driver().Stream()

    def copies(self, size: int) -> int:
        """How many sets of tensors of `size` bytes are several times the L2 cache, or as many as one wants to hold."""
        return min(_MOST_COPIES, max(1, math.ceil(_TIMES_L2 * gpu.l2_bytes() / max(size, 1))))

    def time(self, calls: Sequence[Call]) -> Time:
        """Of a call, where all of `calls` are in a graph, one after the other, several times over where they are few.

        Raises:
            QpassError: they failed, or cannot be captured.
        """
        held: list[Any] = [None] * len(calls)  # results have memory of their own, as tensors of a model have

        def enqueue(rounds: int = 1) -> None:
            for _ in range(rounds):
                for i, call in enumerate(calls):
                    held[i] = call(self.stream.handle)

        gpu.synchronize()
        enqueue()  # what is made at a first call must not be made during the capture
        gpu.synchronize()
        watch = gpu.Stopwatch(self.stream)
        rounds = 1 if watch.time(enqueue) > _LONG_US else math.ceil(_IN_A_GRAPH / len(calls))
        graph = gpu.Graph(lambda _: enqueue(rounds), self.stream)
        warm = 0.0
        while warm < WARM_UP_US:
            warm += watch.time(graph.launch)
        times = [watch.time(graph.launch) / (rounds * len(calls)) for _ in range(REPLAYS)]
        return Time(statistics.median(times), max(times) / min(times))

    def check(self) -> None:
        """Wait for the GPU.

        Raises:
            QpassError: it has failed for good; nothing runs in this process any more.
        """
        gpu.synchronize()

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a device-to-device copy, read and written."""
        size = 1 << 30
        a, b = gpu.Buffer(size), gpu.Buffer(size)
        a.fill(0x3C)
        copy, watch = gpu.driver().memcpy_dtod_async, gpu.Stopwatch(self.stream)
        times = [watch.time(lambda: copy(b.address, a.address, size, self.stream)) for _ in range(REPLAYS + 3)]
        return 2 * size / (statistics.median(times[3:]) * 1e-6)


class Filled:
    """A tensor in GPU memory with random content; owns it."""

    def __init__(self, kind: Kind) -> None:
        dtype, shape = kind
        count = math.prod(shape)
        self.buffer = gpu.Buffer(count * dtype.itemsize)
        self.tensor = DeviceTensor(self.buffer.address, dtype, shape)
        rng = np.random.default_rng(count)
        some = min(count, 1 << 20)
        if dtype == np.int8:
            block = rng.integers(-128, 128, some).astype(np.int8)
        elif dtype == np.float32:  # a scale
            block = rng.uniform(0.5, 2, some).astype(dtype)
        else:
            block = rng.normal(size=some).astype(dtype)
        self.buffer.upload(block)
        done, copy = block.nbytes, gpu.driver().memcpy_dtod
        while 0 < done < self.buffer.size:
            more = min(done, self.buffer.size - done)
            copy(self.buffer.address + done, self.buffer.address, more)
            done += more
