"""PyTorch's product with int4 weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.peers.base import GROUPWISE, TorchPeer, matmul_bytes
from qpass.plugins.bench.timing import Call

MOST_TOKENS = 256


class Tinygemm(TorchPeer):
    """aten._weight_int4pack_mm in bfloat16, at each of its layouts. It has zero points always, a bias never."""

    name = "tinygemm"

    def applies(self, job: Job) -> bool:
        return job.op == GROUPWISE

    def key(self, job: Job) -> Hashable:
        return job.m, job.n, job.k, job.attrs["group_size"]

    def bytes(self, job: Job) -> int:
        return matmul_bytes(job, 2, 0.5, 2)

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        if self.dtype == "float16":
            raise QpassError("wants bfloat16")
        if job.m > MOST_TOKENS:
            raise QpassError(f"is for few tokens: left out above M = {MOST_TOKENS}")
        torch, group = self.torch, int(job.attrs["group_size"])
        pack, product = torch.ops.aten._convert_weight_to_int4pack, torch.ops.aten._weight_int4pack_mm
        xs = [self.random(job.m, job.k, dtype=torch.bfloat16) for _ in range(copies)]
        ws = [self.integers(0, 256, (job.n, job.k // 2), torch.uint8) for _ in range(copies)]
        # [K/group, N, (scale, zero)]
        scales = [self.random(job.k // group, job.n, 2, dtype=torch.bfloat16) for _ in range(copies)]
        for inner_k_tiles in (2, 4, 8):
            packed = [pack(w, inner_k_tiles) for w in ws]
            yield [self.on_stream(product, x, w, group, s) for x, w, s in zip(xs, packed, scales, strict=True)]
