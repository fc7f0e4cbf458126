"""What was measured, for tables, plots and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from qpass.engine.bench import statistics
from qpass.engine.bench.machine import Clocks, Machine
from qpass.engine.bench.statistics import Ratio, Timing
from qpass.engine.bench.timing import LayerTime, Method
from qpass.engine.profiles import Shape

VERSION = 2
"""Of the JSON's schema."""


@dataclass(frozen=True)
class Subject:
    """An engine that was to be measured. What is not known of one that was not built or not loaded is None.

    Args:
        name: the preset, "baseline", or the engine file's.
        kind: what it computes, in words.
        error: why it was not built or not loaded; None where it was.
        backend: the TensorRT that made it, such as "tensorrt 10.9.0".
        engine_bytes: its size on disk.
        activation_bytes: device memory that it asks for beside its weights.
        memory_bytes: device memory that was taken when it was loaded, with its context.
        build_seconds: None where it was there already, as one of an earlier bench that is `reused`.
        recipe: of what was rewritten, as YAML.
        built: what the sidecar tells of its build: sha256 of the engine, model, precision, level, workspace, profiles.
        library: the plugins that it runs with: name, sha256, architectures, interface.
    """

    name: str
    kind: str
    error: str | None = None
    backend: str | None = None
    engine_bytes: int | None = None
    activation_bytes: int | None = None
    memory_bytes: int | None = None
    build_seconds: float | None = None
    plugin_layers: int | None = None
    reused: bool = False
    recipe: str | None = None
    built: Mapping[str, Any] | None = None
    library: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Measured:
    """All engines at one point, in their order.

    Args:
        batch: None where no dim is known to be it.
        timings: None for an engine that failed, and why in `errors`.
        clocks: under load, before and after the timed runs; None where nvidia-smi tells nothing.
        layers: of each engine; empty unless they were profiled.
    """

    shapes: dict[str, Shape]
    batch: int | None
    timings: tuple[Timing | None, ...]
    errors: tuple[str | None, ...]
    clocks: tuple[Clocks | None, Clocks | None]
    layers: tuple[tuple[LayerTime, ...], ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items())

    def times_baseline(self, engine: int) -> Ratio | None:
        """How many times as fast as the first engine an engine is, by the medians; None where one of them failed."""
        baseline, other = self.timings[0], self.timings[engine]
        return statistics.ratio(baseline, other) if baseline is not None and other is not None else None

    def layers_us(self, engine: int) -> float:
        """What its layers take together when they are timed one by one: more than a run, and not to be compared."""
        return sum(layer.us for layer in self.layers[engine])

    def items_per_second(self, engine: int) -> float | None:
        """Batch items a second at the median; None where no dim is known to be the batch."""
        timing = self.timings[engine]
        return self.batch / (timing.p50 * 1e-6) if timing is not None and self.batch is not None else None


@dataclass(frozen=True)
class Report:
    """A bench. The first of `engines` is what the others are compared with.

    Args:
        inputs: what the engines were fed, in words.
        notes: what else one must know of how the engines were made.
        about: for JSON alone: when it began, and what engines were built of and how.
        complete: whether the bench has ended; a report is told after every point.
    """

    machine: Machine
    method: Method
    inputs: str
    engines: tuple[Subject, ...]
    points: tuple[Measured, ...]
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def failed(self) -> bool:
        """Whether an engine was not built, not loaded, or failed at a point."""
        return any(s.error for s in self.engines) or any(e for p in self.points for e in p.errors)

    def remarks(self) -> list[str]:
        """What one must know to read the numbers: the notes, what failed, and what held the clocks down."""
        return [*self.notes, *dict.fromkeys(self._failures()), *self._throttling()]

    def _throttling(self) -> Iterator[str]:
        for p in self.points:
            for when, clocks in zip(("before", "after"), p.clocks, strict=True):
                if clocks is not None and clocks.throttled:
                    yield f"the clock was held down {when} the runs at {p}, by {', '.join(clocks.throttled)}"

    def _failures(self) -> Iterator[str]:
        for s in self.engines:
            if s.error is not None:
                yield f"{s.name} failed: {s.error}"
        for p in self.points:
            for s, error in zip(self.engines, p.errors, strict=True):
                if error is not None and error != s.error:
                    yield f"{s.name} failed at {p}: {error}"
        without = [p for p in self.points if p.timings[0] is None]
        if without and len(self.engines) > 1:
            where = "" if len(without) == len(self.points) else f" at {'; '.join(map(str, without))}"
            yield f"there is nothing to compare with{where}, since {self.engines[0].name} failed"

    def described(self) -> dict[str, str]:
        """How it was measured, in words."""
        told = {True: "the clock is locked", False: "the clock is not locked", None: "whether it is locked is not told"}
        before, after = (self.points[0].clocks[0], self.points[-1].clocks[1]) if self.points else (None, None)
        clocks = "not known, since nvidia-smi tells nothing"
        if before is not None and after is not None:
            clocks = f"SM at {before} before the first run, {after} after the last; {told[before.locked]}"
        compared = {"× baseline": statistics.described()} if len(self.engines) > 1 else {}
        return self.method.describe(self.machine.l2_bytes) | compared | {"inputs": self.inputs, "clocks": clocks}

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in µs, sizes in bytes."""
        return {
            "version": VERSION,
            "complete": self.complete,
            **self.about,
            "device": asdict(self.machine),
            "versions": {
                "qpass": version("qpass"),
                "tensorrt": sorted({s.backend for s in self.engines if s.backend is not None}),
                "driver": self.machine.driver,
                "cuda": self.machine.cuda,
            },
            "method": asdict(self.method) | {"inputs": self.inputs, "described": self.described()},
            "engines": [asdict(s) for s in self.engines],
            "points": [self._point(p) for p in self.points],
            "notes": self.remarks(),
        }

    def _point(self, point: Measured) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for i, (engine, timing) in enumerate(zip(self.engines, point.timings, strict=True)):
            row: dict[str, Any] = {"engine": engine.name, "error": point.errors[i]}
            if timing is not None:
                times = point.times_baseline(i)
                row |= {
                    "us": timing.to_dict(),
                    "items_per_second": point.items_per_second(i),
                    "times_baseline": times.times if times is not None else None,
                    "times_baseline_interval": times.interval if times is not None else None,
                    "runs_us": [round(us, 3) for us in timing.runs],
                }
            if point.layers:
                row["layers_us"] = round(point.layers_us(i), 3)
                row["layers"] = [asdict(layer) for layer in point.layers[i]]
            rows.append(row)
        clocks = [asdict(c) if c is not None else None for c in point.clocks]
        return {
            "shapes": {n: list(s) for n, s in point.shapes.items()},
            "batch": point.batch,
            "clocks": dict(zip(("before", "after"), clocks, strict=True)),
            "results": rows,
        }
