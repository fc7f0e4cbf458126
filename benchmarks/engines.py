"""The README's tables of engines, from what `qpass bench --profile -o FILE` and `benchmarks.engines_*` wrote on a GPU.

    python -m benchmarks.engines benchmarks/results

MiniLM is what samples/01_quickstart.py prepares, with statistics of its calibration sentences. The layer is made by

    python -m benchmarks.llama layer.onnx --layers 1 --hidden 4096 --intermediate 11008 --heads 32 --vocabulary 128
    qpass build layer.onnx -o fp16_2048.engine --backend tensorrt --opt input_ids:1x2048
    qpass rewrite layer.onnx -o w8a8.onnx --preset w8a8
    qpass build w8a8.onnx -o w8a8_2048.engine --backend tensorrt --opt input_ids:1x2048

and so on, or at once by `qpass bench layer.onnx --preset w8a8 --shapes input_ids:1x2048 --profile`.

Latencies are medians; what plugins take, and what TensorRT's own layers do, is of the profile, where every layer takes
some µs more than within a run: it tells shares.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MODELS = {
    "minilm_1x128": "MiniLM, 1×128",
    "minilm_32x128": "MiniLM, 32×128",
    "layer_1": "a 7B-size layer, 1 token",
    "layer_2048": "a 7B-size layer, 2048 tokens",
}
"""What is measured → how it is called."""


def latencies(results: Path, gpu: str = "h200") -> str:
    """A row an engine."""
    lines = [
        "| model | engine | µs | × FP16 | profiled: plugins | TensorRT's layers |",
        "|---|---|---|---|---|---|",
    ]
    for stem, name in MODELS.items():
        told = json.loads((results / f"engines_{stem}_{gpu}.json").read_text())
        rows = told["points"][0]["results"]
        base = rows[0]["us"]["p50"]
        for row in rows:
            us = row["us"]["p50"]
            plugins = [layer for layer in row["layers"] if layer["is_plugin"]]
            others = [layer for layer in row["layers"] if not layer["is_plugin"]]
            parts = ", ".join(f"{layer['layers']} {layer['name']} {layer['us']:.0f}" for layer in plugins)
            own = f"{sum(layer['layers'] for layer in others)} in {sum(layer['us'] for layer in others):.0f}"
            engine = row["engine"].removesuffix(stem.rpartition("_")[2]).rstrip("_")
            engine = "FP16" if engine in ("baseline", "fp16") else engine
            lines.append(f"| {name} | {engine} | {us:.0f} | {base / us:.2f} | {parts} | {own} |")
    return "\n".join(lines)


def errors(results: Path, gpu: str = "h200") -> str:
    """A row a preset of the zoo's engines."""
    told = json.loads((results / f"engines_zoo_{gpu}.json").read_text())
    rows: list[dict[str, Any]] = told["rows"]
    lines = [
        f"| preset | models of {told['models']} | largest error of an engine | of rounding alone | promised layers |",
        "|---|---|---|---|---|",
    ]
    for preset in (key for key in rows[0] if key != "model"):
        good = [row[preset] for row in rows if "error" not in row.get(preset, {"error": ""})]
        rounding = [one["rounding"] for one in good if "rounding" in one]
        layers = f"{sum(one['plugin_layers'] for one in good)} of {sum(one['promised'] for one in good)}"
        worst = max(one["engine"] for one in good)
        alone = f"{max(rounding):.1e}" if rounding else ""
        lines.append(f"| {preset} | {len(good)} | {worst:.1e} | {alone} | {layers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    a = parser.parse_args()
    print(f"{latencies(a.results)}\n\n{errors(a.results)}")


if __name__ == "__main__":
    main()
