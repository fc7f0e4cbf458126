"""Engines measured point by point. One that fails is left out, with why, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qpass import gpu
from qpass.engine.bench import points, provenance
from qpass.engine.bench.builds import Progress, Stage
from qpass.engine.bench.entries import Entry
from qpass.engine.bench.machine import Clocks
from qpass.engine.bench.points import Point
from qpass.engine.bench.report import Measured, Report, Subject
from qpass.engine.bench.statistics import Timing
from qpass.engine.bench.timing import Failure, Lane, LayerTime, Overwrite, layer_times, take_turns
from qpass.errors import QpassError


class Measuring:
    """The measuring part of a bench.

    Args:
        report: what is known before; it is filled.
        stage, save: as `bench` has them.
    """

    def __init__(self, report: Report, entries: Sequence[Entry], stage: Stage, save: Callable[[Report], None]) -> None:
        self._report, self._entries, self._stage, self._save = report, entries, stage, save
        self._method = report.method
        self._lost: str | None = None
        """Set once CUDA works no more in this process."""

    def run(self, at: Sequence[Point]) -> Report:
        """Load all engines, then measure at each point, then profile if that is asked for.

        Raises:
            QpassError: there was nothing to measure, or no memory for what overwrites the L2 cache.
        """
        try:
            overwrite = Overwrite() if self._method.cold_l2 else None
        except QpassError as error:
            raise QpassError(self._why(error)) from error
        self._tell(engines=tuple(map(self._load, self._entries)))
        for point in at:
            if self._lost is None:
                self._tell(points=(*self._report.points, self._measure(point, overwrite)))
                self._save(self._report)
        if self._method.profiled_runs:  # last of all: the profilers stay
            for i, point in enumerate(at[: len(self._report.points)]):
                measured = self._profile(i, point)
                self._tell(points=(*self._report.points[:i], measured, *self._report.points[i + 1 :]))
                self._save(self._report)
        if self._lost is not None:
            self._tell(notes=(*self._report.notes, self._lost))
        self._tell(complete=self._lost is None)
        self._save(self._report)
        if not any(t for m in self._report.points for t in m.timings):
            raise QpassError(f"no engine could be measured: {'; '.join(self._report.remarks())}")
        return self._report

    def _tell(self, **news: Any) -> None:
        self._report = replace(self._report, **news)

    def _load(self, entry: Entry) -> Subject:
        subject = Subject(
            entry.name, entry.kind, entry.error, build_seconds=entry.seconds, reused=entry.reused, recipe=entry.recipe
        )
        if entry.engine is None:
            return subject
        facts = entry.engine.facts
        subject = replace(
            subject,
            backend=f"{facts['backend']['name']} {facts['backend']['version']}",
            engine_bytes=entry.engine.path.stat().st_size,
            plugin_layers=len(facts["plugin_layers"]),
            built=provenance.of_engine(entry.engine),
        )
        try:
            with gpu.explained():
                before = gpu.free_bytes()
                session = entry.engine.load()
                taken = before - gpu.free_bytes()
        except QpassError as error:
            self._check_gpu(entry, "was loaded")
            return replace(subject, error=self._why(error))
        library = provenance.of_library(session.library) if session.library is not None else None
        return replace(subject, activation_bytes=session.activation_bytes, memory_bytes=taken, library=library)

    def _measure(self, point: Point, overwrite: Overwrite | None) -> Measured:
        errors = [s.error for s in self._report.engines]
        timings: list[Timing | None] = [None for _ in errors]
        clocks: tuple[Clocks | None, Clocks | None] = (None, None)
        lanes: dict[int, Lane] = {}

        def failed(i: int, error: QpassError) -> None:
            errors[i] = self._why(error)
            lanes.pop(i, None)
            self._check_gpu(self._entries[i], f"ran at {point}")

        with self._stage(f"measuring {point}", False) as progress:
            for i, entry in enumerate(self._entries):
                if entry.engine is not None and errors[i] is None and self._lost is None:
                    try:
                        feeds = points.fit(point, entry.engine)
                        lanes[i] = Lane(entry.engine.load(), feeds, self._method, overwrite)
                    except QpassError as error:
                        failed(i, error)
            while lanes and self._lost is None:
                try:
                    times, clocks = self._timed(list(lanes.values()), progress)
                except Failure as failure:  # the turns of the others were with it: they take them anew
                    failed(list(lanes)[failure.at], failure)
                    continue
                for i, runs in zip(lanes, times, strict=True):
                    timings[i] = Timing(runs)
                break
        if self._lost is not None:
            errors = [e or "not measured: CUDA had failed" for e in errors]
        return Measured(point.shapes, point.batch, tuple(timings), tuple(errors), clocks)

    def _timed(
        self, lanes: Sequence[Lane], progress: Progress | None
    ) -> tuple[list[tuple[float, ...]], tuple[Clocks | None, Clocks | None]]:
        def clocks() -> Clocks | None:
            try:
                with lanes[0].busy():
                    return Clocks.now()
            except QpassError as error:
                raise Failure(0, str(error)) from error

        before = clocks()
        times = take_turns(lanes, self._method.runs, progress)
        return times, (before, clocks())

    def _profile(self, at: int, point: Point) -> Measured:
        """The layers of what was measured at a point."""
        measured = self._report.points[at]
        layers: list[tuple[LayerTime, ...]] = []
        errors = list(measured.errors)
        with self._stage("profiling", False):
            for i, entry in enumerate(self._entries):
                found: list[LayerTime] = []
                if entry.engine is not None and errors[i] is None and self._lost is None:
                    ops = entry.engine.facts["plugin_layers"]
                    try:
                        feeds = points.fit(point, entry.engine)
                        found = layer_times(entry.engine.load(), feeds, ops, self._method.profiled_runs)
                    except QpassError as error:
                        errors[i] = f"it could not be profiled: {self._why(error)}"
                        self._check_gpu(entry, f"was profiled at {point}")
                layers.append(tuple(found))
        return replace(measured, layers=tuple(layers), errors=tuple(errors))

    def _check_gpu(self, entry: Entry, when: str) -> None:
        """Whether CUDA still works in this process after an engine failed; a kernel's error stays."""
        try:
            gpu.synchronize()
        except QpassError:
            self._lost = (
                f"CUDA works no more in this process since {entry.name} {when}, and nothing was measured after that; "
                "bench the others without it"
            )

    def _why(self, error: QpassError) -> str:
        """What failed, and what to do where there is no memory for all engines."""
        if "outofmemory" not in "".join(str(error).lower().split()) or len(self._entries) < 2:
            return str(error)
        return (
            f"{error}. The engines of a bench are on the GPU together: bench fewer presets or smaller shapes at a time"
        )
