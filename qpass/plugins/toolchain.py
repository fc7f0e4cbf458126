"""What compiles the plugins: nvcc, a host compiler, CMake, ninja and CUTLASS's headers, wherever they are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qpass import gpu
from qpass.errors import QpassError

INSTALL = "pip install 'qpass[plugins]'"
ARCHITECTURES = ("80", "86", "87", "89", "90", "90a", "100a", "120")
"""Compute capabilities that kernels are written for. 80 runs on every 8.x but 8.7, 120 on every 12.x, others on their
own. 90 is Hopper by the kernels of the other architectures: slower than 90a, and how those can be tested on it."""
JETSON = ("87",)
"""Those of Jetson: their code runs nowhere else, and no other's runs there."""
WITHOUT_GPU = ("80", "90a")
"""What is compiled where no GPU says what is wanted."""

INTERFACES = {"8": "IPluginV2DynamicExt", "10": "IPluginV3"}
"""The plugin interface of TensorRT 8.6, and of 10, 11 and RTX."""


@dataclass(frozen=True)
class Toolchain:
    """Everything that a build of the plugins runs.

    Args:
        nvcc: the compiler, and `version` what it calls itself.
        libraries: folder of libcudart_static.a, None where nvcc finds it by itself.
        cutlass: folder with include/ and tools/util/include/.
    """

    nvcc: Path
    version: str
    libraries: Path | None
    cmake: Path
    ninja: Path
    cutlass: Path

    def environment(self) -> dict[str, str]:
        """The environment that CMake and ninja run in."""
        env = dict(os.environ) | {"CUDACXX": str(self.nvcc)}
        if self.libraries is not None:
            env["LIBRARY_PATH"] = os.pathsep.join([str(self.libraries), *filter(None, [env.get("LIBRARY_PATH")])])
        return env


def find() -> Toolchain:
    """The tools of this machine.

    Raises:
        QpassError: one of them is missing; says all that are, and what to install.
    """
    missing = []
    nvcc = _nvcc()
    if nvcc is None:
        missing.append("nvcc (looked at CUDA_HOME, PATH and pip's nvidia-cuda-nvcc)")
    cmake, ninja = _tool("cmake"), _tool("ninja")
    missing += [name for name, found in (("cmake", cmake), ("ninja", ninja)) if found is None]
    cutlass = _cutlass()
    if cutlass is None:
        missing.append("CUTLASS's headers (looked at CUTLASS_HOME and pip's nvidia-cutlass)")
    if missing or nvcc is None or cmake is None or ninja is None or cutlass is None:
        raise QpassError(f"the plugins cannot be compiled, since there is no {', no '.join(missing)}: {INSTALL}")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise QpassError("the plugins cannot be compiled, since there is no C++ compiler: apt-get install g++")
    static = nvcc.parents[1] / "lib" / "libcudart_static.a"  # pip's; CUDA's own installer has lib64, which nvcc knows
    return Toolchain(nvcc, _version(nvcc), static.parent if static.exists() else None, cmake, ninja, cutlass)


def installed_tensorrt() -> str:
    """The key of `INTERFACES` for the TensorRT of this environment; the newer where there is none."""
    for package in ("tensorrt", "tensorrt-bindings"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return "8" if importlib.metadata.version(package).startswith("8.") else "10"
    return "10"


def gpu_architectures() -> tuple[str, ...]:
    """What of `ARCHITECTURES` this machine's GPUs want; none where there is no GPU."""
    return tuple(sorted({compiled_for(c) for c in gpu.capabilities()} - {""}))


def compiled_for(capability: str) -> str:
    """The best of `ARCHITECTURES` for a compute capability; "" where none runs there."""
    return next((a for a in reversed(ARCHITECTURES) if runs_on((a,), capability)), "")


def runs_on(architectures: tuple[str, ...], capability: str) -> bool:
    """Whether code compiled for `architectures` runs on a GPU of `capability`, such as "89"."""
    if capability in architectures or f"{capability}a" in architectures:
        return True
    if capability in JETSON:
        return False
    family = [a for a in architectures if a.isdigit() and a not in JETSON and int(a) // 10 == int(capability) // 10]
    return any(int(a) <= int(capability) for a in family)


def _nvcc() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (found := Path(home) / "bin" / "nvcc").is_file():
            return found
    if found_on_path := shutil.which("nvcc"):
        return Path(found_on_path).resolve()
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    return next((nvcc for f in folders for nvcc in sorted(f.glob("cu*/bin/nvcc"), reverse=True)), None)


def _tool(name: str) -> Path | None:
    """A program of the environment's scripts, or of PATH."""
    import sysconfig

    beside = Path(sysconfig.get_path("scripts")) / name
    if beside.is_file():
        return beside
    found = shutil.which(name)
    return Path(found) if found else None


def _cutlass() -> Path | None:
    if home := os.environ.get("CUTLASS_HOME"):
        return Path(home) if (Path(home) / "include" / "cutlass").is_dir() else None
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        source = Path(folder) / "source"
        if (source / "include" / "cutlass").is_dir():
            return source
    return None


def _version(nvcc: Path) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", told)
    if found is None:
        raise QpassError(f"{nvcc} does not say its version; is it CUDA's compiler?")
    return found.group(1)
