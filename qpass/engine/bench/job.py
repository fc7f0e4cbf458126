"""The whole bench: engines found or built, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from qpass import gpu
from qpass.engine import sidecar
from qpass.engine.bench import points
from qpass.engine.bench.builds import Builds, Progress, Stage
from qpass.engine.bench.entries import Building, existing
from qpass.engine.bench.machine import Machine
from qpass.engine.bench.measuring import Measuring
from qpass.engine.bench.points import Point, Shapes
from qpass.engine.bench.report import Report
from qpass.engine.bench.timing import Method
from qpass.engine.run import Engine
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
    save: Callable[[Report], None] | None = None,
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
        save: called with what is there after every point, so that whoever ends the bench early keeps that.

    Returns:
        What was measured. An engine that could not be built, loaded or run is there, with why; see `Report.failed`.

    Raises:
        QpassError: something is missing or does not fit, which is said first; or no engine could be measured at all.
    """
    began = datetime.now(UTC)
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
            _check_outputs(outputs, builds.reads, builds.written())
            gpu.driver()
            folder = building.keep or Path(stack.enter_context(TemporaryDirectory(prefix="qpass-bench-")))
            entries, measured_at, about = builds.make(folder, stage), builds.points, builds.about()
            notes = builds.notes()
        else:
            entries, notes, about = existing(paths, building), [], {}
            reads = [f for p in paths for f in (p, sidecar.of(p))]
            _check_outputs(outputs, [*reads, *(f for f in (file, building.library) if f is not None)], [])
            measured_at = _points_of([e.engine for e in entries if e.engine is not None], shapes, file)
        about = {"date": began.isoformat(timespec="seconds")} | about
        told = str(file) if file is not None else MADE_UP
        empty = Report(Machine.here(), method, told, (), (), tuple(notes), about, complete=False)
        return Measuring(empty, entries, stage, save or (lambda _: None)).run(measured_at)


def _points_of(engines: Sequence[Engine], shapes: Sequence[Shapes], file: Path | None) -> list[Point]:
    """Points of engines that exist: those given, else the usual shapes of the first. All engines take them."""
    proto = points.outline(engines[0])
    inputs = points.required(proto)
    usual = {n: tuple(p["opt"]) for n, p in engines[0].facts["profiles"].items()}
    found = [points.of_file(file, inputs)] if file is not None else []
    found = found or [points.made_up(proto, points.complete(said, inputs, usual)) for said in shapes or ({},)]
    for point in found:
        for engine in engines:
            points.fit(point, engine)
    return found


def _check_outputs(outputs: Iterable[str | Path], reads: Sequence[Path], written: Sequence[Path]) -> None:
    """Raise QpassError where an output cannot be written, or would be something that is read, kept or written too."""
    taken = {w.resolve() for w in written}
    for output in map(Path, outputs):
        check_place(output, reads)
        if output.resolve() in taken:
            raise QpassError(f"{output} would be written twice; choose another name")
        taken.add(output.resolve())
