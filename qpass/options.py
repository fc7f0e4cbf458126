"""What commands share: their options, the spec that these choose, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import qpass.pipeline as pipeline
from qpass.errors import QpassError
from qpass.spec import PRESETS, QuantSpec

DONE, NOT_MET, MISTAKE, BUG, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes."""

Model = Annotated[Path, typer.Argument(help="The model, an .onnx file.", show_default=False)]
Preset = Annotated[
    str | None, typer.Option("--preset", "-p", help=f"One of {', '.join(PRESETS)}. Default: {pipeline.DEFAULT_PRESET}.")
]
SpecFile = Annotated[Path | None, typer.Option("--spec", "-s", help="A YAML recipe instead of a preset.")]
GroupSize = Annotated[int | None, typer.Option("--group-size", "-g", help="32, 64 or 128, for groupwise presets.")]
Calibration = Annotated[Path | None, typer.Option("--calibration", "-c", help="Statistics made by `qpass calibrate`.")]
Rules = Annotated[list[Path] | None, typer.Option("--rules", "-r", help="A Python file with rules of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]


def chosen_spec(preset: str | None, file: Path | None, group_size: int | None) -> QuantSpec:
    """The spec that --preset, --spec and --group-size ask for; the default preset where none is given."""
    if preset is not None and file is not None:
        raise QpassError("--preset and --spec: give one of them; a recipe may name a preset with `preset:`")
    if file is None:
        return QuantSpec.preset(preset or pipeline.DEFAULT_PRESET, group_size)
    spec = QuantSpec.from_yaml(file)
    return spec if group_size is None else spec.with_group_size(group_size)


def bytes_of(flag: str, text: str | None) -> int | None:
    """'256MB' as bytes."""
    if text is None:
        return None
    units = {"": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}
    number = text.rstrip("KMGBkmgb")
    unit = text[len(number) :].upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise QpassError(f"--{flag} {text}: wants a size such as 256MB")
    return size


@contextmanager
def bar(what: str, shown: bool, data: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal's standard error, nothing elsewhere. With `data` it counts bytes."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    count = DownloadColumn() if data else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown_bar:
        task = shown_bar.add_task(what, total=None)
        yield lambda done, total: shown_bar.update(task, completed=done, total=total)
