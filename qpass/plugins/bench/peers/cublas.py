"""cuBLAS's own product in 16 bits, through its C interface: there wherever its library is."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qpass import gpu
from qpass.errors import QpassError
from qpass.plugins.bench.jobs import DTYPES, Job
from qpass.plugins.bench.peers.base import Peer, matmul_bytes
from qpass.plugins.bench.timing import Call, Filled
from qpass.plugins.library import DeviceTensor

_TRANSPOSED, _AS_IS = 1, 0
_TYPES = {"float16": 2, "bfloat16": 14}  # cudaDataType
_COMPUTE_32F, _DEFAULT_ALGORITHM = 68, -1
WORKSPACE = 32 << 20
"""Bytes that NVIDIA advises for Hopper; given by hand, so that calls can be captured into graphs."""


class Cublas(Peer):
    """y [M, N] = x [M, K] · wᵀ of w [N, K], sums in float32.

    Args:
        dtype: of the activations; float16 stands for float32.
    """

    name = "cuBLAS"

    def __init__(self, dtype: str) -> None:
        self._dtype = DTYPES["bfloat16" if dtype == "bfloat16" else "float16"]

    def applies(self, job: Job) -> bool:
        return job.n > 0

    def bytes(self, job: Job) -> int:
        return matmul_bytes(job, 2, 2, 2)

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        shapes = ((job.m, job.k), (job.n, job.k), (job.m, job.n))
        yield [_Product(self, *(Filled((self._dtype, s)) for s in shapes)) for _ in range(copies)]

    @cached_property
    def _c(self) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(_library())
        except OSError as error:
            raise QpassError("not installed: pip install nvidia-cublas") from error

    @cached_property
    def _handle(self) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._check(self._c.cublasCreate_v2(ctypes.byref(handle)))
        return handle

    @cached_property
    def _workspace(self) -> gpu.Buffer:
        return gpu.Buffer(WORKSPACE)

    def matmul(self, x: DeviceTensor, w: DeviceTensor, y: DeviceTensor, stream: int) -> None:
        """Enqueue one product; dtypes float16 or bfloat16, all the same.

        Raises:
            QpassError: libcublas is not found, or refuses.
        """
        (m, k), n, kind = x.shape, w.shape[0], _TYPES[x.dtype.name]
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        self._check(self._c.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream)))
        workspace = ctypes.c_void_p(self._workspace.address)
        self._check(self._c.cublasSetWorkspace_v2(self._handle, workspace, ctypes.c_size_t(WORKSPACE)))
        arguments: list[Any] = [self._handle, _TRANSPOSED, _AS_IS, n, m, k, ctypes.byref(one)]
        arguments += [ctypes.c_void_p(w.address), kind, k, ctypes.c_void_p(x.address), kind, k, ctypes.byref(zero)]
        arguments += [ctypes.c_void_p(y.address), kind, n, _COMPUTE_32F, _DEFAULT_ALGORITHM]
        self._check(self._c.cublasGemmEx(*arguments))

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise QpassError(f"cuBLAS: status {status}")


@dataclass(frozen=True)
class _Product:
    """A call that holds its tensors."""

    cublas: Cublas
    x: Filled
    w: Filled
    y: Filled

    def __call__(self, stream: int) -> None:
        self.cublas.matmul(self.x.tensor, self.w.tensor, self.y.tensor, stream)


def _library() -> str:
    """pip's libcublas where it is installed, else the system's."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob("*/lib/libcublas.so.*")):
            return str(found)
    return "libcublas.so.13"
