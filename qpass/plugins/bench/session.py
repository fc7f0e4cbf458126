"""One run of `qpass plugins bench`: jobs timed one by one, and kept as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qpass import gpu
from qpass.errors import QpassError
from qpass.plugins.bench import machine
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.measure import Bench
from qpass.plugins.bench.ours import Ours
from qpass.plugins.bench.peers import PEERS
from qpass.plugins.bench.results import Results
from qpass.plugins.bench.timing import Timer
from qpass.plugins.library import Library


class Session:
    """A bench and its results.

    Args:
        dtype: of the activations, a key of `jobs.DTYPES`.
        peers: names of `PEERS`.
        command: to be noted.
        output: where results are kept, if anywhere.

    Raises:
        QpassError: there is no GPU.
    """

    def __init__(self, library: Library, dtype: str, peers: Sequence[str], command: str, output: Path | None) -> None:
        timer = Timer()
        made = {name: PEERS[name](dtype) for name in (*peers, "cuBLAS")}
        self.bench = Bench(timer, Ours(library, dtype), made["cuBLAS"], [made[name] for name in peers])
        self._run: dict[str, Any] = {
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": machine.versions(library.description["cuda"]),
        }
        self.results = Results(output, gpu.device().name(), dtype, self._run)

    def run(self, jobs: Sequence[Job], progress: Callable[[int, int], None] | None = None) -> None:
        """Time what the results lack.

        Raises:
            QpassError: an op failed, or a peer left the GPU unusable; what was timed before is kept.
        """
        bench = self.bench
        todo = [j for j in jobs if self.results.lacks(j, [p.name for p in bench.peers if p.applies(j)])]
        self._run |= {"copy_tb_per_s": bench.bandwidth / 1e12, "cublas_tflop_per_s": bench.tensor_rate / 1e12}
        self._run["launch_us"] = bench.launch_us
        self._run["clocks"] = {"before": machine.clocks()}  # the product has just put the GPU under load
        if progress is not None:
            progress(0, len(todo))  # what is prepared may take minutes to compile
        bench.prepare(todo)
        for done, job in enumerate(todo, 1):
            self.results.add(bench.time(job))
            if bench.broken:
                raise QpassError(
                    f"{bench.broken} failed so that nothing runs on the GPU any more, at {job.op} {job.variant}, M "
                    f"{job.m}, {job.n}×{job.k}; go on with --resume and --skip-peer '{bench.broken}'"
                )
            if progress is not None:
                progress(done, len(todo))
        self._run["clocks"]["after"] = machine.clocks()
        self.results.write()
