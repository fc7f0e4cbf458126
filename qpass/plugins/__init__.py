"""The CUDA plugins: compile them, find them, run and measure them.

Python needs neither CUDA nor TensorRT for any of this but running: `build` wants nvcc, `Library.ops` nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from qpass.errors import QpassError
from qpass.plugins.compile import build, built, source_hash
from qpass.plugins.library import DeviceTensor, Library, OpInfo
from qpass.plugins.toolchain import ARCHITECTURES, INTERFACES, compiled_for, runs_on

__all__ = [
    "ARCHITECTURES",
    "INTERFACES",
    "DeviceTensor",
    "Library",
    "OpInfo",
    "build",
    "compiled_for",
    "find",
    "runs_on",
]


def find(path: str | Path | None = None, capability: str | None = None, interface: str | None = None) -> Library:
    """The compiled plugin library.

    Args:
        path: a library's file; by default what QPASS_PLUGINS names, else the newest in the cache that was made of this
            version's sources.
        capability: prefer one from the cache that runs on this compute capability, such as "89".
        interface: prefer one whose plugins have this interface of TensorRT's.

    Raises:
        QpassError: there is none; says how to make it.
    """
    named = path if path is not None else os.environ.get("QPASS_PLUGINS")
    if named:
        if not Path(named).is_file():
            raise QpassError(f"{named}: no such plugin library; make one with `qpass plugins build`")
        return Library(Path(named).resolve())
    sources = source_hash()
    mine = [(file, facts) for file, facts in built() if facts.get("sources") == sources]
    if not mine:
        raise QpassError("the plugins are not compiled; compile them with `qpass plugins build`")
    if interface is not None:
        mine = [m for m in mine if m[1].get("interface") == interface] or mine
    if capability is not None:
        fitting = [m for m in mine if runs_on(tuple(map(str, _listed(m[1]["architectures"]))), capability)]
        mine = fitting or mine
    return Library(mine[0][0])


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []
