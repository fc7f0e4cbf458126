"""The emulated GPU itself: how launches are made calls, and what it stops at."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qpass.plugins import Library
from tests.plugins import emulated as emulation
from tests.plugins.emulated import as_cpp
from tests.plugins.shells import cuda_include

FAULTS = r"""
#include "emulator.h"
#include "hopper.cuh"
#include <cstdio>
int emulated_questions = 0;
const char* emulated_fault = nullptr;
using namespace qpass;
TensorMap map;
void copied(int at, int x) {
  Barrier barrier;
  init(&barrier, 1), expect(&barrier, map.box_rows * map.box_bytes);
  copy_box(emulator::current->home->shared + at, &map, x, 0, &barrier);
}
void copied_to(int at) { copied(at, 0); }
void copied_from(int x) { copied(1024 - 128, x); }
void waits(int) {
  Barrier barrier;
  init(&barrier, 1), wait(&barrier, 0);
}
void multiplies(int at) {
  float sums[8] = {};
  uint32_t a[4] = {};
  Wgmma<half, 16>::run(sums, a, matrix_at(emulator::current->home->shared + at));
  commit_products();
}
void tell(void (*kernel)(int), int at) {
  emulated_fault = nullptr;
  emulator::launch({1, 32, 4096}, kernel, at);
  std::printf("%s\n", emulated_fault ? emulated_fault : "");
}
int main() {
  alignas(16) static char matrix[64 * 128];
  const int mapped[] = {
      map_matrix(&map, matrix + 8, 64, 128, 128, 8, 128), map_matrix(&map, matrix, 64, 120, 120, 8, 128),
      map_matrix(&map, matrix, 64, 128, 128, 257, 128), map_matrix(&map, matrix, 64, 128, 128, 8, 264, false)};
  for (int e : mapped) std::printf("%d\n", e);
  map_matrix(&map, matrix, 64, 128, 128, 8, 64, false);
  tell(copied_to, 128), tell(copied_to, 64), tell(copied_to, 4096 - 256);
  map_matrix(&map, matrix, 64, 128, 128, 8, 128);
  tell(copied_to, 1024 - 128), tell(copied_to, 1024), tell(copied_from, 8);
  tell(waits, 0), tell(multiplies, 1024 - 128), tell(multiplies, 1024);
}
"""


@pytest.mark.slow
def test_what_a_gpu_would_stop_at(emulated: Library, tmp_path: Path) -> None:
    source, program = tmp_path / "faults.cpp", tmp_path / "faults"
    source.write_text(FAULTS)
    include = cuda_include()
    places = ["-isystem", str(include), f"-I{emulation.HERE}", f"-I{emulated.path.parent / 'cuda_plugins' / 'kernels'}"]
    emulation.run(["g++", "-std=c++17", "-O1", "-w", *places, str(source), "-o", str(program)])
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        *["1"] * 4,  # cudaErrorInvalidValue
        "",
        "a box is copied to what is no multiple of 128 bytes",
        "a box is copied beside shared memory",
        "",
        "a swizzled box is copied to what is no multiple of 1024 bytes",
        "a box begins at no multiple of 16 bytes of its row",
        "a block waits for ever",
        "products were not waited for",
        "a matrix does not begin with its first row",
    ]


def test_launches_become_calls() -> None:
    called = "{ emulator::launch({n(1), 2, 0, s}, f<T, 2>, a, g(b)); }"
    assert as_cpp("{ f<T, 2><<<n(1), 2, 0, s>>>(a, g(b)); }") == called
