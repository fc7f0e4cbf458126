"""The README's table of kernels, and which goals they reach, from what `qpass plugins bench -o FILE` wrote on a GPU.

python -m benchmarks.plugins benchmarks/results/plugins_h200.json
python -m benchmarks.plugins benchmarks/results/plugins_models_h200.json    # of a model's own sizes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import goals

NORM = "RmsnormQuantization"
SHOWN = (
    ("SmoothQuantGemm", "per-token", (1, 64, 1024, 4096), (8192, 8192)),
    ("WeightOnlyQuantMatmul", "int8", (1, 16, 64, 4096), (8192, 8192)),
    ("WeightOnlyGroupwiseQuantMatmul", "int4 g128", (1, 16, 64, 4096), (8192, 8192)),
    (NORM, "per-token", (1, 4096), (0, 4096)),
    (NORM, "per-token, residual", (4096,), (0, 4096)),
    ("QuantizePerToken", "", (4096,), (0, 4096)),
)
"""Op, variant, numbers of tokens, N and K."""


def table(results: dict[str, Any]) -> str:
    """The rows of `SHOWN` that were measured, as Markdown."""
    rows = {(r["op"], r["variant"], r["m"], r["n"], r["k"]): r for r in results["rows"]}
    lines = [
        "| kernel | M | N×K | µs | GB/s | TFLOP/s | of the floor | fastest peer | × |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for op, variant, tokens, (n, k) in SHOWN:
        for m in tokens:
            r = rows.get((op, variant, m, n, k))
            if r is None:
                continue
            name = f"{op}, {variant}" if variant else op
            flops = f"{r['tflop_per_s']:.0f}" if n else ""
            rates = f"{r['us']:.1f} | {r['gb_per_s']:.0f} | {flops}"
            peer = f"{r['best_peer']} | {r['times_best_peer']:.2f}" if r["best_peer"] else " | "
            size = f"{n}×{k}" if n else str(k)
            lines.append(f"| {name} | {m} | {size} | {rates} | {r['share_of_floor']:.0%} | {peer} |")
    return "\n".join(lines)


def sizes(results: dict[str, Any]) -> str:
    """Products by N×K and number of tokens, as Markdown: µs, and in brackets × the fastest peer."""
    rows = {(r["n"], r["k"], r["variant"], r["m"]): r for r in results["rows"] if r["n"]}
    tokens = sorted({m for *_, m in rows})
    lines = ["| N×K | kernel | " + " | ".join(map(str, tokens)) + " |", "|---" * (len(tokens) + 2) + "|"]
    for n, k in dict.fromkeys((n, k) for n, k, *_ in rows):
        for variant, name in (("int4 g128", "int4 g128"), ("int8", "int8"), ("per-token", "w8a8")):
            found = [rows[n, k, variant, m] for m in tokens]
            cells = [f"{r['us']:.1f} ({r['times_best_peer']:.2f})" for r in found]
            lines.append(f"| {n}×{k} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    results = goals.read(parser.parse_args().results)
    usual = any((r["op"], r["n"], r["k"]) == ("SmoothQuantGemm", 8192, 8192) for r in results["rows"])
    print(*((table(results), goals.table(results)) if usual else (sizes(results),)), sep="\n\n")


if __name__ == "__main__":
    main()
