"""The CUDA plugins: compile them, find them, run and measure them.

Python needs neither CUDA nor TensorRT for any of this but running: `build` wants nvcc, `Library.ops` nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qpass.errors import QpassError
from qpass.plugins.compile import build, built, source_hash
from qpass.plugins.library import DeviceTensor, Library, OpInfo
from qpass.plugins.toolchain import ARCHITECTURES, INTERFACES, compiled_for, runs_on

__all__ = [
    "ARCHITECTURES",
    "INTERFACES",
    "Candidate",
    "DeviceTensor",
    "Library",
    "OpInfo",
    "build",
    "candidates",
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
    mine = [c for c in candidates(capability, interface) if c.of_this_version]
    if not mine:
        raise QpassError("the plugins are not compiled; compile them with `qpass plugins build`")
    return Library(mine[0].path)


@dataclass(frozen=True)
class Candidate:
    """A library in the cache. `against` is what speaks against it, "" for nothing."""

    path: Path
    interface: str
    architectures: tuple[str, ...]
    of_this_version: bool
    against: str


def candidates(capability: str | None = None, interface: str | None = None) -> list[Candidate]:
    """All libraries in the cache, those first that `find` prefers, of like ones the newer; arguments as there."""
    sources = source_hash()
    found = []
    for path, facts in built():
        made = tuple(map(str, _listed(facts.get("architectures"))))
        whose = str(facts.get("interface", "an interface not told"))  # what older versions compiled
        wrong = {
            "it is of another version's sources": facts.get("sources") != sources,
            f"its plugins are not of {interface}": interface not in (None, whose),
            f"it does not run on {capability}": capability is not None and not runs_on(made, capability),
        }
        against = "; ".join(why for why, is_so in wrong.items() if is_so)
        found.append((list(wrong.values()), Candidate(path, whose, made, facts.get("sources") == sources, against)))
    return [c for _, c in sorted(found, key=lambda f: f[0])]


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []
