"""The command line: one function a command, no logic of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import qpass.pipeline as pipeline
from qpass import report
from qpass.engine import commands as engine
from qpass.engine import sidecar
from qpass.engine.bench.command import bench
from qpass.errors import QpassError
from qpass.options import (
    BUG,
    DONE,
    INTERRUPTED,
    MISTAKE,
    NOT_MET,
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
from qpass.plugins.commands import app as plugins_app
from qpass.rewriter import PatternError
from qpass.rules import LIFT, MERGE, NORM_PLUGINS, RULES
from qpass.runs import last_run, remember
from qpass.spec import PRESETS, QuantSpec

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Rewrite the norms, Linears and MatMuls of an ONNX transformer into quantized plugin nodes.",
)
spec_app = typer.Typer(no_args_is_help=True, help="Show and check what is quantized and how.")
app.add_typer(spec_app, name="spec")
app.add_typer(plugins_app, name="plugins")
app.command("build")(engine.build)
app.command("run")(engine.run)
app.command("bench")(bench)

ReportPage = Annotated[
    Path | None, typer.Option("--report", help="Write a page of the run: ledger, layers, sizes, near misses, rules.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qpass {version('qpass')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def rewrite(
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: MODEL with .qpass.onnx.")] = None,
    preset: Preset = None,
    spec: SpecFile = None,
    group_size: GroupSize = None,
    calibration: Calibration = None,
    rules: Rules = None,
    require_coverage: Annotated[
        str | None, typer.Option(help="Exit with 1 where fewer Linears were rewritten, such as 100%.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Bound on the weights held at a time, such as 256MB.")] = None,
    profile_rules: Annotated[bool, typer.Option(help="Tell tries, hits and time of each rule.")] = False,
    report_page: ReportPage = None,
    as_json: Json = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Quantize a model: MODEL.qpass.onnx and a ledger of every site.

    Example: `qpass rewrite model.onnx --preset w4a16-g128 --require-coverage 100%`
    """
    chosen = chosen_spec(preset, spec, group_size)
    least = _share(require_coverage)
    own = [r for f in rules or () for r in pipeline.load_rules(f)]
    show = not (quiet or as_json)
    if report_page is not None:
        report.check_place(report_page, model, output or pipeline.default_output(model), calibration, spec)
    with bar("writing", show and not no_progress, data=True) as progress:
        done = pipeline.rewrite(
            model,
            output,
            spec=chosen,
            calibration=calibration,
            rules=own,
            progress=progress,
            max_memory=bytes_of("max-memory", max_memory),
        )
    remember(report.stats_of(done.outcome.stats))
    if report_page is not None:
        report.write_page(report_page, done, _all_rules(own), timed=profile_rules)
    out = report.console()
    if as_json:
        typer.echo(json.dumps(report.as_json(done), indent=1))
    elif not quiet:
        if preset is None and spec is None:
            out.print(f"no --preset and no --spec, so {chosen.describe()}")
        out.print(report.rewritten(done, report_page))
        if profile_rules:
            out.print(report.profile(done.outcome.stats, _all_rules(own)))
    if least is not None and (gap := pipeline.check_coverage(done.ledger, least)):
        report.console(stderr=True).print(gap, markup=False)
        raise typer.Exit(NOT_MET)


@app.command()
def explain(
    model: Model,
    rule: Annotated[str | None, typer.Option(help="Only this rule's near misses.")] = None,
    preset: Preset = None,
    spec: SpecFile = None,
    group_size: GroupSize = None,
    calibration: Calibration = None,
    rules: Rules = None,
    site: Annotated[str | None, typer.Option(help="Tell all about the sites that hold this node; a glob.")] = None,
    limit: Annotated[int, typer.Option(help="How many to print.")] = 20,
) -> None:
    """Say why sites were not rewritten, and which patterns almost matched where.

    Example: `qpass explain model.onnx --preset w8a8 --rule quantize_norm`
    """
    own = [r for f in rules or () for r in pipeline.load_rules(f)]
    known = {r.name for _, r in _all_rules(own)}
    if rule is not None and rule not in known:
        raise QpassError(f"--rule {rule}: no such rule; there are {', '.join(sorted(known))}")
    done = pipeline.rewrite(
        model, spec=chosen_spec(preset, spec, group_size), calibration=calibration, rules=own, dry_run=True
    )
    out = report.console()
    told = report.about_site(done, site) if site is not None else report.explained(done, rule, limit)
    for line in told:
        out.print(line, markup=False)


@app.command()
def inspect(
    model: Model,
    preset: Preset = None,
    spec: SpecFile = None,
    group_size: GroupSize = None,
    calibration: Calibration = None,
    report_page: ReportPage = None,
    as_json: Json = False,
) -> None:
    """Show a model's norms and Linears, and what a preset would do with them; writes nothing.

    Example: `qpass inspect model.onnx --preset w8a8`
    """
    if report_page is not None:
        report.check_place(report_page, model, None, calibration, spec)
    done = pipeline.rewrite(model, spec=chosen_spec(preset, spec, group_size), calibration=calibration, dry_run=True)
    if report_page is not None:
        report.write_page(report_page, done, _all_rules([]))
    if as_json:
        typer.echo(json.dumps(report.as_json(done) | {"model": report.facts(done)}, indent=1))
    else:
        report.console().print(report.inspected(done))


@app.command()
def calibrate(
    model: Model,
    data: Annotated[
        list[Path], typer.Option("--data", "-d", help=".npz files keyed by input name, or folders of them.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the statistics go, an .npz file.")],
    mask: Annotated[
        str | None, typer.Option(help="Input that says which tokens count. Default: attention_mask.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Tokens to sample of each activation.")] = 256,
    force: Annotated[bool, typer.Option(help="Run again even where the statistics are there.")] = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Run a model over samples and keep statistics of its activations.

    Example: `qpass calibrate model.onnx --data samples/ -o stats.npz`
    """
    from qpass.calibrate import calibrate as run

    say = report.console(stderr=True)
    with bar("calibrating", not quiet and not no_progress) as progress:
        stats = run(
            model, data, output, mask=mask, rows=rows, progress=progress, force=force, note=None if quiet else say.print
        )
    if not quiet:
        report.console().print(report.calibrated(stats, model, output))


@app.command()
def verify(
    original: Annotated[Path, typer.Argument(help="The model as it was.", show_default=False)],
    rewritten: Annotated[Path, typer.Argument(help="The rewritten model, or an engine.", show_default=False)],
    data: Annotated[
        list[Path] | None, typer.Option("--data", "-d", help=".npz files or folders; made up if absent.")
    ] = None,
    layers: Annotated[bool, typer.Option(help="Find the first site where the two part.")] = False,
    minimum: Annotated[float, typer.Option("--min-cosine", help="Exit with 1 below this cosine similarity.")] = 0.99,
    mask: Annotated[
        str | None, typer.Option(help="Input that says which tokens count. Default: attention_mask.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Of an engine: exit with 1 above this relative error from its own model. Default: 0.01, or in fp16 "
            "twice what rounding to float16 does, if that is more."
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--rewritten", help="Of an engine: its model. Default: by its name, beside it.")
    ] = None,
    plugins: Annotated[
        Path | None, typer.Option("--plugins", "-l", help="Of an engine: the library. Default: what it was built with.")
    ] = None,
    as_json: Json = False,
    no_progress: NoProgress = False,
) -> None:
    """Compare a rewritten model, or on the GPU an engine of it, with its original in ONNX Runtime.

    Example: `qpass verify model.onnx model.qpass.onnx --data samples/ --layers`
    """
    from qpass.engine.verify import EngineReport, verify_engine
    from qpass.verify import verify as run

    is_engine = rewritten.suffix == ".engine" or sidecar.is_one(sidecar.of(rewritten))
    if is_engine and layers:
        raise QpassError("--layers: an engine shows no layer's output; compare the model that it was built of")
    of_engines = {"--tolerance": tolerance, "--rewritten": model, "--plugins": plugins}
    if not is_engine and (given := [flag for flag, value in of_engines.items() if value is not None]):
        raise QpassError(f"{given[0]} is of engines, and {rewritten} is none; leave it out")
    with bar("verifying", not as_json and not no_progress) as progress:
        asked: dict[str, Any] = {"data": data, "minimum": minimum, "mask": mask, "progress": progress}
        found = (
            verify_engine(original, rewritten, rewritten=model, tolerance=tolerance, library=plugins, **asked)
            if is_engine
            else run(original, rewritten, layers=layers, **asked)
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    elif isinstance(found, EngineReport):
        report.console().print(report.verified_engine(found))
    else:
        report.console().print(report.verified(found))
    if not found.passed:
        raise typer.Exit(NOT_MET)


@spec_app.command("show")
def spec_show(
    preset: Annotated[str, typer.Argument(help=f"One of {', '.join(PRESETS)}, or a YAML recipe.")],
    group_size: GroupSize = None,
) -> None:
    """Print a preset as a YAML recipe, to start one of your own.

    Example: `qpass spec show w4a16-g128 > recipe.yaml`
    """
    recipe = Path(preset)
    spec = (
        chosen_spec(None, recipe, group_size)
        if recipe.suffix in (".yaml", ".yml")
        else chosen_spec(preset, None, group_size)
    )
    typer.echo(spec.to_yaml(), nl=False)


@spec_app.command("list")
def spec_list() -> None:
    """List the presets.

    Example: `qpass spec list`
    """
    report.console().print(report.presets())


@spec_app.command("schema")
def spec_schema(output: Annotated[Path | None, typer.Option("-o", "--output")] = None) -> None:
    """Write the JSON Schema of recipes, for editors.

    Example: `qpass spec schema -o recipe.schema.json`
    """
    text = json.dumps(QuantSpec.json_schema(), indent=1) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise QpassError(f"{output}: cannot be written: {error.strerror}") from error


@app.command()
def rules(rules: Rules = None) -> None:
    """List the rules in the order they run, with file and line, and their hits in the last run.

    Example: `qpass rules`
    """
    own = [r for f in rules or () for r in pipeline.load_rules(f)]
    report.console().print(report.rules(_all_rules(own), last_run()))


def _all_rules(own: list[Any]) -> list[tuple[str, Any]]:
    stages = [("lift", LIFT), ("merge", (MERGE,)), ("quantize", RULES), ("norms", (NORM_PLUGINS,))]
    return [("own", r) for r in own] + [(name, r) for name, group in stages for stage in group for r in stage]


def _share(text: str | None) -> float | None:
    """'97.5%' or '0.975' as a share."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise QpassError(f"--require-coverage {text}: wants a percentage such as 100%") from None


def main() -> None:
    """Entry point: one line for a user's mistake, exit codes 0 done, 1 not met, 2 mistake, 3 bug."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer returns for Ctrl-C
            _complain("interrupted", INTERRUPTED)
    except QpassError as error:
        sys.exit(_complain(str(error), MISTAKE))
    except typer.Exit as leave:
        code = leave.exit_code
    except TyperException as error:
        usage = getattr(error, "format_message", error.__str__)()
        sys.exit(_complain(f"{usage.rstrip()} — see `qpass --help` and `qpass COMMAND --help`", MISTAKE))
    except PatternError as error:
        sys.exit(_complain(f"rule error: {error}", MISTAKE))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_complain("interrupted", INTERRUPTED))
    except BrokenPipeError:
        sys.exit(DONE)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        import traceback

        traceback.print_exc()
        sys.exit(_complain(f"this is a bug of qpass: {type(error).__name__}: {error}", BUG))
    sys.exit(code if isinstance(code, int) else DONE)


def _complain(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
