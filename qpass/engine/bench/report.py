"""What was measured, for tables, plots and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from qpass.engine.bench.machine import Clocks, Machine
from qpass.engine.bench.timing import LayerTime, Method
from qpass.engine.profiles import Shape

VERSION = 1
"""Of the JSON's schema."""


@dataclass(frozen=True)
class Timing:
    """GPU time in µs of one engine at one point, execution by execution."""

    runs: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """By linear interpolation between the two nearest runs; `share` is 0 to 100."""
        return float(np.percentile(self.runs, share))

    @property
    def p50(self) -> float:
        return self.percentile(50)

    def to_dict(self) -> dict[str, float]:
        """min, mean and percentiles."""
        told = {"min": min(self.runs), "mean": float(np.mean(self.runs))}
        told |= {f"p{share}": self.percentile(share) for share in (50, 90, 99)}
        return {name: round(us, 3) for name, us in told.items()}


@dataclass(frozen=True)
class Subject:
    """An engine that was measured.

    Args:
        kind: what it is, in words.
        backend: the TensorRT that made it, such as "tensorrt 10.9.0".
        engine_bytes: its size on disk.
        activation_bytes: device memory that it asks for beside its weights.
        memory_bytes: device memory that was taken when it was loaded, with its context.
        build_seconds: None where it was there already.
    """

    name: str
    kind: str
    backend: str
    engine_bytes: int
    activation_bytes: int
    memory_bytes: int
    build_seconds: float | None
    plugin_layers: int


@dataclass(frozen=True)
class Measured:
    """All engines at one point, in their order.

    Args:
        clocks: under load, before and after the timed runs; None where nvidia-smi tells nothing.
        layers: of each engine; empty unless they were profiled.
    """

    shapes: dict[str, Shape]
    batch: int
    timings: tuple[Timing, ...]
    clocks: tuple[Clocks | None, Clocks | None]
    layers: tuple[tuple[LayerTime, ...], ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items())

    def times_baseline(self, engine: int) -> float:
        """How many times as fast as the first engine an engine is, by the medians."""
        return self.timings[0].p50 / self.timings[engine].p50

    def items_per_second(self, engine: int) -> float:
        """Batch items a second at the median."""
        return self.batch / (self.timings[engine].p50 * 1e-6)


@dataclass(frozen=True)
class Report:
    """A bench. The first of `engines` is what the others are compared with.

    Args:
        inputs: what the engines were fed, in words.
        notes: what else one must know to read the numbers.
    """

    machine: Machine
    method: Method
    inputs: str
    engines: tuple[Subject, ...]
    points: tuple[Measured, ...]
    notes: tuple[str, ...] = ()

    def described(self) -> dict[str, str]:
        """How it was measured, in words."""
        told = {True: "the clock is locked", False: "the clock is not locked", None: "whether it is locked is not told"}
        before, after = self.points[0].clocks[0], self.points[-1].clocks[1]
        clocks = "not known, since nvidia-smi tells nothing"
        if before is not None and after is not None:
            clocks = f"SM at {before} before the first run, {after} after the last; {told[before.locked]}"
        return self.method.describe(self.machine.l2_bytes) | {"inputs": self.inputs, "clocks": clocks}

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in µs, sizes in bytes."""
        return {
            "version": VERSION,
            "device": asdict(self.machine),
            "versions": {
                "qpass": version("qpass"),
                "tensorrt": sorted({s.backend for s in self.engines}),
                "driver": self.machine.driver,
                "cuda": self.machine.cuda,
            },
            "method": asdict(self.method) | {"inputs": self.inputs, "described": self.described()},
            "engines": [asdict(s) for s in self.engines],
            "points": [self._point(p) for p in self.points],
            "notes": list(self.notes),
        }

    def _point(self, point: Measured) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for i, (engine, timing) in enumerate(zip(self.engines, point.timings, strict=True)):
            row = {
                "engine": engine.name,
                "us": timing.to_dict(),
                "items_per_second": point.items_per_second(i),
                "times_baseline": point.times_baseline(i),
                "runs_us": [round(us, 3) for us in timing.runs],
            }
            if point.layers:
                row["layers"] = [asdict(layer) for layer in point.layers[i]]
            rows.append(row)
        clocks = [asdict(c) if c is not None else None for c in point.clocks]
        return {
            "shapes": {n: list(s) for n, s in point.shapes.items()},
            "batch": point.batch,
            "clocks": dict(zip(("before", "after"), clocks, strict=True)),
            "results": rows,
        }
