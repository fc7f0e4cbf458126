"""What makes a launch of CUTLASS's another one, and what does not: a program of prepared.h alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qpass.plugins.compile import source_folder
from tests.plugins.shells import cuda_include

PROGRAM = """
#include "prepared.h"

#include <cstdio>
#include <thread>

using namespace qpass;

static thread_local Prepared<int> prepared;
static int made = 0;

static int of(const Gemm& g, int device = 0) {  // the launch that a product has, by its number
  return *prepared.of({g, device}, [] { return std::optional<int>(++made); });
}

int main() {
  static char memory[64];
  Gemm g{};
  g.m = 1, g.n = 2, g.k = 3, g.a = memory, g.b = memory, g.d = memory, g.lda = g.ldb = 16, g.ldd = 16;
  const int first = of(g);
  std::printf("%d\\n", of(g) == first);
  Gemm same = g;
  same.workspace = memory, same.variant = QPASS_MMA;
  std::printf("%d\\n", of(same) == first);

  Gemm others[14];
  for (Gemm& other : others) other = g;
  others[0].m = 9, others[1].n = 9, others[2].k = 9, others[3].a = memory + 16, others[4].b = memory + 16;
  others[5].lda = 32, others[6].ldb = 32, others[7].row_scale = reinterpret_cast<float*>(memory);
  others[8].col_scale = reinterpret_cast<float*>(memory), others[9].per_row = true, others[10].per_column = true;
  others[11].bias = memory, others[12].d = memory + 16, others[13].ldd = 32;
  bool all = true;
  for (const Gemm& other : others) {
    const int before = made, number = of(other);
    all &= made == before + 1 && of(other) == number;
  }
  std::printf("%d\\n", all && of(g) == first && of(g, 1) != first);

  int there = first;
  std::thread([&] { there = of(g); }).join();
  std::printf("%d\\n", there != first);

  const bool none = !prepared.of({g, 2}, [] { return std::optional<int>(); });
  std::printf("%d\\n", none && of(g, 2) == made);

  for (int64_t m = 10; m < 5000; ++m) {
    Gemm other = g;
    other.m = m;
    const int number = of(other);
    all &= of(other) == number;
  }
  std::printf("%d\\n", all && of(g) != first);
}
"""
SAYS = (
    "the same product has the same launch",
    "where its workspace is does not matter",
    "each other thing of a product makes another launch, and so does another device",
    "threads share none",
    "what could not be made is tried again",
    "they do not become more and more",
)


def test_what_a_launch_is_kept_by(tmp_path: Path) -> None:
    include = cuda_include()
    if shutil.which("g++") is None or include is None:
        pytest.skip("no g++, or no CUDA headers: pip install nvidia-cuda-runtime")
    (tmp_path / "program.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-isystem", str(include)]
    command += [f"-I{source_folder() / 'kernels'}", str(tmp_path / "program.cpp"), "-o", str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    done = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, check=True)
    assert dict(zip(SAYS, done.stdout.split(), strict=True)) == dict.fromkeys(SAYS, "1")
