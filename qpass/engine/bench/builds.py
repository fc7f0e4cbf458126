"""Engines that are built on the spot of one model: its baseline, and one a preset."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto

import qpass.pipeline as pipeline
from qpass import gpu, plugins
from qpass.calibrate import Stats
from qpass.engine import backends, builder, sidecar
from qpass.engine.backends import Backend
from qpass.engine.bench import points, provenance
from qpass.engine.bench.entries import Building, Entry
from qpass.engine.bench.points import Point, Shapes
from qpass.engine.preflight import plugin_nodes
from qpass.engine.process import Worker
from qpass.engine.profiles import profiles_of
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.graph import Model
from qpass.graph.commit import check_place
from qpass.graph.dtypes import to_numpy
from qpass.graph.load import tensors
from qpass.spec import QuantSpec

Progress = Callable[[int, int], None]
Stage = Callable[[str, bool], AbstractContextManager[Progress | None]]
"""Shows a part of the work while it lasts: what it is, and whether its progress counts bytes."""

BASELINE = "baseline"


@dataclass(frozen=True)
class _Build:
    """An engine to be. `stem` begins the names of its files."""

    name: str
    kind: str
    model: Path
    stem: str
    spec: QuantSpec | None = None

    @property
    def recipe(self) -> str | None:
        return self.spec.to_yaml() if self.spec is not None else None

    def rewritten(self, folder: Path) -> Path:
        return folder / f"{self.stem}.onnx" if self.spec is not None else self.model

    def engine(self, folder: Path) -> Path:
        return folder / f"{self.stem}.engine"


class Builds:
    """The engines to build of a model, the baseline first.

    Args:
        shapes: the measured points, each as far as it is given; none for the usual shapes.
        file: inputs to measure on instead, an .npz file.

    Raises:
        QpassError: whatever can be known to be wrong before anything is rewritten or built.
    """

    def __init__(self, model: Path, how: Building, shapes: Sequence[Shapes] = (), file: Path | None = None) -> None:
        self._model, self._how = model, how
        backend = backends.choose(how.backend)
        if how.backend != "auto":  # which of them that is the GPU decides
            self._check_flags(backend)
        specs = self._specs()
        loaded = Model.load(model)
        base = loaded if how.baseline is None else Model.load(how.baseline)
        self._builds = self._listed(loaded, base, specs)
        library = plugins.find(how.library, interface=backend.interface).path
        self._reused: list[str] = []
        self._models: dict[Path, dict[str, Any]] = {}
        recipes = [Path(p) for p in how.presets if p.endswith((".yaml", ".yml"))]
        given = [*recipes, *(f for f in (how.calibration, file) if f is not None)]
        self.reads = [*loaded.weights.files(), *base.weights.files(), pipeline.ledger_of(model), *given, library]
        self._plan(loaded.proto, base.proto, shapes, file)
        if how.keep is not None:
            self._check_keep(how.keep)
        if how.timing_cache is not None:
            check_place(how.timing_cache, self.reads)
        if how.calibration is not None:
            Stats.load(how.calibration).check(model)

    def _check_flags(self, backend: Backend) -> None:
        how = self._how
        builder.check_flags(backend, how.timing_cache, how.precision, how.level, how.library, use_plugins=True)

    def _listed(self, loaded: Model, base: Model, specs: Mapping[str, QuantSpec]) -> list[_Build]:
        """The baseline and the others."""
        how, stem, done = self._how, self._model.name.removesuffix(".onnx"), bool(plugin_nodes(loaded))
        if done and (how.presets or how.group_size or how.calibration):
            raise QpassError(
                f"{self._model} was rewritten before and is built as it is; leave out --preset, --group-size and "
                "--calibration, or give its original"
            )
        if base is not loaded and plugin_nodes(base):
            raise QpassError(f"--baseline {how.baseline}: it was rewritten; give the model of before")
        builds = []
        if base is not loaded or not done:
            kind, name = f"unquantized, {float_type(base.proto)}", base.path.name.removesuffix(".onnx")
            builds.append(_Build(BASELINE, kind, base.path, f"{name}.{BASELINE}"))
        if done:
            return [*builds, _Build(stem, "rewritten before", self._model, stem)]
        for name, spec in specs.items():
            builds.append(_Build(name, spec.describe().removeprefix(f"{name}: "), self._model, f"{stem}.{name}", spec))
        return builds

    def _specs(self) -> dict[str, QuantSpec]:
        """Preset → spec, with the group size where it is groupwise."""
        specs: dict[str, QuantSpec] = {}
        for given in self._how.presets or (pipeline.DEFAULT_PRESET,):
            recipe = given.endswith((".yaml", ".yml"))
            spec = QuantSpec.from_yaml(given) if recipe else QuantSpec.preset(given)
            name = Path(given).stem if recipe else given
            if name in specs:
                raise QpassError(f"--preset {given}: there are two of this name")
            specs[name] = spec
            if specs[name].needs_calibration and self._how.calibration is None:
                command = f"qpass calibrate {self._model} --data FOLDER -o stats.npz"
                raise QpassError(f"--preset {name} needs --calibration; make statistics with `{command}`")
        if self._how.group_size is None:
            return specs
        sized: dict[str, QuantSpec] = {}
        refused: QpassError | None = None
        for name, spec in specs.items():
            try:
                sized[name] = spec.with_group_size(self._how.group_size)
            except QpassError as error:
                refused = error
        if not sized and refused is not None:
            raise refused
        return specs | sized

    def _plan(self, proto: ModelProto, base: ModelProto, shapes: Sequence[Shapes], file: Path | None) -> None:
        """Settle the points and the shapes that engines are built for."""
        how, inputs = self._how, points.required(proto)
        given = [points.of_file(file, inputs)] if file is not None else []
        wanted = [p.shapes for p in given] or [points.complete(s, inputs) for s in shapes]
        span = points.spanned(wanted, inputs, how.min_shapes, how.opt_shapes, how.max_shapes)
        profiles = profiles_of(inputs, *span)
        points.check_within(wanted, profiles)
        self.guessed = None if wanted else builder.guesses(profiles, inputs)
        usual = {n: p.opt for n, p in profiles.items()}
        self.points: list[Point] = given or [
            points.made_up(proto, s) for s in wanted or [points.complete({}, inputs, usual)]
        ]
        theirs = points.required(base)
        if theirs.keys() != inputs.keys():
            raise QpassError(
                f"--baseline {how.baseline} has the inputs {', '.join(theirs)}, {self._model} has {', '.join(inputs)}; "
                "give the model that it was made of"
            )
        self._least = {n: p.min for n, p in profiles.items()}
        self._usual = usual
        self._most = {n: p.max for n, p in profiles.items()}
        profiles_of(theirs, self._least, self._usual, self._most)

    def files(self, folder: Path) -> list[Path]:
        """All that is written into a folder."""
        found = []
        for b in self._builds:
            engine = b.engine(folder)
            found += [engine, sidecar.of(engine)]
            if b.spec is not None:
                found += [b.rewritten(folder), pipeline.ledger_of(b.rewritten(folder))]
        return found

    def written(self) -> list[Path]:
        """All that is written and stays."""
        how = self._how
        kept = self.files(how.keep) if how.keep is not None else []
        return kept if how.timing_cache is None else [*kept, how.timing_cache]

    def _check_keep(self, folder: Path) -> None:
        if not folder.is_dir():
            raise QpassError(f"--keep {folder}: there is no such folder; make it first")
        for path in self.files(folder):
            check_place(path, self.reads)
        for b in self._builds:
            builder.check_places(b.engine(folder), self.reads, self._how.timing_cache)

    def make(self, folder: Path, stage: Stage) -> list[Entry]:
        """Rewrite what is to be rewritten, then build, for this machine's GPU. What fails is an entry that says why.

        Raises:
            QpassError: the backend, or the library, is not for this GPU.
        """
        backend = backends.choose(self._how.backend, gpu.capability())
        self._check_flags(backend)
        if any(b.spec is not None for b in self._builds):
            builder.check_library(backend, None, self._how.library)
        found = self._kept(backend, folder) if self._how.keep is not None else {}
        self._reused = list(found)
        errors: dict[str, str] = {}
        for b in self._builds:
            if b.spec is not None and b.name not in found:
                try:
                    self._rewrite(b, b.spec, folder, stage)
                except QpassError as error:
                    errors[b.name] = f"it could not be rewritten: {error}"
        entries = []
        with Worker() as worker:
            for b in self._builds:
                kind = b.kind
                if b.name == BASELINE and backend.weakly_typed and self._how.precision != "fp32":
                    kind += ", FP16 where TensorRT finds it faster"
                engine, seconds = found.get(b.name), None
                if engine is None and b.name not in errors:
                    try:
                        engine, seconds = self._built(b, backend, folder, stage, worker)
                    except QpassError as error:
                        errors[b.name] = f"it could not be built: {error}"
                entries.append(Entry(b.name, kind, engine, seconds, errors.get(b.name), b.recipe, b.name in found))
        return entries

    def about(self) -> dict[str, Any]:
        """What is built of what and how, for JSON."""
        how = self._how
        base = next((b.model for b in self._builds if b.name == BASELINE), None)
        asked = {"backend": how.backend, "timing_cache": str(how.timing_cache) if how.timing_cache else None}
        return {
            "model": self._told_of(self._model),
            "baseline": self._told_of(base) if base is not None else None,
            "calibration": str(how.calibration) if how.calibration is not None else None,
            "building": asked | self._asked(),
        }

    def _asked(self) -> dict[str, Any]:
        """Flags and shapes, of all engines alike."""
        how, spans = self._how, {"min": self._least, "opt": self._usual, "max": self._most}
        shapes = {n: {key: list(span[n]) for key, span in spans.items()} for n in self._usual}
        return {"precision": how.precision, "level": how.level, "workspace": how.workspace, "shapes": shapes}

    def _origin(self, b: _Build) -> Any:
        return provenance.origin(self._told_of(b.model), b.recipe, self._how.calibration, self._asked())

    def _told_of(self, model: Path) -> dict[str, Any]:
        if model not in self._models:
            self._models[model] = provenance.of_model(model)
        return self._models[model]

    def _kept(self, backend: Backend, folder: Path) -> dict[str, Engine]:
        """What an earlier bench left here and would be built the same now."""
        library = plugins.find(self._how.library, gpu.capability(), backend.interface).path
        found = {}
        for b in self._builds:
            try:
                engine = Engine(b.engine(folder), library=self._how.library)
            except QpassError:  # none, or half of a pair
                continue
            if provenance.fits(engine, self._origin(b), backend, library):
                found[b.name] = engine
        return found

    def _rewrite(self, b: _Build, spec: QuantSpec, folder: Path, stage: Stage) -> None:
        with stage(f"rewriting {b.name}", True) as progress:
            pipeline.rewrite(
                b.model, b.rewritten(folder), spec=spec, calibration=self._how.calibration, progress=progress
            )

    def _built(self, b: _Build, backend: Backend, folder: Path, stage: Stage, worker: Worker) -> tuple[Engine, float]:
        with stage(f"building {b.name}", False) as progress:
            done = builder.build_files(
                b.rewritten(folder),
                b.engine(folder),
                backend=backend.name,
                library=self._how.library,
                min_shapes=self._least,
                opt_shapes=self._usual,
                max_shapes=self._most,
                timing_cache=self._how.timing_cache,
                workspace=self._how.workspace,
                precision=self._how.precision,
                level=self._how.level,
                keep=self.reads,
                origin=self._origin(b),
                progress=progress,
                worker=worker,
            )
        return Engine(done.engine, library=self._how.library), done.facts["seconds"]

    def notes(self) -> list[str]:
        """What one must know of how the engines were made."""
        told = [self.guessed] if self.guessed is not None else []
        if self._reused:
            told.append(
                f"used again from {self._how.keep}, not built: {', '.join(self._reused)}; model, recipe, flags, "
                "shapes, plugins, GPU, TensorRT and qpass are the same"
            )
        backend = backends.choose(self._how.backend, gpu.capability())
        first = self._builds[0]
        if first.kind == "unquantized, float32" and not backend.weakly_typed:
            told.append(
                f"the baseline computes in float32, as {first.model.name} does: {backend.name} keeps a model's types; "
                "--baseline takes a float16 export of it"
            )
        return told


def float_type(proto: ModelProto) -> str:
    """The float type that most bytes of a model's weights have."""
    sizes: Mapping[int, list[int]] = {TensorProto.FLOAT: [], TensorProto.FLOAT16: [], TensorProto.BFLOAT16: []}
    for tensor in tensors(proto):
        if tensor.data_type in sizes:
            sizes[tensor.data_type].append(math.prod(tensor.dims) * to_numpy(tensor.data_type).itemsize)
    return str(to_numpy(max(sizes, key=lambda kind: sum(sizes[kind]))).name)
