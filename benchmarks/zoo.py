"""A folder of models with inputs: NAME.onnx, and beside it NAME.npz with each input as in:NAME."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray[Any, Any]]


def models_of(zoo: Path, pattern: str) -> list[Path]:
    """The models whose file names match, sorted.

    Raises:
        SystemExit: there are none, or one has no inputs beside it.
    """
    models = sorted(zoo.glob(pattern))
    if not models:
        raise SystemExit(f"{zoo}: no model matches {pattern}; --models says which to take")
    for model in models:
        if not model.with_suffix(".npz").is_file():
            raise SystemExit(f"{model}: its inputs, {model.stem}.npz, are not beside it")
    return models


def inputs_of(model: Path) -> Feeds:
    """A model's inputs by name."""
    with np.load(model.with_suffix(".npz")) as file:
        return {k.removeprefix("in:"): file[k] for k in file.files if k.startswith("in:")}
