"""Where the numbers come from: models, engines and libraries told so that a result can be made again, or used again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qpass
from qpass import gpu
from qpass.calibrate.stats import model_fingerprint
from qpass.engine import sidecar
from qpass.engine.backends import Backend
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.plugins import Library


def of_model(path: Path) -> dict[str, Any]:
    """A model by its path, the sha256 of its file, and a fingerprint that covers weights in other files, too.

    Raises:
        QpassError: it cannot be read.
    """
    return {"path": str(path), "sha256": sidecar.digest(path), "fingerprint": model_fingerprint(path)}


def of_engine(engine: Engine) -> dict[str, Any]:
    """What its sidecar tells of a build; None for what that of an older version does not."""
    told = {key: engine.facts.get(key) for key in ("model", "precision", "level", "workspace", "profiles")}
    return {"sha256": engine.facts["engine"]["sha256"], **told}


def of_library(path: Path) -> dict[str, Any]:
    """A plugin library by its name, sha256, and what it says of itself where it can be loaded."""
    told: dict[str, Any] = {"name": path.name, "sha256": sidecar.digest(path)}
    try:
        library = Library(path)
        return told | {"architectures": list(library.architectures), "interface": library.interface}
    except QpassError:
        return told


def origin(model: Mapping[str, Any], recipe: str | None, calibration: Path | None, asked: Mapping[str, Any]) -> Any:
    """All that decides what a build on this machine gives but TensorRT and the library: of one origin, one engine.

    Args:
        model: as `of_model` tells it; where it lies does not matter.
        recipe: None for a model that is built as it is.
        asked: flags and shapes.
    """
    return {
        "model": model["fingerprint"],
        "recipe": recipe,
        "calibration": sidecar.digest(calibration) if recipe is not None and calibration is not None else None,
        "qpass": _sources(),
        "gpu": f"{gpu.device().name()} {gpu.capability()}",
        "asked": dict(asked),
    }


def fits(engine: Engine, wanted: Any, backend: Backend, library: Path) -> bool:
    """Whether an engine is of this origin, and one that this TensorRT built with this library."""
    if engine.facts.get("origin") != wanted:
        return False
    backend.preload()
    built_by, plugins = engine.facts["backend"], engine.facts["plugins"]
    if (built_by["name"], built_by["version"]) != (backend.name, backend.load().__version__):
        return False
    return plugins is None or plugins["sha256"] == sidecar.digest(library)


def _sources() -> str:
    """A digest of qpass itself: whoever works on a rule wants an engine of the new one."""
    digest = hashlib.sha256()
    for file in sorted(Path(qpass.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
