"""The README's tables of engines, from what `qpass bench --profile -o FILE` and `benchmarks.engines_*` wrote on a GPU.

    python -m benchmarks.engines benchmarks/results

MiniLM is what samples/01_quickstart.py prepares, with statistics of its calibration sentences. The layer is made and
measured by

    python -m benchmarks.llama layer.onnx --bare --layers 1 --hidden 4096 --intermediate 11008 --heads 32
    qpass bench layer.onnx --backend tensorrt --preset w4a16-g128 --preset benchmarks/recipes/w4a16-g128-fused.yaml \\
        --preset w8a16 --preset w8a8 \\
        --shapes hidden_states:1x1x4096 --keep KEEP --profile -o benchmarks/results/engines_layer_1_h200.json
    qpass bench layer.onnx --backend tensorrt --preset w8a8 \\
        --shapes hidden_states:1x2048x4096 --keep KEEP --profile -o benchmarks/results/engines_layer_2048_h200.json

Latencies are medians; what plugins take, and what TensorRT's own layers do, is of the profile, where every layer takes
some µs more than within a run: it tells shares. The files lack layers of less than 0.05 µs, such as constants.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MODELS = {
    "minilm_1x128_h200": "MiniLM, 1×128",
    "minilm_1x128_h100": "MiniLM, 1×128",
    "minilm_32x128_h200": "MiniLM, 32×128",
    "layer_1_h200": "a 7B-size layer, 1 token",
    "layer_1_h100": "a 7B-size layer, 1 token",
    "layer_2048_h200": "a 7B-size layer, 2048 tokens",
}
"""What is measured, and on which GPU → how it is called."""


def latencies(results: Path) -> str:
    """A row an engine."""
    lines = [
        "| model | GPU | engine | µs | × FP16 | profiled: plugins | TensorRT's layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for stem, name in MODELS.items():
        told = json.loads((results / f"engines_{stem}.json").read_text())
        gpu = stem.rpartition("_")[2].upper()
        rows = told["points"][0]["results"]
        base = rows[0]["us"]["p50"]
        for row in rows:
            us = row["us"]["p50"]
            plugins = [layer for layer in row["layers"] if layer["is_plugin"]]
            others = [layer for layer in row["layers"] if not layer["is_plugin"]]
            parts = ", ".join(f"{layer['layers']} {layer['name']} {layer['us']:.0f}" for layer in plugins)
            own = f"{sum(layer['layers'] for layer in others)} in {sum(layer['us'] for layer in others):.0f}"
            engine = "FP16" if row["engine"] == "baseline" else row["engine"]
            lines.append(f"| {name} | {gpu} | {engine} | {us:.0f} | {base / us:.2f} | {parts} | {own} |")
    return "\n".join(lines)


def errors(results: Path, gpu: str = "h200") -> str:
    """A row a preset of the zoo's engines, with the model whose engine errs most."""
    told = json.loads((results / f"engines_zoo_{gpu}.json").read_text())
    rows: list[dict[str, Any]] = told["rows"]
    lines = [
        f"| preset | models of {told['models']} | largest error of an engine | of rounding alone | promised layers |",
        "|---|---|---|---|---|",
    ]
    for preset in (key for key in rows[0] if key != "model"):
        built = {row["model"]: row[preset] for row in rows if "error" not in row.get(preset, {"error": ""})}
        good = list(built.values())
        rounding = [one["rounding"] for one in good if "rounding" in one]
        layers = f"{sum(one['plugin_layers'] for one in good)} of {sum(one['promised'] for one in good)}"
        worst = max(built, key=lambda model: built[model]["engine"])
        shown = f"{built[worst]['engine']:.1e}, {worst}"
        alone = f"{max(rounding):.1e}" if rounding else ""
        lines.append(f"| {preset} | {len(good)} | {shown} | {alone} | {layers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    a = parser.parse_args()
    print(f"{latencies(a.results)}\n\n{errors(a.results)}")


if __name__ == "__main__":
    main()
