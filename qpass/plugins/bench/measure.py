"""One row of results: an op's time, its floor, and its peers' times."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.peers import Peer
from qpass.plugins.bench.peers.base import INT8_GEMM
from qpass.plugins.bench.timing import Call, Time


@dataclass(frozen=True)
class Row:
    """What one call took: the median of replays in µs, the slowest over the fastest, rates, floor and peers.

    Attributes:
        peers: µs by a peer's name; those that were timed.
        peer_spread: the slowest over the fastest of theirs.
        notes: why a peer that would apply was not timed, by its name.
        best_peer: the fastest.
        times_best_peer: its µs over the op's: above 1 the op is faster.
        host_us: what enqueueing a call takes of the CPU.
    """

    op: str
    variant: str
    m: int
    n: int
    k: int
    us: float
    spread: float
    gb_per_s: float
    tflop_per_s: float
    floor_us: float
    share_of_floor: float
    peers: dict[str, float] = field(default_factory=dict)
    peer_spread: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    best_peer: str | None = None
    times_best_peer: float | None = None
    host_us: float | None = None


class Clock(Protocol):
    """What `timing.Timer` does."""

    @property
    def bandwidth(self) -> float: ...
    def copies(self, size: int) -> int: ...
    def time(self, calls: Sequence[Call]) -> Time: ...
    def check(self) -> None: ...


class Timed(Protocol):
    """What `ours.Ours` does."""

    def bytes(self, job: Job) -> int: ...
    def calls(self, job: Job, copies: int) -> Sequence[Call]: ...
    def host_us(self, job: Job) -> float: ...
    def launch_us(self) -> float: ...


class Bench:
    """Times an op and its peers.

    Args:
        cublas: whose rate at a large product stands for the GPU's in 16 bits.
        peers: what to time too.
    """

    def __init__(self, timer: Clock, ours: Timed, cublas: Peer, peers: Sequence[Peer] = ()) -> None:
        self.timer = timer
        self.peers = peers
        self.broken = ""
        """The peer that left the GPU unusable, if one has."""
        self._ours = ours
        self._cublas = cublas
        self._timed: dict[tuple[str, Hashable], Time | str] = {}

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a copy, read and written."""
        return self.timer.bandwidth

    @cached_property
    def launch_us(self) -> float:
        """What a launch takes of the CPU, µs."""
        return self._ours.launch_us()

    @cached_property
    def tensor_rate(self) -> float:
        """Operations a second of a large 16-bit product of cuBLAS's; 0 where there is no cuBLAS."""
        job = Job("", "", {}, 8192, 8192, 8192)
        time = self._time_peer(self._cublas, job)
        return job.flops / (time.us * 1e-6) if isinstance(time, Time) else 0.0

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Let peers compile ahead what all these jobs need."""
        for peer in self.peers:
            theirs = [j for j in jobs if peer.applies(j)]
            try:
                if theirs:
                    peer.prepare(theirs)
            except Exception:  # what is wrong is found again, and noted, at each of its jobs
                continue

    def time(self, job: Job) -> Row:
        """Time one call and its peers. After a peer that left the GPU unusable none is timed: see `broken`."""
        size = self._ours.bytes(job)
        rate = self.tensor_rate * (2 if job.op == INT8_GEMM else 1)
        floor = max(size / self.bandwidth, job.flops / rate if rate else 0.0) * 1e6
        ours = self.timer.time(self._ours.calls(job, self.timer.copies(size)))
        host = self._ours.host_us(job)
        peers: dict[str, Time] = {}
        notes: dict[str, str] = {}
        for peer in self.peers:
            if peer.applies(job) and not self.broken:
                time = self._time_peer(peer, job)
                if isinstance(time, Time):
                    peers[peer.name] = time
                else:
                    notes[peer.name] = time
        best = min(peers, key=lambda name: peers[name].us, default=None)
        return Row(
            *job.key,
            us=ours.us,
            spread=ours.spread,
            gb_per_s=size / ours.us * 1e-3,
            tflop_per_s=job.flops / ours.us * 1e-6,
            floor_us=floor,
            share_of_floor=floor / ours.us,
            peers={name: t.us for name, t in peers.items()},
            peer_spread={name: t.spread for name, t in peers.items()},
            notes=notes,
            best_peer=best,
            times_best_peer=peers[best].us / ours.us if best is not None else None,
            host_us=host,
        )

    def _time_peer(self, peer: Peer, job: Job) -> Time | str:
        """The fastest of its ways, or why there is none."""
        key = peer.name, peer.key(job)
        if key not in self._timed:
            self._timed[key] = self._try(peer, job)
        return self._timed[key]

    def _try(self, peer: Peer, job: Job) -> Time | str:
        """Anything may go wrong in other people's code; what does is told, and our own measurement goes on."""
        try:
            result: Time | str = self._fastest(peer.calls(job, self.timer.copies(peer.bytes(job))))
        except Exception as error:
            result = _told(error)
        try:
            self.timer.check()
            peer.release()
        except Exception as error:
            self.broken, result = peer.name, _told(error)
        return result

    def _fastest(self, ways: Iterable[list[Call]]) -> Time:
        times: list[Time] = []
        failed: Exception | None = None
        for calls in ways:
            try:
                times.append(self.timer.time(calls))
            except Exception as error:  # another way may do
                failed = error
        if failed is not None and not times:
            raise failed
        return min(times, key=lambda time: time.us)


def _told(error: Exception) -> str:
    """The first line of an error, with its type where it is none of ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return text if isinstance(error, QpassError) else f"{type(error).__name__}: {text}"
