"""Stand-ins for the GPU, the ops and the peers that `qpass plugins bench` times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import DTYPES, Job, jobs
from qpass.plugins.bench.measure import Bench
from qpass.plugins.bench.peers import Peer
from qpass.plugins.bench.timing import Call, Time

BF16 = DTYPES["bfloat16"]
SIZES = ["--m", "16", "--shape", "8192x8192"]


def call_of(us: float) -> Call:
    """A call of which the stand-in timer says that it takes so long; below 0 it cannot be timed."""
    return lambda stream: us


class StandInTimer:
    """A clock that believes what calls say. It is broken by a call of exactly -2 µs."""

    bandwidth = 1e12

    def __init__(self) -> None:
        self.broken = False

    def copies(self, size: int) -> int:
        return 3

    def time(self, calls: Sequence[Call]) -> Time:
        assert len(calls) == 3
        us = float(calls[0](0))
        self.broken |= us == -2
        if us < 0:
            raise QpassError("CUDA: no")
        return Time(us, 1.01)

    def check(self) -> None:
        if self.broken:
            raise QpassError("CUDA: an illegal memory access was encountered")


class StandInOurs:
    def __init__(self, *_: Any) -> None: ...

    def bytes(self, job: Job) -> int:
        return job.bytes(BF16)

    def calls(self, job: Job, copies: int) -> list[Call]:
        return [call_of(100.0)] * copies

    def host_us(self, job: Job) -> float:
        return 2.5

    def launch_us(self) -> float:
        return 1.5


class StandIn(Peer):
    """A peer of every matmul; `ways` are its times, an exception is what asking for calls raises."""

    def __init__(self, name: str, ways: Sequence[float] | Exception, same: bool = True) -> None:
        self.name = name
        self.ways = ways
        self.asked: list[Job] = []
        self.prepared: list[Job] = []
        self.released = 0
        self.same = same

    def applies(self, job: Job) -> bool:
        return job.n > 0

    def key(self, job: Job) -> Any:
        return super().key(job) if self.same else job.key

    def bytes(self, job: Job) -> int:
        return job.n * job.k

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        self.asked.append(job)
        if isinstance(self.ways, Exception):
            raise self.ways
        yield from ([call_of(us)] * copies for us in self.ways)

    def prepare(self, jobs: Sequence[Job]) -> None:
        self.prepared.extend(jobs)

    def release(self) -> None:
        self.released += 1


def bench_of(*peers: Peer) -> Bench:
    return Bench(StandInTimer(), StandInOurs(), StandIn("cuBLAS", [1099.511627776]), peers)  # 1e15 operations a second


def a_job(op: str = "SmoothQuantGemm", m: int = 16) -> Job:
    (job,) = jobs([op], [m], [(8192, 28672)])
    return job
