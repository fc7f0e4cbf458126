"""`qpass plugins …`: one function a command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qpass import gpu, plugins
from qpass.errors import QpassError
from qpass.graph.commit import check_place, write
from qpass.ops import REGISTRY
from qpass.options import NOT_MET, Json, Quiet, bar
from qpass.plugins.library import Library
from qpass.plugins.toolchain import installed_tensorrt
from qpass.plugins.tune.table import beside, read, to_text

app = typer.Typer(no_args_is_help=True, help="Compile, inspect, test and measure the CUDA plugins.")

LibraryFile = Annotated[
    Path | None, typer.Option("--library", "-l", help="A library's file. Default: QPASS_PLUGINS, or the newest built.")
]
Ops = Annotated[list[str] | None, typer.Option("--op", help="Only this op; may be given several times.")]


@app.command()
def build(
    arch: Annotated[
        list[str] | None,
        typer.Option(help=f"Compute capability: {', '.join(plugins.ARCHITECTURES)}. Default: this machine's GPUs."),
    ] = None,
    own: Annotated[list[Path] | None, typer.Option("--with", help="A .cpp or .cu file with an op of your own.")] = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(help="Whose plugins: 8.6, or 10 for 10, 11 and RTX. Default: what is installed."),
    ] = None,
    tensorrt_include: Annotated[Path | None, typer.Option(help="Folder of TensorRT's own headers.")] = None,
    jobs: Annotated[int | None, typer.Option("-j", "--jobs", help="Compilers at a time. Default: one a core.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Copy the library here.")] = None,
    force: Annotated[bool, typer.Option(help="Compile everything again.")] = False,
    quiet: Quiet = False,
) -> None:
    """Compile the plugin library into the cache; what is compiled already is not compiled again.

    With -o the table that `plugins tune` made for it goes along.

    Example: `qpass plugins build --arch 90a`
    """
    if output is not None:
        check_place(output, own or ())
    with bar("compiling", not quiet) as progress:
        library = plugins.build(
            arch or (),
            extra=own or (),
            tensorrt=tensorrt,
            tensorrt_include=tensorrt_include,
            jobs=jobs,
            force=force,
            progress=progress,
        )
    if output is not None:
        check_place(output, [library.path])
        tables = read(beside(library.path))
        write(output, library.path.read_bytes())
        if tables:
            write(beside(output), to_text(tables).encode())
        library = Library(output.resolve())
    if not quiet:
        typer.echo(f"{library.path} for {', '.join(library.architectures)}, {library.interface}")


@app.command()
def info(
    library: LibraryFile = None,
    every: Annotated[bool, typer.Option("--all", help="List all libraries, and why one is taken by default.")] = False,
    as_json: Json = False,
) -> None:
    """List the ops of a library with their versions, attributes and tensors, and the architectures it runs on.

    Example: `qpass plugins info`
    """
    if every:
        if library is not None:
            raise QpassError("--all and --library: give one of them")
        _list_all(as_json)
        return
    found = plugins.find(library)
    tuned = {device: len(entries) for device, entries in read(beside(found.path)).items()}
    if as_json:
        typer.echo(json.dumps({"path": str(found.path), "tuned": tuned} | found.description, indent=1))
        return
    d = found.description
    out = Console(highlight=False)
    out.print(
        f"{found.path}\narchitectures {', '.join(found.architectures)}; {d['interface']}; CUDA {d['cuda']}",
        soft_wrap=True,
    )
    for device, entries in tuned.items():
        out.print(f"tuned for {device}: {entries} lines of {beside(found.path)}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "version", "attributes", "inputs → outputs"):
        table.add_column(name, overflow="fold")
    for op in found.ops.values():
        tensors = [
            ", ".join(f"({t['name']})" if t["when"] else t["name"] for t in side) for side in (op.inputs, op.outputs)
        ]
        table.add_row(op.name, op.version, ", ".join(op.fields), " → ".join(tensors))
    out.print(table)


@app.command()
def selftest(
    library: LibraryFile = None,
    op: Ops = None,
    quick: Annotated[bool, typer.Option(help="A part of the cases, for compute-sanitizer.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every kernel on the GPU and compare it with the NumPy reference; exits with 1 where one differs.

    Example: `qpass plugins selftest --op SmoothQuantGemm`
    """
    from qpass.plugins.cases import every_case
    from qpass.plugins.selftest import selftest as run

    cases = every_case(_known(op), quick)
    with bar("testing", not quiet and not as_json) as progress:
        tallies = run(plugins.find(library), cases, progress)
    failed = [t for t in tallies if not t.passed]
    if as_json:
        typer.echo(json.dumps([vars(t) | {"passed": t.passed} for t in tallies], indent=1))
    elif not quiet:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("op", "dtype", "cases", "variants", "failed", "worst ÷ limit", "limit", "integers", "off by one"):
            table.add_column(name, justify="left" if name in ("op", "dtype") else "right")
        for t in tallies:
            shown = (f"{t.worst:.2f}", f"{t.limit:.0e}") if t.limit else ("", "")
            variants = max(1, len(t.variants) - 1)  # without the library's choice
            counts = str(t.cases), str(variants), str(len(t.failures))
            table.add_row(t.op, t.dtype, *counts, *shown, str(t.integers), str(t.off_by_one))
        Console(highlight=False).print(table)
    for t in failed:
        for text in t.failures[:10]:
            print(text, file=sys.stderr)
        if len(t.failures) > 10:
            print(f"… {len(t.failures) - 10} more of {t.op} {t.dtype}", file=sys.stderr)
        if not t.failures:
            print(f"{t.op} {t.dtype}: {t.off_by_one} of {t.integers} integers are off by one", file=sys.stderr)
    if failed:
        raise typer.Exit(NOT_MET)


@app.command()
def bench(
    library: LibraryFile = None,
    op: Annotated[
        list[str] | None, typer.Option("--op", "--only", help="Only this op; may be given several times.")
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option("--m", help="Only so many tokens, such as 1,16,256; may be given several times.")
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", help="Only weights NxK, or K of ops without one; may be given several times."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16, float16 or float32.")] = "bfloat16",
    quick: Annotated[bool, typer.Option(help="Fewer sizes.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Beside PyTorch, torch.compile and Humming too.")] = False,
    skip_peer: Annotated[
        list[str] | None, typer.Option(help="A peer to leave out, by its column's name; may be given several times.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the results as JSON, with every row anew.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on where the run that wrote this file ended. Output: this file, if no -o.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the kernels on the GPU: µs, share of the floor, and × the fastest peer; by default the peer is cuBLAS.

    Example: `qpass plugins bench --peers --op SmoothQuantGemm -o results.json`
    """
    from qpass.plugins.bench.jobs import DTYPES, jobs, shape
    from qpass.plugins.bench.peers import PEERS
    from qpass.plugins.bench.report import tables
    from qpass.plugins.bench.results import Earlier
    from qpass.plugins.bench.session import Session

    if dtype not in DTYPES:
        raise QpassError(f"--dtype {dtype}: wants one of {', '.join(DTYPES)}")
    for name in skip_peer or ():
        if name not in PEERS:
            raise QpassError(f"--skip-peer {name}: there are {', '.join(PEERS)}")
    sizes = [m for text in tokens or () for m in _numbers("m", text)]
    todo = jobs(_known(op), sizes, [shape(s) for s in shapes or ()], quick)
    target = output or resume
    if target is not None:
        check_place(target, [])
    earlier = None if resume is None else Earlier.read(resume)  # before what needs a GPU
    wanted = [p for p in (PEERS if peers else ["cuBLAS"]) if p not in (skip_peer or ())]
    session = Session(plugins.find(library), dtype, wanted, shlex.join(["qpass", *sys.argv[1:]]), target)
    if earlier is not None:
        session.results.resume(earlier)
    with bar("timing", not as_json) as progress:
        session.run(todo, progress)
    told = session.results.to_dict()
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        return
    out = Console(highlight=False)
    for part in tables(told):
        out.print(part)


@app.command()
def tune(
    models: Annotated[list[Path] | None, typer.Argument(help="Rewritten models, whose products are timed.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="A weight NxK; may be given several times.")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Only products such as w8a8, w8a16 or w4a16-g128; may be given several times."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--m", help="Numbers of tokens, such as 1,16,256. Default: 1 to 8192.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16 or float16.")] = "bfloat16",
    library: LibraryFile = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The table. Default: where the library looks for it.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time every kernel that a product of a shape can go by, and write the fastest into the library's table.

    Example: `qpass plugins tune model.w8a8.onnx --shape 8192x8192 --m 1,16,64,256,1024`
    """
    from qpass.plugins.bench.jobs import shape
    from qpass.plugins.bench.ours import Ours
    from qpass.plugins.bench.timing import Timer
    from qpass.plugins.tune.products import TOKENS, products
    from qpass.plugins.tune.report import record, table_of
    from qpass.plugins.tune.session import Tuner

    if dtype not in ("bfloat16", "float16"):
        raise QpassError(f"--dtype {dtype}: wants bfloat16 or float16; products of float32 activations go one way only")
    sizes = TOKENS if tokens is None else _numbers("m", tokens)
    todo = products(models or (), [shape(s) for s in shapes or ()], kinds or ())
    found = plugins.find(library)
    target = beside(found.path) if output is None else output
    check_place(target, [found.path, *(models or ())])
    read(target)  # tells now what is wrong with it
    timer, name = Timer(), gpu.device().name()
    with bar("timing", not quiet and not as_json) as progress:
        rows = Tuner(timer, Ours(found, dtype), name, target).run(todo, sizes, progress)
    if as_json:
        told = record(rows, name, dtype, shlex.join(["qpass", *sys.argv[1:]]), found.description["cuda"])
        typer.echo(json.dumps(told, indent=1))
    elif not quiet:
        out = Console(highlight=False)
        out.print(table_of(rows, name))
        out.print(f"{target} has it", soft_wrap=True, markup=False)


def _numbers(flag: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(w.isascii() and w.isdigit() and int(w) for w in words):
        raise QpassError(f"--{flag} {text}: wants whole numbers above 0 between commas, such as 1,16,256")
    return [int(w) for w in words]


def _list_all(as_json: bool) -> None:
    """Every library that there is for this machine's GPU and TensorRT, the one that builds take first."""
    capability, interface = next(iter(gpu.capabilities()), None), plugins.INTERFACES[installed_tensorrt()]
    known = plugins.candidates(capability, interface)
    rows: list[dict[str, object]] = []
    if named := os.environ.get("QPASS_PLUGINS"):
        there = plugins.find(named)
        whose = {"interface": there.interface, "architectures": list(there.architectures)}
        rows.append({"path": str(there.path)} | whose | {"taken": True, "why": "QPASS_PLUGINS names it"})
    for c in known:
        taken = not rows and c.of_this_version
        why = "; ".join(filter(None, ("nothing fits better" if taken and c.against else "", c.against)))
        why = why or ("it is the newest that fits" if taken else "another comes before it")
        row = {"path": str(c.path), "interface": c.interface, "architectures": list(c.architectures)}
        rows.append(row | {"taken": taken, "why": why})
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    out = Console(highlight=False, soft_wrap=True)
    if not rows:
        out.print("the plugins are not compiled; compile them with `qpass plugins build`", markup=False)
        return
    for r in rows:
        made = ", ".join(map(str, r["architectures"]))  # type: ignore[call-overload]
        out.print(
            f"{r['path']}\n  {r['interface']} for {made}; {'taken' if r['taken'] else 'not taken'}: {r['why']}",
            markup=False,
        )


def _known(ops: list[str] | None) -> list[str]:
    for name in ops or ():
        if name not in REGISTRY:
            raise QpassError(f"--op {name}: there are {', '.join(REGISTRY)}")
    return ops or []
