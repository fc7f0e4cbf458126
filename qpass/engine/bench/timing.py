"""How engines are measured: GPU time of one execution, engines in turns, with a cold L2 cache."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

from numpy.typing import NDArray

from qpass import gpu
from qpass.engine.run import Session
from qpass.errors import QpassError

Feeds = Mapping[str, NDArray[Any]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Method:
    """How to measure.

    Args:
        runs: timed executions of each engine at each point.
        cuda_graph: replay a CUDA graph of the engine; otherwise TensorRT enqueues it every time, and where that takes
            longer than the GPU's work it is what is measured.
        cold_l2: overwrite the L2 cache before every timed execution; otherwise the engine runs once untimed before it,
            so that the cache holds what it last used.
        warm_up_seconds, warm_up_runs: an engine runs at least so long and so often before it is timed.
        profiled_runs: executions whose layers are timed, after all else is measured.
    """

    runs: int = 100
    cuda_graph: bool = True
    cold_l2: bool = True
    warm_up_seconds: float = 0.5
    warm_up_runs: int = 10
    profiled_runs: int = 0

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise QpassError(f"--runs {self.runs}: wants 1 or more")

    def describe(self, l2_bytes: int) -> dict[str, str]:
        """It in words, by what they are about."""
        how = "replayed as a CUDA graph" if self.cuda_graph else "enqueued by TensorRT"
        flushed = (
            f"before each the L2 cache ({l2_bytes / 1e6:.0f} MB) is overwritten by a memset of twice its size"
            if self.cold_l2
            else "before each the same engine runs untimed, so the L2 cache is warm"
        )
        warm_up = f"{self.warm_up_seconds:g} s and {self.warm_up_runs} runs of warm-up each"
        told = {
            "time": f"on the GPU, by CUDA events around one execution, {how}; inputs are there, copies are not timed",
            "runs": f"{self.runs} per engine and shape, the engines in turns, after at least {warm_up}; {flushed}",
        }
        if self.profiled_runs:
            told["layers"] = (
                f"by TensorRT's profiler, the mean of {self.profiled_runs} runs of their own, enqueued layer by layer: "
                "together they take longer than a run, so compare shares and not µs with p50"
            )
        return told


class Failure(QpassError):
    """An engine failed in its turn: the lane `at` this place."""

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at = at


def take_turns(lanes: Sequence[Lane], runs: int, progress: Progress | None = None) -> list[tuple[float, ...]]:
    """µs of every execution of each engine: A B C, A B C, …, so that a drift of the clocks hits all alike.

    Raises:
        Failure: TensorRT or CUDA failed.
    """
    times: list[list[float]] = [[] for _ in lanes]
    for done in range(runs):
        for at, (lane, taken) in enumerate(zip(lanes, times, strict=True)):
            try:
                taken.append(lane.time())
            except QpassError as error:
                raise Failure(at, str(error)) from error
        if progress is not None:
            progress(done + 1, runs)
    return [tuple(t) for t in times]


class Overwrite:
    """Makes the L2 cache hold nothing that an engine wants. Shared by all engines.

    Raises:
        QpassError: there is no memory for it.
    """

    def __init__(self) -> None:
        self._buffer = gpu.Buffer(2 * gpu.l2_bytes())

    def __call__(self, stream: Any) -> None:
        gpu.driver().memset_d8_async(self._buffer.address, 0, self._buffer.size, stream)


class Lane:
    """One engine at one point, warmed up and ready to be timed until its session is used for something else.

    Args:
        feeds: as its `Engine.check` gives them.
        overwrite: None to leave the L2 cache warm.

    Raises:
        QpassError: TensorRT or CUDA failed, or the engine cannot be captured.
    """

    @gpu.explained()
    def __init__(self, session: Session, feeds: Feeds, method: Method, overwrite: Overwrite | None) -> None:
        enqueue = session.prepare(feeds)
        self._overwrite, self._took = overwrite, 0.0
        self._use(gpu.driver().Stream(), enqueue)
        # before the capture: TensorRT wants to run first, and RTX replaces its kernels by better ones meanwhile
        self._warm_up(method.warm_up_runs, method.warm_up_seconds)
        if method.cuda_graph:
            try:
                graph = gpu.Graph(enqueue)
            except QpassError as error:
                raise QpassError(f"an engine cannot be captured: {error}; measure with --no-cuda-graph") from error
            self._use(graph.stream, lambda _: graph.launch())
            self._warm_up(method.warm_up_runs, 0.0)

    def _use(self, stream: Any, work: Callable[[Any], None]) -> None:
        self._stream, self._work = stream, partial(work, stream)
        self._watch = gpu.Stopwatch(stream)

    def _warm_up(self, runs: int, seconds: float) -> None:
        end = monotonic() + seconds
        while runs > 0 or monotonic() < end:
            self._took = self.time()
            runs -= 1

    @gpu.explained()
    def time(self) -> float:
        """µs of one execution. What goes before it on the GPU keeps the time of its launch out."""
        if self._overwrite is not None:
            self._overwrite(self._stream)
        else:
            self._work()
        return self._watch.time(self._work)

    @contextmanager
    def busy(self, seconds: float = 0.5, most: int = 500) -> Iterator[None]:
        """Keep the GPU at work meanwhile, for about so long and at most so many executions."""
        with gpu.explained():
            for _ in range(min(most, math.ceil(seconds * 1e6 / max(self._took, 1.0)))):
                self._work()
        yield
        gpu.synchronize()


@dataclass(frozen=True)
class LayerTime:
    """What layers take of an execution: one layer, or all plugins of an op together. µs a run, and the share of all."""

    name: str
    layers: int
    is_plugin: bool
    us: float
    share: float


@gpu.explained()
def layer_times(session: Session, feeds: Feeds, ops: Mapping[str, str], runs: int) -> list[LayerTime]:
    """The layers by the time that they take, the longest first. TensorRT's profiler stays on the engine's context.

    Args:
        ops: plugin node → op.
        runs: executions to take the mean of, after three to warm up.
    """
    taken: dict[str, float] = defaultdict(float)

    def report(name: str, ms: float) -> None:
        taken[name] += ms * 1e3 / runs

    enqueue = session.prepare(feeds)
    stream = gpu.driver().Stream()
    session.report_layers(report)
    for run in range(runs + 3):
        if run == 3:
            taken.clear()
        enqueue(stream)
        gpu.synchronize()
    origins = {layer.name: layer.origin for layer in session.layers() if layer.is_plugin}
    groups: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for name, us in taken.items():
        op = ops.get(name) or ops.get(origins.get(name, ""))
        groups[op or name, op is not None].append(us)
    whole = sum(taken.values()) or 1.0
    found = [LayerTime(n, len(us), plugin, sum(us), sum(us) / whole) for (n, plugin), us in groups.items()]
    return sorted(found, key=lambda t: -t.us)
