"""`qpass build` and `qpass run`: one function a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.filesize import decimal as size

import qpass.pipeline as pipeline
from qpass.engine import builder, sidecar
from qpass.engine.backends import NAMES
from qpass.engine.profiles import parse, profiles_of
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.graph.commit import Folder, check_place, explain
from qpass.options import (
    Calibration,
    GroupSize,
    Json,
    Model,
    NoProgress,
    Preset,
    Quiet,
    Rules,
    SpecFile,
    bar,
    bytes_of,
    chosen_spec,
)
from qpass.runtime import inputs_of, load

Shapes = "Shapes of inputs, such as input_ids:1x8,attention_mask:1x8."
BackendName = Annotated[
    str, typer.Option("--backend", help=f"auto (what builds for this machine's GPU), {', '.join(NAMES)}.")
]
PluginLibrary = Annotated[
    Path | None, typer.Option("--plugins", "-l", help="The plugin library. Default: the newest built.")
]
Least = Annotated[str | None, typer.Option("--min", "--minShapes", help=f"Smallest. {Shapes}")]
Usual = Annotated[str | None, typer.Option("--opt", "--optShapes", help=f"Usual. {Shapes}")]
Most = Annotated[str | None, typer.Option("--max", "--maxShapes", help=f"Largest. {Shapes}")]
TimingCache = Annotated[Path | None, typer.Option(help="A file that builds learn from. Default: one in the cache.")]
Workspace = Annotated[str | None, typer.Option(help="Bound on the memory of layers, such as 2GB.")]
Precision = Annotated[
    str | None, typer.Option(help="fp16 or fp32, of TensorRT 8.6; a later one takes the model's types.")
]
Level = Annotated[
    int | None, typer.Option(help="0 to 5: how long TensorRT searches for fast kernels. Default: its own.")
]


def build(
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: the model with .engine.")] = None,
    backend: BackendName = "auto",
    plugins: PluginLibrary = None,
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Build plugin nodes from TensorRT's own layers.")
    ] = False,
    target_arch: Annotated[
        str | None, typer.Option(help="Compute capability of the GPU that it is for, such as 89.")
    ] = None,
    least: Least = None,
    usual: Usual = None,
    most: Most = None,
    timing_cache: TimingCache = None,
    workspace: Workspace = None,
    precision: Precision = None,
    level: Level = None,
    preset: Preset = None,
    spec: SpecFile = None,
    group_size: GroupSize = None,
    calibration: Calibration = None,
    rules: Rules = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print all that TensorRT says.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Build a TensorRT engine and prove that every plugin node is in it. With a preset or recipe, rewrite first.

    Example: `qpass build model.qpass.onnx --min input_ids:1x1 --opt input_ids:1x128 --max input_ids:8x512`
    """
    shapes: dict[str, Any] = {
        "min_shapes": parse(least, "min"),
        "opt_shapes": parse(usual, "opt"),
        "max_shapes": parse(most, "max"),
    }
    show, err = not (quiet or as_json), Console(stderr=True, highlight=False, soft_wrap=True)
    memory, given = bytes_of("workspace", workspace), [f for f in (model, spec, calibration, *(rules or ())) if f]
    if preset or spec or group_size or calibration or rules:
        # what can be said to be wrong is said before hours of rewriting
        chosen = chosen_spec(preset, spec, group_size)
        tensorrt, capability = builder.backend_for(backend, target_arch)
        builder.check_flags(tensorrt, timing_cache, precision, level, plugins, not no_plugins)
        inputs = {n: i for n, i in inputs_of(load(model)).items() if not i.optional}
        profiles_of(inputs, *shapes.values())
        rewritten = pipeline.default_output(model)
        builder.check_places(output or rewritten.with_suffix(".engine"), [*given, rewritten], timing_cache)
        if not no_plugins:
            builder.check_library(tensorrt, capability, plugins)
        elif not tensorrt.expands_bodies:
            raise QpassError(f"--no-plugins: {tensorrt.name} {tensorrt.version()} cannot build qpass's ops itself")
        own = [r for f in rules or () for r in pipeline.load_rules(f)]
        with bar("writing", show and not no_progress, data=True) as progress:
            done = pipeline.rewrite(model, spec=chosen, calibration=calibration, rules=own, progress=progress)
        model = done.output
        if show:
            err.print(f"rewritten to {model} ({chosen.describe()})", markup=False)
    with bar("building", show and not no_progress) as progress:
        finished = builder.build_files(
            model,
            output,
            backend=backend,
            library=plugins,
            use_plugins=not no_plugins,
            target_arch=target_arch,
            **shapes,
            timing_cache=timing_cache,
            workspace=memory,
            precision=precision,
            level=level,
            keep=given,
            progress=progress,
            log=(lambda text: print(text, file=sys.stderr)) if verbose else None,
        )
    facts = finished.facts
    if as_json:
        typer.echo(json.dumps({**facts, "guessed": finished.guessed, "warnings": finished.warnings}, indent=1))
    elif not quiet:
        out = Console(highlight=False, soft_wrap=True)
        if finished.guessed:
            err.print(finished.guessed, markup=False)
        if finished.warnings and not verbose:
            count = len(finished.warnings)
            things = "thing" if count == 1 else "things"
            err.print(f"TensorRT warns of {count} {things}; --verbose prints them", markup=False)
        what = facts["backend"]
        promised = len(facts["plugin_layers"])
        proof = f"all {promised} plugin nodes are plugin layers" if promised else "no plugin nodes"
        out.print(
            f"{finished.engine} {size(facts['engine']['bytes'])} by {what['name']} {what['version']} for "
            f"{what['target']} in {facts['seconds']:.1f} s, {_settings(facts)}; {proof}\n"
            f"{finished.sidecar}\n{facts['commands']['load']}",
            markup=False,
        )


def _settings(facts: Mapping[str, Any]) -> str:
    """How an engine was built, in words."""
    told = ["the model's types" if facts["precision"] == "the model's" else facts["precision"]]
    told.append("TensorRT's own level" if facts["level"] is None else f"level {facts['level']}")
    if facts["workspace"] is not None:
        told.append(f"workspace up to {size(facts['workspace'])}")
    return ", ".join(told)


def run(
    engine: Annotated[Path, typer.Argument(help="The engine, with its .json beside it.", show_default=False)],
    inputs: Annotated[Path, typer.Option("--inputs", "-i", help="An .npz file keyed by input name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the outputs go, an .npz file.")],
    plugins: Annotated[
        Path | None, typer.Option("--plugins", "-l", help="The plugin library. Default: the one it was built with.")
    ] = None,
    cuda_graph: Annotated[bool, typer.Option(help="Replay a CUDA graph of the engine.")] = False,
) -> None:
    """Run an engine on the GPU.

    Example: `qpass run model.qpass.engine --inputs x.npz -o y.npz`
    """
    loaded = Engine(engine, cuda_graph, plugins)
    check_place(output, [inputs, engine, sidecar.of(engine), *([plugins] if plugins else [])])
    try:
        with np.load(inputs) as file:
            feeds = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise QpassError(f"{inputs}: not an .npz file that can be read: {error}") from error
    outputs = loaded.run(feeds)
    if cuda_graph:
        outputs = loaded.run(feeds)  # the first run is what is captured
    wide = {n: y.astype(np.float32) if y.dtype == ml_dtypes.bfloat16 else y for n, y in outputs.items()}
    try:
        with Folder(output.parent) as folder:
            fresh = folder.temporary(output.name)
            with open(fresh.path, "r+b") as file:
                np.savez(file, **wide)  # type: ignore[arg-type] # np.savez's names are any
            folder.commit([(fresh, output)], iter(()))
    except OSError as error:
        raise explain(error, output, 0) from error
    for name, y in outputs.items():
        typer.echo(f"{name} {y.dtype}{list(y.shape)}")
