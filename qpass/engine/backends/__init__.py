"""The TensorRTs that can build an engine, one file each."""

from __future__ import annotations

from qpass.engine.backends.base import Backend
from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.backends.tensorrt8 import TensorRT8
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.errors import QpassError

BACKENDS: tuple[Backend, ...] = (TensorRTRTX(), TensorRT(), TensorRT8())
"""Those first that need no GPU to build, and of one name the newer first."""
NAMES = tuple(dict.fromkeys(b.name for b in BACKENDS))

__all__ = ["BACKENDS", "NAMES", "Backend", "choose"]


def choose(name: str = "auto") -> Backend:
    """The backend of this name that is installed, or the first of all that are.

    Raises:
        QpassError: there is none of this name, or it is not installed; says what to install.
    """
    if name not in ("auto", *NAMES):
        raise QpassError(f"--backend {name}: there are auto, {', '.join(NAMES)}")
    named = [b for b in BACKENDS if name in ("auto", b.name)]
    installed = [b for b in named if b.installed()]
    if installed:
        return installed[0]
    first = next((b for b in named if b.module is not None), named[0])
    if name == "auto":
        raise QpassError(f"no TensorRT is installed: {named[0].install} (builds engines without a GPU)")
    if first.module is not None:
        raise QpassError(f"{name} {first.version()} is installed, which qpass does not know; {first.install}")
    raise QpassError(f"{name} is not installed: {first.install}")
