"""Kills writers at random moments and looks at what they leave: `python -m tests.graph.kill_writer FOLDER KILLS`.

A process of its own, because it forks: each writer saves two outputs in turn over the same target until it is killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import onnx

from qpass.graph import Model
from qpass.graph import save as save_module
from qpass.graph import stream as stream_module
from tests.graph.models import linear_model, quantize_all, save


def write(folder: Path, number: int) -> None:
    model = Model.load(folder / f"in{number}.onnx")
    quantize_all(model)
    model.save(folder / "out" / "m.onnx", sidecars={folder / "out" / "m.ledger.json": b"%d" % number})


def state(folder: Path) -> tuple[str, bytes]:
    """The whole of an output: its graph with all weights, and its ledger."""
    graph = onnx.load(folder / "m.onnx")  # fails where data is missing or short
    return hashlib.sha256(graph.SerializeToString()).hexdigest(), (folder / "m.ledger.json").read_bytes()


def main(folder: Path, kills: int) -> None:
    save_module.INSIDE = save_module.INSIDE_AS_BEFORE = 0
    stream_module.BLOCK = 64 << 10
    (folder / "out").mkdir()
    whole = {}
    for number in range(2):
        save(linear_model(4, 256, 256, seed=number), folder / f"in{number}.onnx", external=True)
        start = time.perf_counter()
        write(folder, number)
        whole[state(folder / "out")[0]] = b"%d" % number
    seconds = time.perf_counter() - start
    strays = mixes = 0
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            while True:
                for number in range(2):
                    write(folder, number)
        time.sleep(random.uniform(0.2, 3) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        graph, ledger = state(folder / "out")
        assert graph in whole, f"kill {kill} left a mix"
        assert ledger in whole.values(), f"kill {kill} left half a ledger"
        mixes += whole[graph] != ledger
        strays += len(list((folder / "out").iterdir())) > 3
    write(folder, 0)
    left = sorted(p.name for p in (folder / "out").iterdir())
    assert len(left) == 3, left
    assert mixes <= 1, mixes  # ledger and graph are two renames, some 10 µs apart: once is bad luck
    print(f"{kills} kills, {strays} of them left strays until the next run, {mixes} a new ledger beside the old graph")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
