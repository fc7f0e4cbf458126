"""The plugin library without its kernels: TensorRT's shells and the ops' declarations, compiled in seconds by g++.

An engine is built from what the shells say, and no kernel runs; so what is built and proven with this library is what
would be with the whole one. It cannot run.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from qpass import cache
from qpass.plugins import Library
from qpass.plugins.compile import source_folder
from qpass.plugins.library import LIBRARY


def cuda_include() -> Path | None:
    """The folder of cuda_runtime_api.h that pip's nvidia-cuda-runtime brings."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    return next((h.parent for f in folders for h in f.glob("cu*/include/cuda_runtime_api.h")), None)


def compile_shells(folder: Path, version: str = "1", extra: str = "", tensorrt: str = "10") -> Library:
    """The library in `folder`, compiled if it is not there yet.

    Args:
        extra: C++ that registers ops of its own.
        tensorrt: whose plugins, 8 or 10.
        version: of the plugins; another than qpass's makes a library that TensorRT does not take for a model's nodes.
    """
    target = folder / LIBRARY
    with cache.locked(folder / "lock"):
        if not target.exists():
            include = cuda_include()
            assert include is not None, "nvidia-cuda-runtime is not installed"
            (folder / "kernels.cpp").write_text(_empty_kernels())
            (folder / "extra.cpp").write_text(extra)
            copy = folder / "cuda_plugins"
            shutil.copytree(source_folder(), copy, dirs_exist_ok=True)
            header = copy / "plugins" / "op.h"
            header.write_text(header.read_text().replace('kVersion = "1"', f'kVersion = "{version}"'))
            sources = [*sorted(copy.glob("plugins/*.cpp")), *sorted(copy.glob("kernels/*.cpp"))]
            sources += [folder / "kernels.cpp", folder / "extra.cpp"]
            command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"]
            command += ["-Wall", "-Wextra", "-Werror", "-isystem", str(include)]
            command += [f"-I{copy / part}" for part in (f"minimal/{tensorrt}", "kernels", "plugins")]
            command += ['-DQPASS_ARCHITECTURES="80 90a"', f"-DQPASS_TENSORRT={tensorrt}"]
            fresh = folder / "fresh.so"
            done = subprocess.run(
                [*command, *map(str, sources), "-o", str(fresh)], capture_output=True, text=True, check=False
            )
            assert not done.returncode, done.stderr
            fresh.rename(target)
    return Library(target)


def _empty_kernels() -> str:
    """Every function of the C interface, each of which fails; and the two of CUDA's that name an error."""
    header = (source_folder() / "kernels" / "qpass_kernels.h").read_text()
    declared = re.findall(r"^((?:int|size_t) qpass_\w+\([^;]*\));", header, re.M)
    assert len(declared) == 12, declared
    says = '{ return "there is no kernel in this library"; }'
    lines = [
        '#include "qpass_kernels.h"',
        '#pragma GCC diagnostic ignored "-Wunused-parameter"',
        'extern "C" {',
        *(f"{d} {{ return 801; }}" for d in declared),
        f"const char* cudaGetErrorString(cudaError_t) {says}",
        f"const char* cudaGetErrorName(cudaError_t) {says}",
        "}",
    ]
    return "\n".join(lines) + "\n"
