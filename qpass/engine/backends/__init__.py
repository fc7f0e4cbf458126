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


def choose(name: str = "auto", capability: str | None = None) -> Backend:
    """The backend of this name that is installed, or the first of all that are.

    Args:
        capability: of this machine's GPU, such as "89", where engines are for it: who cannot build for it is passed
            over. None for engines of any GPU.

    Raises:
        QpassError: there is none of this name, or it is not installed (says what to install), or none of those that are
            builds for this GPU.
    """
    if name not in ("auto", *NAMES):
        raise QpassError(f"--backend {name}: there are auto, {', '.join(NAMES)}")
    named = [b for b in BACKENDS if name in ("auto", b.name)]
    installed = [b for b in named if b.installed()]
    if installed:
        fitting = [b for b in installed if capability is None or capability in (b.capabilities() or (capability,))]
        if not fitting:
            raise QpassError(
                f"{installed[0].name} builds for compute capability {', '.join(installed[0].capabilities())}, this "
                f"GPU's is {capability}; choose another --backend, or another GPU with `qpass build --target-arch`"
            )
        return fitting[0]
    first = next((b for b in named if b.module is not None), named[0])
    if name == "auto":
        raise QpassError(f"no TensorRT is installed: {named[0].install} (builds engines without a GPU)")
    if first.module is not None:
        raise QpassError(f"{name} {first.version()} is installed, which qpass does not know; {first.install}")
    raise QpassError(f"{name} is not installed: {first.install}")
