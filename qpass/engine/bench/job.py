"""The whole bench: engines found or built, loaded together, measured point by point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qpass import gpu
from qpass.engine import sidecar
from qpass.engine.bench import points
from qpass.engine.bench.builds import Builds, Progress, Stage
from qpass.engine.bench.entries import Building, Entry, existing
from qpass.engine.bench.machine import Clocks, Machine
from qpass.engine.bench.points import Point, Shapes
from qpass.engine.bench.report import Measured, Report, Subject, Timing
from qpass.engine.bench.timing import Feeds, LayerTime, Method, layer_times, take_turns, warmed_up
from qpass.errors import QpassError
from qpass.graph.commit import check_place

MADE_UP = "made up: floats normal, integers within the vocabulary where it is known, masks of ones"


def _silent(what: str, data: bool) -> AbstractContextManager[Progress | None]:
    return nullcontext()


def bench(
    files: str | Path | Sequence[str | Path],
    building: Building | None = None,
    method: Method | None = None,
    *,
    shapes: Sequence[Shapes] = (),
    inputs: str | Path | None = None,
    outputs: Iterable[str | Path] = (),
    stage: Stage = _silent,
) -> Report:
    """Measure engines side by side on this machine's GPU. The first is what the others are compared with.

    Args:
        files: engines that `qpass build` wrote; or one model, an .onnx file, of which a baseline and an engine a preset
            are built first.
        building: how to build of a model.
        method: how to measure.
        shapes: the points to measure at, each input → shape; by default the usual shapes of the engines.
        inputs: an .npz file with the inputs of one point, in place of made-up ones.
        outputs: files that the caller will write; that they can be written, and overwrite nothing that is read, is
            checked before anything long.
        stage: shows what is being done.

    Raises:
        QpassError: something is missing or does not fit, which is said first; a rewrite, a build or TensorRT fails; or
            the engines do not fit onto the GPU together.
    """
    building, method = building or Building(), method or Method()
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(f) for f in files]
    file = Path(inputs) if inputs is not None else None
    if file is not None and shapes:
        raise QpassError(f"--inputs {file} has shapes of its own; leave out --shapes")
    models = [p for p in paths if p.suffix == ".onnx"]
    if not paths or (models and len(paths) > 1):
        raise QpassError("give one model, of which engines are built, or engines that exist")
    with ExitStack() as stack:
        if models:
            builds = Builds(models[0], building, shapes, file)
            kept = builds.files(building.keep) if building.keep is not None else []
            _check_outputs(outputs, builds.reads, kept)
            gpu.driver()
            notes = builds.notes()
            folder = building.keep or Path(stack.enter_context(TemporaryDirectory(prefix="qpass-bench-")))
            entries, measured_at = builds.make(folder, stage), builds.points
        else:
            entries, notes = existing(paths, building), []
            reads = [f for p in paths for f in (p, sidecar.of(p))]
            _check_outputs(outputs, [*reads, *(f for f in (file, building.library) if f is not None)], [])
            measured_at = _points_of(entries[0], shapes, file)
        feeds = [[points.fit(p, e.engine) for e in entries] for p in measured_at]
        told = str(file) if file is not None else MADE_UP
        with _together():
            subjects = [_load(e) for e in entries]
            measured = [_measure(entries, p, f, method, stage) for p, f in zip(measured_at, feeds, strict=True)]
            if method.profiled_runs:  # last of all: the profilers stay
                measured = [_profiled(entries, m, f, method, stage) for m, f in zip(measured, feeds, strict=True)]
        return Report(Machine.here(), method, told, tuple(subjects), tuple(measured), tuple(notes))


def _points_of(entry: Entry, shapes: Sequence[Shapes], file: Path | None) -> list[Point]:
    """Points of engines that exist: those given, else the usual shapes of the first."""
    proto = points.outline(entry.engine)
    inputs = points.required(proto)
    if file is not None:
        return [points.of_file(file, inputs)]
    usual = {n: tuple(p["opt"]) for n, p in entry.engine.facts["profiles"].items()}
    return [points.made_up(proto, points.complete(said, inputs, usual)) for said in shapes or ({},)]


def _check_outputs(outputs: Iterable[str | Path], reads: Sequence[Path], written: Sequence[Path]) -> None:
    """Raise QpassError where an output cannot be written, or would be something that is read, kept or written too."""
    taken = {w.resolve() for w in written}
    for output in map(Path, outputs):
        check_place(output, reads)
        if output.resolve() in taken:
            raise QpassError(f"{output} would be written twice; choose another name")
        taken.add(output.resolve())


@contextmanager
def _together() -> Iterator[None]:
    """Says what to do where there is no memory for all engines."""
    try:
        yield
    except QpassError as error:
        if "outofmemory" not in "".join(str(error).lower().split()):
            raise
        raise QpassError(
            f"{error}. The engines of a bench are on the GPU together: bench fewer presets or smaller shapes at a time"
        ) from error


def _load(entry: Entry) -> Subject:
    before = gpu.free_bytes()
    session = entry.engine.load()
    facts = entry.engine.facts
    return Subject(
        entry.name,
        entry.kind,
        f"{facts['backend']['name']} {facts['backend']['version']}",
        entry.engine.path.stat().st_size,
        session.activation_bytes,
        before - gpu.free_bytes(),
        entry.seconds,
        len(facts["plugin_layers"]),
    )


def _measure(entries: Sequence[Entry], point: Point, feeds: Sequence[Feeds], method: Method, stage: Stage) -> Measured:
    with stage(f"measuring {point}", False) as progress:
        lanes = warmed_up([e.engine.load() for e in entries], feeds, method)
        with lanes[0].busy():
            before = Clocks.now()
        times = take_turns(lanes, method.runs, progress)
        with lanes[0].busy():
            after = Clocks.now()
    return Measured(point.shapes, point.batch, tuple(map(Timing, times)), (before, after))


def _profiled(
    entries: Sequence[Entry], measured: Measured, feeds: Sequence[Feeds], method: Method, stage: Stage
) -> Measured:
    layers: list[tuple[LayerTime, ...]] = []
    with stage("profiling", False):
        for entry, fed in zip(entries, feeds, strict=True):
            ops = entry.engine.facts["plugin_layers"]
            layers.append(tuple(layer_times(entry.engine.load(), fed, ops, method.profiled_runs)))
    return replace(measured, layers=tuple(layers))
