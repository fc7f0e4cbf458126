"""What the tests of calibrate share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qpass.testing import model

#: Two Linears behind an embedding; what they read is `h` [B, S, 8] and `r` [B, S, 16].
TEXT = """
<ir_version: 10, opset_import: ["" : 17]>
tiny (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask) => (float[batch, sequence, 4] y)
<float[50, 8] table, float[8, 16] w1, float[16] b1, float[16, 4] w2>
{
    h = Gather(table, input_ids)
    m = MatMul(h, w1)
    a = Add(m, b1)
    r = Relu(a)
    y = MatMul(r, w2)
}
"""

Arrays = dict[str, NDArray[Any]]
Sample = Callable[..., Path]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(model(TEXT), path)
    return path


def ids(count: int, length: int, seed: int = 0, left: bool = False) -> Arrays:
    """A batch of token ids, each sample a token shorter than the one before; the mask says where padding is."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < (length - np.arange(count) % length)[:, None]
    return {
        "input_ids": rng.integers(0, 50, (count, length)),
        "attention_mask": (mask[:, ::-1] if left else mask).astype(np.int64),
    }


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Three files of 4, 1 and 6 samples."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, (count, length) in enumerate([(4, 7), (1, 5), (6, 9)]):
        np.savez(folder / f"{i}.npz", **ids(count, length, seed=i))  # type: ignore[arg-type]
    return folder


def activations(path: Path, files: list[Path]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the two Linears of TEXT read of all tokens that count, [n, 8] and [n, 16], in NumPy."""
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    hidden = []
    for file in files:
        with np.load(file) as batch:
            hidden.append(weights["table"][batch["input_ids"]][batch["attention_mask"] > 0])
    h = np.concatenate(hidden)
    return h, np.maximum(h @ weights["w1"] + weights["b1"], 0)
