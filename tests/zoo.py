"""The model zoo: small exports of real architectures with ground truth. It lies beside the repository, or where
QPASS_ZOO says; where there is none, its tests are skipped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

FOLDER = Path(os.environ.get("QPASS_ZOO", Path(__file__).parents[2] / "shared" / "zoo"))

FEW = ("bert_ts14", "gemma_dynamo", "gpt2_dynamo_fp16", "llama_past_ts", "phi_ts", "t5_dynamo")
"""One of each exporter, dtype and way to write a norm."""


def each(*stems: str) -> pytest.MarkDecorator:
    """Parametrizes a test's `path` by the zoo's models, or those named."""
    paths = [p for p in sorted(FOLDER.glob("*.onnx")) if not stems or p.stem in stems]
    if not paths:
        reason = f"no model zoo in {FOLDER}; set QPASS_ZOO"
        return pytest.mark.parametrize("path", [pytest.param(None, marks=pytest.mark.skip(reason))])
    return pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in paths])


def truth(path: Path) -> dict[str, Any]:
    """What torch's modules were, traced while the model ran."""
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def rtn(path: Path, preset: str) -> float:
    """Relative error of plain round-to-nearest quantization of the same Linears."""
    table: dict[str, dict[str, float]] = json.loads((path.parent / "rtn.json").read_text())
    return table[path.stem][preset]


def samples(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Inputs, and the outputs that torch has for them."""
    data = np.load(path.with_suffix(".npz"))
    return (
        {k[3:]: data[k] for k in data.files if k.startswith("in:")},
        {k[4:]: data[k] for k in data.files if k.startswith("out:")},
    )
