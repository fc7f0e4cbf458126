"""The GPU's clocks, and the versions of what was measured."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess

from qpass import gpu

_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
_PACKAGES = ("torch", "triton", "humming-kernels", "nvidia-cublas", "pycuda")


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the GPU now, by its own names, in MHz, °C and W; nothing where it says nothing."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    command = [smi, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        asked = [*command, "-i", gpu.device().pci_bus_id()]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    words = [w.strip() for w in told.stdout.strip().split(",")]
    return dict(zip(_FIELDS, words, strict=True)) if not told.returncode and len(words) == len(_FIELDS) else {}


def versions(cuda: str) -> dict[str, str]:
    """Of the packages that are installed, and the CUDA that the plugins were compiled with."""
    found = {"cuda": cuda}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
