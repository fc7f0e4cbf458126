"""What engines are measured: how they are made of a model, or those that exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from qpass.engine.bench.points import Shapes
from qpass.engine.run import Engine
from qpass.errors import QpassError


@dataclass(frozen=True)
class Building:
    """How engines are made of a model.

    Args:
        presets: or files of recipes (.yaml), an engine each, by default `qpass rewrite`'s; a model with plugin nodes is
            built as it is instead.
        group_size: for those of the presets that are groupwise.
        calibration: statistics of the model.
        baseline: what the baseline is built of, by default the model itself unless it has plugin nodes.
        backend, library, min_shapes, opt_shapes, max_shapes, timing_cache, workspace, precision, level: of all engines,
            as `qpass.engine.build_files` has them; by default the shapes span the measured ones.
        keep: a folder for the rewritten models and the engines, which are temporary otherwise.
    """

    presets: Sequence[str] = ()
    group_size: int | None = None
    calibration: Path | None = None
    baseline: Path | None = None
    backend: str = "auto"
    library: Path | None = None
    min_shapes: Shapes = field(default_factory=dict)
    opt_shapes: Shapes = field(default_factory=dict)
    max_shapes: Shapes = field(default_factory=dict)
    timing_cache: Path | None = None
    workspace: int | None = None
    precision: str | None = None
    level: int | None = None
    keep: Path | None = None


@dataclass(frozen=True)
class Entry:
    """An engine to measure.

    Args:
        engine: None where it could not be built, and why in `error`.
        recipe: of what was rewritten, as YAML.
        reused: whether it was built by an earlier bench.
        seconds: what its build took, None where it was there.
    """

    name: str
    kind: str
    engine: Engine | None
    seconds: float | None = None
    error: str | None = None
    recipe: str | None = None
    reused: bool = False


def existing(paths: Sequence[Path], how: Building) -> list[Entry]:
    """Engines that are there, with their sidecars.

    Raises:
        QpassError: one is missing or given twice, or something is asked for that only a build can do.
    """
    for f in fields(Building):
        if f.name not in ("library", "backend") and getattr(how, f.name) not in (None, (), [], {}):
            flag = {"presets": "preset"}.get(f.name, f.name.removesuffix("_shapes").replace("_", "-"))
            raise QpassError(f"--{flag} is for a model of which engines are built; {paths[0].name} is built already")
    stems = {p.stem for p in paths}
    if len({p.resolve() for p in paths}) < len(paths):
        raise QpassError(f"{', '.join(map(str, paths))}: an engine is given twice")
    entries = []
    for path in paths:
        engine = Engine(path, library=how.library)
        layers = engine.facts["plugin_layers"]
        outputs = ", ".join(sorted({dtype.name for dtype, _ in engine.outputs.values()}))
        kind = f"{'quantized' if layers else 'no plugins'}, {outputs} outputs"
        entries.append(Entry(path.stem if len(stems) == len(paths) else str(path), kind, engine))
    return entries
