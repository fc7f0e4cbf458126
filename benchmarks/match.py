"""Matching time over 1×, 8× and 64× the layers of a llama-shaped model: it must grow no faster than the model.

    python -m benchmarks.match [--base 2] [--repeat 3] [--json benchmarks/results/match.json]
    python -m benchmarks.match --models FOLDER [--json benchmarks/results/match_models.json]

Prints, per size, nodes, seconds to load (shape inference included) and to match and rewrite in memory (lift, quantize
by w8a8, unlift; nothing is written), the best of a few runs, and the ratio to the smallest.

With --models it takes every model of a folder instead, one after the other in one process, and prints what each rule
took of the time in which all rules looked for their matches, for the preset where it took most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.llama import Shape, build
from qpass.graph import Model
from qpass.rewriter import RuleStats
from qpass.rules import RULES, Lifted
from qpass.rules.quantizer import Quantizer
from qpass.spec import QuantSpec


def measure(path: Path, repeat: int) -> tuple[float, float, int]:
    """Seconds to load, seconds to match, nodes."""
    best_load, best_match, nodes = float("inf"), float("inf"), 0
    for _ in range(repeat):
        load, match, nodes, _ = once(path, "w8a8")
        best_load, best_match = min(best_load, load), min(best_match, match)
    return best_load, best_match, nodes


def once(path: Path, preset: str) -> tuple[float, float, int, dict[str, RuleStats]]:
    """Seconds to load, seconds to rewrite in memory, nodes, and what each rule did."""
    start = time.perf_counter()
    model = Model.load(path)
    loaded = time.perf_counter()
    nodes = len(model.graph.nodes)
    lifted = Lifted(model)
    quantizer = Quantizer(QuantSpec.preset(preset), lifted.survey, None)
    for stage in RULES:
        lifted.run(stage, quantizer)
    lifted.unlift()
    lifted.survey.settle(lifted.outcome)
    return loaded - start, time.perf_counter() - loaded, nodes, lifted.outcome.stats


def folder_of_models(folder: Path) -> dict[str, Any]:
    """Totals over every model of a folder, and per rule its largest share of the matching, over presets."""
    shares: dict[str, float] = defaultdict(float)
    totals: dict[str, dict[str, float]] = {}
    for preset in ("w8a16", "w4a16-g128", "w8a8"):
        seconds, matching, nodes = 0.0, defaultdict[str, float](float), 0
        for path in sorted(folder.glob("*.onnx")):
            _, match, count, stats = once(path, preset)
            seconds, nodes = seconds + match, nodes + count
            for name, s in stats.items():
                matching[name] += s.matching
        whole = sum(matching.values())
        totals[preset] = {"nodes": nodes, "rewrite_s": round(seconds, 3), "matching_s": round(whole, 3)}
        for name, s_ in matching.items():
            shares[name] = max(shares[name], s_ / whole)
    return {"totals": totals, "shares": {n: round(s, 3) for n, s in sorted(shares.items(), key=lambda i: -i[1])}}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("--base", type=int, default=2, help="layers at 1×")
    ap.add_argument("--repeat", type=int, default=3)
    ap.add_argument("--models", type=Path, help="a folder of models to take instead")
    ap.add_argument("--json", type=Path)
    a = ap.parse_args()
    if a.models is not None:
        found = folder_of_models(a.models)
        for preset, total in found["totals"].items():
            took = f"{total['rewrite_s']} s, of that matching {total['matching_s']} s"
            print(f"{preset:12} {total['nodes']} nodes: {took}")
        for name, share in found["shares"].items():
            print(f"{name:28}{share:>7.1%}")
        write(a.json, {"command": "python -m benchmarks.match --models FOLDER"} | found)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for factor in (1, 8, 64):
            layers = a.base * factor
            path = Path(folder) / f"{layers}.onnx"
            build(path, Shape(layers=layers, hidden=64, intermediate=96, heads=4, vocabulary=64))
            load, match, nodes = measure(path, a.repeat)
            rows.append({"factor": factor, "layers": layers, "nodes": nodes, "load_s": load, "match_s": match})
    print(f"{'layers':>8}{'nodes':>8}{'load s':>10}{'match s':>10}{'× first':>10}{'µs/node':>10}")
    for r in rows:
        ratio = r["match_s"] / rows[0]["match_s"]
        print(
            f"{r['layers']:>8}{r['nodes']:>8}{r['load_s']:>10.3f}{r['match_s']:>10.3f}{ratio:>10.1f}"
            f"{r['match_s'] / r['nodes'] * 1e6:>10.1f}"
        )
    write(a.json, {"command": "python -m benchmarks.match", "rows": rows})


def write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
