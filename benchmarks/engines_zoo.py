"""Every model of a zoo in three presets as an engine on this machine's GPU, its outputs against ONNX Runtime's.

    python -m benchmarks.engines_zoo ZOO -o benchmarks/results/engines_zoo_h200.json

For each model: an engine of it as it is, and one of each rewritten model with every plugin layer that its ledger
promises. Errors are ‖a − b‖ / ‖a‖ of an output: `engine` of the engine from ONNX Runtime on the same model (kernels
and types), `quantization` of the rewritten model from the original in ONNX Runtime. The worst output counts.

w8a8 is built twice, with activations in float16 and in float32. In float16 an int8 code is off by one where float32
and float16 are on either side of half; `rounding` says what that does without any engine: it is the error of the
model in ONNX Runtime, its activations rounded to float16, from the same model (`qpass.engine.rounding`).

The file is written after every model, the small ones first; `--resume` measures those that it lacks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

import qpass
from benchmarks.record import Record, command
from benchmarks.zoo import Feeds, inputs_of, models_of
from qpass import engine as engines
from qpass import gpu
from qpass.engine.verify import verify_engine
from qpass.engine.worker import die_with_parent
from qpass.errors import QpassError
from qpass.ops import REGISTRY

RUNS: dict[str, tuple[str | None, int | None, str]] = {
    "unquantized": (None, None, "fp16"),
    "w8a16": ("w8a16", None, "fp16"),
    "w4a16-g128": ("w4a16-g128", 32, "fp16"),
    "w8a8": ("w8a8", None, "fp16"),
    "w8a8, fp32": ("w8a8", None, "fp32"),
}
"""Preset, a group size that the zoo's small Linears have, and precision."""
LIMIT = 5e-3
"""Of `engine`, on every output."""
WORKER = engines.Worker()
"""Each process that measures has one, for all its models."""


def measure(model: Path, backend: str, level: int | None) -> dict[str, Any]:
    """What one model's engines were."""
    found: dict[str, Any] = {"model": model.stem}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = Path(shutil.copyfile(model, folder / model.name))
        feeds: dict[str, Any] = inputs_of(model)
        np.savez(folder / "inputs.npz", **feeds)
        for name, run in RUNS.items():
            try:
                found[name] = one(copy, *run, feeds, backend, level)
            except QpassError as error:
                found[name] = {"error": str(error)}
                if name == "unquantized":  # what cannot be built as it is, is not asked for quantized
                    break
    return found


def one(
    model: Path,
    preset: str | None,
    group_size: int | None,
    precision: str,
    feeds: Feeds,
    backend: str,
    level: int | None,
) -> dict[str, Any]:
    """Build, run and compare one engine."""
    promised: set[str] = set()
    built_of = model
    if preset is not None:
        spec = qpass.QuantSpec.preset(preset, group_size)
        done = qpass.rewrite(model, model.with_name(f"{preset}-{precision}.onnx"), spec=spec)
        built_of = done.output
        sites = [s for s in done.ledger.sites if s.status == "rewritten"]
        promised = {n for s in sites for n in s.new_nodes if n.rpartition(".")[2] in REGISTRY}
    shapes = {name: x.shape for name, x in feeds.items()}
    built = engines.build_files(
        built_of, backend=backend, opt_shapes=shapes, precision=precision, level=level, worker=WORKER
    ).facts
    report = verify_engine(model, built_of.with_suffix(".engine"), rewritten=built_of, data=model.parent / "inputs.npz")
    rounding = {"rounding": max(o.relative_error for o in report.rounding)} if report.rounding else {}
    return {
        "engine": max(o.relative_error for o in report.arithmetic),
        "quantization": max(o.relative_error for o in report.quantization),
        **rounding,
        "cosine": min(o.worst_cosine for o in report.outputs if o.worst_cosine is not None),
        "plugin_layers": len(built["plugin_layers"]),
        "promised": len(promised),
        "all_promised": promised <= set(built["plugin_layers"]),
        "proof": built["proof"],
        "seconds": built["seconds"],
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line a preset."""
    lines = []
    for preset in RUNS:
        asked = [r[preset] for r in rows if preset in r]
        good = [a for a in asked if "error" not in a]
        worst = max((a["engine"] for a in good), default=0.0)
        within = sum(a["engine"] <= LIMIT and (preset == "unquantized" or a["all_promised"]) for a in good)
        lines.append(f"{preset}: {len(asked)} models, {len(good)} built, {within} within {LIMIT:g}, worst {worst:.2g}")
    return "\n".join(lines)


def begin() -> None:
    """Ready a process that measures: it ends with its parent, and leaves Ctrl-C to that."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, help="folder of NAME.onnx and NAME.npz with inputs as in:NAME")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--models", default="*_ts*.onnx", help="which of them")
    parser.add_argument("--backend", default="tensorrt")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--level", type=int, help="as in qpass build; it is no matter for the numbers")
    parser.add_argument("--resume", action="store_true", help="keep what the output has already")
    a = parser.parse_args()
    models = models_of(a.zoo, a.models)
    backend = engines.backends.choose(a.backend)
    about = {
        "command": command("benchmarks.engines_zoo"),
        "device": gpu.device().name(),
        "backend": f"{backend.name} {backend.version()}",
        "limit": LIMIT,
        "models": len(models),
    }
    record = Record(a.output, about, ["model"], [(m.stem,) for m in models], a.resume)
    missing = {stem for (stem,) in record.missing}
    # small ones first: a kill costs the models in work, and then most are done
    waiting = sorted((m for m in models if m.stem in missing), key=lambda m: m.stat().st_size)
    spawn = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    with ProcessPoolExecutor(a.jobs, mp_context=spawn, initializer=begin) as pool:
        try:
            for done in as_completed(pool.submit(measure, m, a.backend, a.level) for m in waiting):
                record.add(done.result())
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C, which would measure the rest
    print(summary(record.rows))


if __name__ == "__main__":
    main()
