"""MiniLM's presets as engines on this machine's GPU: sentence embeddings beside ONNX Runtime's on the CPU.

    PYTHONPATH=samples python -m benchmarks.engines_minilm -o benchmarks/results/engines_minilm_h200.json

Cosines are of the embeddings of 320 sentences with those of the original model in ONNX Runtime, the mean and the worst:
`cpu` of the rewritten model in ONNX Runtime (what samples/01_quickstart.py prints), `gpu` of the engine.
Latency is `qpass bench`'s. `--resume` keeps the rows that the file has already.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from minilm import Batch, embed, mean_pool, prepare, save_batches, sentences, tokenize
from numpy.typing import NDArray

import qpass
from benchmarks.record import Record, command
from qpass import engine as engines
from qpass import gpu
from qpass.engine import backends

RUNS: list[tuple[str | None, int | None]] = [(None, None), ("w8a16", None), ("w8a8", None), ("w8a8-static", None)]
RUNS += [(preset, group) for preset in ("w4a16-g128", "w4a16-g128-zp") for group in (128, 32)]
"""Preset and group size; none for the model as it is."""
LIMIT = 1e-3
"""How far the mean cosine of an engine may be from that of its model on the CPU."""


def embed_on_gpu(engine: engines.Engine, batches: Sequence[Batch]) -> NDArray[np.float32]:
    hidden = [engine.run(batch)["last_hidden_state"].astype(np.float32) for batch in batches]
    return np.concatenate([mean_pool(h, b["attention_mask"]) for h, b in zip(hidden, batches, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/minilm"), help="folder for models and engines")
    parser.add_argument("--backend", default="tensorrt")
    parser.add_argument("--level", type=int, help="as in qpass build; it is no matter for the numbers")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output has already")
    a = parser.parse_args()
    model = prepare(a.work)
    calibration, evaluation = sentences()
    stats = qpass.calibrate(model, [save_batches(tokenize(calibration), a.work / "calibration")], a.work / "stats.npz")
    batches = tokenize(evaluation)
    want = embed(model, batches)
    longest = max(b["input_ids"].shape[1] for b in batches)
    largest = max(b["input_ids"].shape[0] for b in batches)
    shapes = {key: [(n, length) for n, length in ((1, 2), (16, 32), (largest, longest))] for key in batches[0]}
    least, usual, most = ({key: s[i] for key, s in shapes.items()} for i in range(3))
    backend = backends.choose(a.backend)
    about = {
        "command": f"PYTHONPATH=samples {command('benchmarks.engines_minilm')}",
        "device": gpu.device().name(),
        "backend": f"{backend.name} {backend.version()}",
        "sentences": len(evaluation),
        "limit": LIMIT,
    }
    runs = {f"{preset or 'unquantized'}{f'-group{group}' if group else ''}": (preset, group) for preset, group in RUNS}
    record = Record(a.output, about, ["preset"], [(name,) for name in runs], a.resume)
    with engines.Worker() as worker:
        for (name,) in record.missing:
            preset, group = runs[name]
            built_of = model
            if preset is not None:
                spec = qpass.QuantSpec.preset(preset, group)
                built_of = qpass.rewrite(model, a.work / f"{name}.onnx", spec=spec, calibration=stats).output
            engine = engines.build(
                built_of,
                a.work / f"{name}.engine",
                backend=a.backend,
                min_shapes=least,
                opt_shapes=usual,
                max_shapes=most,
                level=a.level,
                worker=worker,
            )
            cosines = {"cpu": embed(built_of, batches), "gpu": embed_on_gpu(engine, batches)}
            row: dict[str, Any] = {"preset": name, "plugin_layers": len(engine.facts["plugin_layers"])}
            for where, got in cosines.items():
                cosine = (got * want).sum(axis=1)
                row[where] = {"mean": float(cosine.mean()), "worst": float(cosine.min())}
            row["within"] = abs(row["gpu"]["mean"] - row["cpu"]["mean"]) <= LIMIT
            row["megabytes"] = engine.path.stat().st_size / 1e6
            row["seconds"] = engine.facts["seconds"]
            record.add(row)


if __name__ == "__main__":
    main()
