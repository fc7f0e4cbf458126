"""Ops at the sizes of small encoders, where what a launch and a block cost once is most of a call.

    python -m benchmarks.small -o benchmarks/results/small.json

Times are µs a call, as `qpass plugins bench` takes them: `cold` with tensors that L2 does not have, `warm` with
what the call before left there. Of products every variant is timed, cold. A chain is what of one layer of MiniLM the
plugins do, calls one behind another: q, k, v behind one quantizer, o, up and down behind one each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import command
from qpass import gpu, plugins
from qpass.ops import REGISTRY
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.ours import Ours
from qpass.plugins.bench.timing import Timer
from qpass.plugins.tune.products import job as product

DTYPE = "float16"
ROWS = ((4096, 384), (4096, 1536), (2048, 4096), (4096, 4096))
OPS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], int | None], ...] = (
    ("QuantizePerToken", ("x",), ("q", "scale"), None),
    ("QuantizePerToken", ("x", "smoother"), ("q", "scale"), None),
    ("Layernorm", ("x", "residual", "gamma", "beta"), ("y",), None),
    ("Rmsnorm", ("x", "residual", "gamma"), ("y", "sum"), None),
    ("LayernormQuantization", ("x", "gamma", "beta"), ("q", "scale"), None),
    ("LayernormQuantization", ("x", "residual", "gamma", "beta", "smoother"), ("q", "scale", "y"), None),
    ("RmsnormQuantization", ("x", "gamma"), ("q", "scale"), None),
    ("RmsnormQuantization", ("x", "residual", "gamma"), ("q", "scale", "sum"), None),
    ("ActivationQuantization", ("x",), ("q", "scale"), 0),
    ("ActivationQuantization", ("x", "smoother"), ("q", "scale"), 0),
)
"""Op, inputs, outputs, activation."""
PRODUCTS = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (1024, 1024), (4096, 1024), (2048, 2048))
TOKENS = (1, 16, 32, 128, 512, 4096)
KINDS = ("w8a8", "w8a16")
CHAIN = (
    ("q", 384),
    (384, 384),
    (384, 384),
    (384, 384),
    ("q", 384),
    (384, 384),
    ("q", 384),
    (1536, 384),
    ("q", 1536),
    (384, 1536),
)
"""Of a layer: a quantizer of K values, or the N and K of a product."""


def rows(ours: Ours, timer: Timer) -> Iterator[dict[str, Any]]:
    for m, k in ROWS:
        for op, inputs, outputs, activation in OPS:
            attrs = {} if activation is None else {"activation": activation}
            job = Job(op, "", REGISTRY[op].attributes_for(list(inputs), list(outputs), attrs), m, 0, k)
            cold = timer.time(ours.calls(job, timer.copies(ours.bytes(job))))
            warm = timer.time(ours.calls(job, 1) * 8)
            yield {"op": op, "inputs": list(inputs), "m": m, "k": k, "cold": cold.us, "warm": warm.us}


def products(ours: Ours, timer: Timer) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        for m in TOKENS:
            for n, k in PRODUCTS:
                job = product((kind, n, k), m, DTYPE)
                runs = ours.calls(job, timer.copies(ours.bytes(job)))
                choice, us = runs[0].choice(), {}
                for variant in choice.variants:
                    for run in runs:
                        run.take(variant)
                    us[variant] = timer.time(runs).us
                yield {"kind": kind, "m": m, "n": n, "k": k, "rule": choice.rule, "cold": us}


def chains(ours: Ours, timer: Timer) -> Iterator[dict[str, Any]]:
    for m in (128, 4096):
        calls = []
        for n, k in CHAIN:
            quantizer = REGISTRY["QuantizePerToken"].attributes_for(["x"], ["q", "scale"], {})
            job = (
                Job("QuantizePerToken", "", quantizer, m, 0, k) if n == "q" else product(("w8a8", int(n), k), m, DTYPE)
            )
            calls += ours.calls(job, 1)
        yield {"m": m, "warm": timer.time(calls).us * len(calls)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    a = parser.parse_args()
    ours, timer = Ours(plugins.find(), DTYPE), Timer()
    told: dict[str, Any] = {"command": command("benchmarks.small"), "device": gpu.device().name(), "dtype": DTYPE}
    told["rows"], told["products"], told["chains"] = (list(f(ours, timer)) for f in (rows, products, chains))
    a.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
