"""`qpass bench`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import qpass.pipeline as pipeline
from qpass.engine.bench import plot, tables
from qpass.engine.bench.entries import Building
from qpass.engine.bench.job import bench as measure
from qpass.engine.bench.report import Report
from qpass.engine.bench.timing import Method
from qpass.engine.commands import (
    BackendName,
    Least,
    Level,
    Most,
    PluginLibrary,
    Precision,
    Shapes,
    TimingCache,
    Usual,
    Workspace,
)
from qpass.engine.profiles import parse
from qpass.errors import QpassError
from qpass.graph.commit import write
from qpass.options import NOT_MET, Calibration, GroupSize, Json, NoProgress, Quiet, bar, bytes_of
from qpass.spec import PRESETS

PROFILED = 20
"""Executions whose layers `--profile` times."""


def bench(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL|ENGINES...", help="A model to build of, or engines.", show_default=False),
    ],
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            "-p",
            help=f"Build an engine of it; may be given several times: {', '.join(PRESETS)}, or a YAML recipe. "
            f"Default: {pipeline.DEFAULT_PRESET}.",
        ),
    ] = None,
    group_size: GroupSize = None,
    calibration: Calibration = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Build the baseline of this model. Default: MODEL, unless it is rewritten.")
    ] = None,
    backend: BackendName = "auto",
    plugins: PluginLibrary = None,
    least: Least = None,
    usual: Usual = None,
    most: Most = None,
    timing_cache: TimingCache = None,
    workspace: Workspace = None,
    precision: Precision = None,
    level: Level = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="A folder for engines and rewritten models; what is the same there is used again."),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(help=f"Measure at these; may be given several times. {Shapes} Default: the usual ones."),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", "-i", help="An .npz file to measure on. Default: made-up inputs.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each engine at each shape.")] = 100,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="Replay a CUDA graph, or have TensorRT enqueue.")
    ] = True,
    warm_l2: Annotated[
        bool, typer.Option("--warm-l2", help="Do not overwrite the L2 cache; run untimed before each timed run.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Tell what time layers take.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write JSON: a .json file, or a folder for bench.json.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help=f"Draw the latencies: a file that ends in {', '.join(plot.FORMATS)}.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Measure engines on the GPU: of a model its baseline and quantized ones, built on the spot, or engines that exist.

    Example: `qpass bench model.onnx --preset w8a16 --preset w8a8 --shapes input_ids:1x128`
    """
    method = Method(runs, cuda_graph, not warm_l2, profiled_runs=PROFILED if profile else 0)
    spans = {f"{flag}_shapes": parse(text, flag) for flag, text in (("min", least), ("opt", usual), ("max", most))}
    building = Building(
        preset or (),
        group_size,
        calibration,
        baseline,
        backend,
        plugins,
        **spans,
        timing_cache=timing_cache,
        workspace=bytes_of("workspace", workspace),
        precision=precision,
        level=level,
        keep=keep,
    )
    document = _document(output) if output is not None else None
    if picture is not None:
        plot.check(picture)
    show = not (quiet or as_json or no_progress)
    command = shlex.join(["qpass", *sys.argv[1:]])

    def told(report: Report) -> str:
        return json.dumps({"command": command} | report.to_dict(), indent=1, ensure_ascii=False) + "\n"

    report = measure(
        files,
        building,
        method,
        shapes=[parse(text, "shapes") for text in shapes or ()],
        inputs=inputs,
        outputs=[p for p in (document, picture) if p is not None],
        stage=lambda what, data: bar(what, show, data),
        save=lambda report: write(document, told(report).encode()) if document is not None else None,
    )
    if as_json:
        typer.echo(told(report), nl=False)
    elif not quiet:
        Console(highlight=False, soft_wrap=True).print(tables.shown(report))
    if picture is not None:
        write(picture, plot.drawn(report, picture.suffix, command))
    if report.failed:
        raise typer.Exit(NOT_MET)


def _document(output: Path) -> Path:
    """The file that -o means."""
    if output.is_dir():
        return output / "bench.json"
    if output.suffix != ".json":
        raise QpassError(f"-o {output}: wants a file that ends in .json, or a folder that is there")
    return output
