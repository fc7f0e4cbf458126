"""What the graph tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def zoo() -> list[Path]:
    """The zoo's models: beside the repository, or where QPASS_ZOO says."""
    folder = Path(os.environ.get("QPASS_ZOO", ROOT.parent / "shared" / "zoo"))
    models = sorted(folder.glob("*.onnx"))
    if not models:
        pytest.skip(f"no model zoo in {folder}; set QPASS_ZOO")
    return models
