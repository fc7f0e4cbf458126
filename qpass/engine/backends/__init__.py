"""The TensorRTs that can build an engine, one file each."""

from __future__ import annotations

from qpass.engine.backends.base import Backend
from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.errors import QpassError

BACKENDS: dict[str, Backend] = {b.name: b for b in (TensorRTRTX(), TensorRT())}
"""By name, those first that need no GPU to build."""

__all__ = ["BACKENDS", "Backend", "choose"]


def choose(name: str = "auto") -> Backend:
    """A backend by name, or the first that is installed.

    Raises:
        QpassError: there is none of this name, or it is not installed; says what to install.
    """
    if name == "auto":
        installed = [b for b in BACKENDS.values() if b.installed()]
        if installed:
            return installed[0]
        first = next(iter(BACKENDS.values()))
        raise QpassError(f"no TensorRT is installed: {first.install} (builds engines without a GPU)")
    if name not in BACKENDS:
        raise QpassError(f"--backend {name}: there are auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    if not backend.installed():
        raise QpassError(f"{backend.name} is not installed: {backend.install}")
    return backend
