"""The plugin library with its kernels compiled by g++, its threads fibers of one CPU thread: see emulator.h.

What CUDA C++ has and C++ has not is replaced in a copy of the sources: launches, inline assembly, shared memory of a
size that the launch says. CUTLASS is left out, so that products for many tokens are the kernel's of gemm_mma.cu.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qpass import cache
from qpass.plugins import Library
from qpass.plugins.compile import source_folder
from qpass.plugins.library import LIBRARY
from tests.plugins.shells import cuda_include

HERE = Path(__file__).parent
LARGER_PAIR = "most = std::max(a & 0x7fff, b & 0x7fff) | std::max(a >> 16 & 0x7fff, b >> 16 & 0x7fff) << 16;"
ASSEMBLY = {
    "max.NaN.f32 %0, %1, %2;": "most = a != a || b != b ? NAN : std::max(a, b);",
    "max.NaN.xorsign.abs.f16x2 %0, %1, %2;": LARGER_PAIR,
    "max.NaN.xorsign.abs.bf16x2 %0, %1, %2;": LARGER_PAIR,
    "ex2.approx.ftz.f32 %0, %1;": "y = exp2f(x);",
    "rcp.approx.ftz.f32 %0, %1;": "y = 1.f / x;",
    "ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];": "std::memcpy(bits.x, from, 16);",
    "prefetch.global.L2 [%0];": "",
}
"""Instruction → the same in C++, by the names that the sources have."""

EMULATED = {
    "cudaLaunchKernelEx": "launch_with",
    "cudaFuncSetAttribute": "set_attribute",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor": "blocks_at_once",
    "cudaOccupancyMaxActiveClusters": "clusters_at_once",
}
"""Functions of the runtime's that are templates, which a kernel is given to."""

RUNTIME = """
#include "emulator.h"
extern "C" {
int emulated_questions = 0;
__attribute__((visibility("default"))) int emulated_flags_raised = 0, emulated_flags_lowered = 0;
__attribute__((visibility("default"))) int emulated_major = 9;  // of the compute capability
__attribute__((visibility("default"))) int emulated_multiprocessors = 132;
__attribute__((visibility("default"))) int emulated_device = 0;  // what is known of a GPU is kept by its number
const char* emulated_fault = nullptr;
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* id) { return *id = emulated_device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  ++emulated_questions;
  *value = which == cudaDevAttrMultiProcessorCount ? emulated_multiprocessors : 0;
  if (which == cudaDevAttrComputeCapabilityMajor) *value = emulated_major;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  ++emulated_questions;
  *properties = {};
  return std::strcpy(properties->name, "an emulated GPU"), cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of CUDA's"; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
}
"""


def compile_emulated(folder: Path) -> Library:
    """The library in `folder`, compiled if it is not there yet."""
    target = folder / LIBRARY
    with cache.locked(folder / "lock"):
        if not target.exists():
            include = cuda_include()
            assert include is not None, "nvidia-cuda-runtime is not installed"
            copy = folder / "cuda_plugins"
            shutil.copytree(source_folder(), copy, dirs_exist_ok=True)
            kernels = copy / "kernels"
            for path in [*kernels.glob("*.cu"), *kernels.glob("*.cuh")]:
                path.write_text(as_cpp(path.read_text()))
            for name in ("mma.cuh", "hopper.cuh"):
                shutil.copy(HERE / name, kernels)
            (copy / "runtime.cpp").write_text(RUNTIME)
            sources = [p for p in sorted(kernels.glob("*.cu")) if not p.name.startswith(("gemm_sm80", "gemm_sm90"))]
            sources += [*sorted(kernels.glob("*.cpp")), *sorted((copy / "plugins").glob("*.cpp")), copy / "runtime.cpp"]
            flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w"]
            flags += ["-isystem", str(include), f"-I{HERE}", f"-I{copy / 'minimal' / '10'}"]
            flags += [f"-I{kernels}", f"-I{copy / 'plugins'}"]
            flags += [
                '-DQPASS_ARCHITECTURES="90"',
                "-DQPASS_TENSORRT=10",
                "-DQPASS_SM90A=0",
                "-DQPASS_STREAMS=1",
                "-DQPASS_SM80=0",
            ]

            def compiled(source: Path) -> str:
                made = source.with_suffix(".o")
                included = ["-include", "emulator.h"] if source.suffix == ".cu" else []
                run(["g++", *flags, *included, "-x", "c++", "-c", str(source), "-o", str(made)])
                return str(made)

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compiled, sources))
            fresh = folder / "fresh.so"
            run(["g++", "-shared", *objects, "-o", str(fresh)])
            fresh.rename(target)
    return Library(target)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[:4000]


def as_cpp(source: str) -> str:
    """A CUDA source in plain C++."""
    source = re.sub(
        r"extern __shared__ [^;]*?char (\w+)\[\];", r"char* const \1 = emulator::current->home->shared;", source
    )
    source = re.sub(r'asm(?: volatile)?\("([^"]*)".*?\);', lambda m: ASSEMBLY.get(m[1], m[0]), source, flags=re.S)
    for name, emulated in EMULATED.items():
        source = source.replace(f"{name}(", f"emulator::{emulated}(")
    return with_launches(source)


def with_launches(source: str) -> str:
    """`kernel<<<grid, block, shared, stream>>>(arguments)` as a call of emulator::launch."""
    while (at := source.find("<<<")) >= 0:
        begin = max(source.rfind(c, 0, at) for c in ";{}") + 1
        begin += len(source[begin:at]) - len(re.sub(r"^(\s|//[^\n]*\n)*", "", source[begin:at]))
        config_end = source.find(">>>(", at)
        end = closing(source, config_end + 3)
        kernel, config = source[begin:at].strip(), source[at + 3 : config_end]
        arguments = source[config_end + 4 : end]
        source = f"{source[:begin]}emulator::launch({{{config}}}, {kernel}, {arguments}){source[end + 1 :]}"
    return source


def closing(source: str, at: int) -> int:
    """Where the parenthesis that opens at `at` is closed."""
    depth = 0
    for i in range(at, len(source)):
        depth += {"(": 1, ")": -1}.get(source[i], 0)
        if not depth:
            return i
    raise AssertionError("a parenthesis is never closed")
