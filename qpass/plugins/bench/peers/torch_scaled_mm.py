"""PyTorch's product of FP8 matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.peers.base import INT8_GEMM, TorchPeer, matmul_bytes
from qpass.plugins.bench.timing import Call


class TorchScaledMm(TorchPeer):
    """torch._scaled_mm in e4m3 with a scale a token and a scale a channel, fast accumulation, bfloat16 results."""

    name = "torch._scaled_mm"

    def applies(self, job: Job) -> bool:
        return job.op == INT8_GEMM

    def bytes(self, job: Job) -> int:
        return matmul_bytes(job, 1, 1, 2)

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        yield [self.on_stream(self._product, *self._tensors(job)) for _ in range(copies)]

    def _tensors(self, job: Job) -> tuple[Any, ...]:
        torch = self.torch
        x, w = (self.random(rows, job.k, dtype=torch.bfloat16).to(torch.float8_e4m3fn) for rows in (job.m, job.n))
        scales = (torch.rand(shape, device="cuda") + 0.5 for shape in ((job.m, 1), (1, job.n)))
        return (x, w.t(), *scales)

    def _product(self, x: Any, w: Any, scale_x: Any, scale_w: Any) -> Any:
        return self.torch._scaled_mm(
            x, w, scale_a=scale_x, scale_b=scale_w, out_dtype=self.torch.bfloat16, use_fast_accum=True
        )
