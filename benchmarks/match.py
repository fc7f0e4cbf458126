"""Matching time over 1×, 8× and 64× the layers of a llama-shaped model: it must grow no faster than the model.

    python -m benchmarks.match [--base 2] [--repeat 3] [--json benchmarks/results/match.json]

Prints, per size, nodes, seconds to load (shape inference included) and to match and rewrite in memory (lift, quantize
by w8a8, unlift; nothing is written), the best of a few runs, and the ratio to the smallest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.llama import Shape, build
from qpass.graph import Model
from qpass.rules import RULES, Lifted
from qpass.rules.quantizer import Quantizer
from qpass.spec import QuantSpec


def measure(path: Path, repeat: int) -> tuple[float, float, int]:
    """Seconds to load, seconds to match, nodes."""
    best_load, best_match, nodes = float("inf"), float("inf"), 0
    for _ in range(repeat):
        start = time.perf_counter()
        model = Model.load(path)
        loaded = time.perf_counter()
        nodes = len(model.graph.nodes)
        lifted = Lifted(model)
        quantizer = Quantizer(QuantSpec.preset("w8a8"), lifted.survey, None)
        for stage in RULES:
            lifted.run(stage, quantizer)
        lifted.unlift()
        lifted.survey.settle(lifted.outcome)
        done = time.perf_counter()
        best_load, best_match = min(best_load, loaded - start), min(best_match, done - loaded)
    return best_load, best_match, nodes


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("--base", type=int, default=2, help="layers at 1×")
    ap.add_argument("--repeat", type=int, default=3)
    ap.add_argument("--json", type=Path)
    a = ap.parse_args()
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
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"command": "python -m benchmarks.match", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
