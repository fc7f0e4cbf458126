"""PyTorch's product of int8 matrices."""

from __future__ import annotations

from collections.abc import Iterator

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.peers.base import INT8_GEMM, TorchPeer, matmul_bytes
from qpass.plugins.bench.timing import Call


class TorchIntMm(TorchPeer):
    """torch._int_mm: cuBLASLt's, with the sums as int32 for a result. It does less than the op: it scales nothing."""

    name = "torch._int_mm"

    def applies(self, job: Job) -> bool:
        return job.op == INT8_GEMM

    def bytes(self, job: Job) -> int:
        return matmul_bytes(job, 1, 1, 4)

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        if job.m <= 16:
            raise QpassError("wants more than 16 rows")
        int8 = self.torch.int8
        xs = [self.integers(-128, 128, (job.m, job.k), int8) for _ in range(copies)]
        ws = [self.integers(-128, 128, (job.n, job.k), int8).t() for _ in range(copies)]
        yield [self.on_stream(self.torch._int_mm, x, w) for x, w in zip(xs, ws, strict=True)]
