"""PyTorch's linear in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.peers.base import TorchPeer, matmul_bytes
from qpass.plugins.bench.timing import Call


class TorchLinear(TorchPeer):
    """torch.nn.functional.linear, through cuBLAS and through cuBLASLt."""

    name = "torch linear"

    def applies(self, job: Job) -> bool:
        return job.n > 0

    def bytes(self, job: Job) -> int:
        return matmul_bytes(job, 2, 2, 2)

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        linear, prefer = self.torch.nn.functional.linear, self.torch.backends.cuda.preferred_blas_library
        tensors = [(self.random(job.m, job.k), self.random(job.n, job.k)) for _ in range(copies)]

        def through(library: str, x: Any, w: Any) -> Any:
            prefer(library)
            return linear(x, w)

        try:
            for library in ("cublas", "cublaslt"):
                yield [self.on_stream(through, library, x, w) for x, w in tensors]
        finally:
            prefer("default")
