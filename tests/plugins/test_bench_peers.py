"""`qpass plugins bench` with stand-ins for the GPU, the ops and the peers: rows, filters, files, what goes wrong."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest

from benchmarks import goals
from benchmarks.plugins import table
from qpass import gpu, plugins
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.plugins.bench import machine, session
from qpass.plugins.bench.jobs import DTYPES, Job, jobs, shape
from qpass.plugins.bench.measure import Bench, Row
from qpass.plugins.bench.peers import PEERS, Peer
from qpass.plugins.bench.peers.base import TorchPeer
from qpass.plugins.bench.peers.cublas import Cublas
from qpass.plugins.bench.results import Results
from qpass.plugins.bench.timing import REPLAYS, WARM_UP_US, Call, Time, Timer
from tests.conftest import Run

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


def test_what_enqueueing_takes_is_told() -> None:
    assert bench_of().time(a_job()).host_us == 2.5


class TestJobs:
    def test_every_op_and_size_of_the_plan_is_there(self) -> None:
        found = {j.key for j in jobs()}
        for m in (1, 4, 16, 64, 256, 1024, 4096, 16384):
            for n, k in ((4096, 4096), (8192, 8192), (57344, 8192), (8192, 28672)):
                assert ("SmoothQuantGemm", "per-token", m, n, k) in found
                assert ("WeightOnlyGroupwiseQuantMatmul", "int4 g128", m, n, k) in found
        for m in (1, 4, 16, 4096, 16384):
            assert ("RmsnormQuantization", "per-token", m, 0, 4096) in found
        assert len(found) == len(jobs())

    def test_filters_leave_a_part(self) -> None:
        assert {(j.op, j.m, j.n, j.k) for j in jobs(["SmoothQuantGemm"], [1, 64], [(4096, 4096)])} == {
            ("SmoothQuantGemm", 1, 4096, 4096),
            ("SmoothQuantGemm", 64, 4096, 4096),
        }
        assert {(j.n, j.k) for j in jobs(shapes=[(0, 8192)])} == {(0, 8192)}

    def test_filters_that_leave_nothing_say_what_there_is(self) -> None:
        with pytest.raises(QpassError, match=r"16384.*57344x8192"):
            jobs(tokens=[3])

    @pytest.mark.parametrize(
        ("text", "want"), [("8192x28672", (8192, 28672)), ("57344×8192", (57344, 8192)), ("64", (0, 64))]
    )
    def test_shapes(self, text: str, want: tuple[int, int]) -> None:
        assert shape(text) == want

    @pytest.mark.parametrize("text", ["", "8192x", "x8192", "8192x8192x1", "-1"])
    def test_what_is_no_shape(self, text: str) -> None:
        with pytest.raises(QpassError, match="NxK"):
            shape(text)

    @pytest.mark.parametrize("job", jobs(quick=True), ids=lambda j: f"{j.op} {j.variant} {j.m} {j.n} {j.k}")
    def test_outputs_are_those_that_the_op_infers(self, job: Job) -> None:
        op, inputs = REGISTRY[job.op], job.inputs(BF16)
        inferred = op.infer([inputs.get(t.name) for t in op.inputs], job.attrs)
        assert [(d, tuple(s or ())) for d, s in inferred] == list(job.outputs(BF16).values())

    def test_bytes_are_of_what_is_read_and_written(self) -> None:
        m, n, k = 16, 8192, 28672
        assert a_job().bytes(BF16) == m * k + n * k + 4 * m + 4 * n + 2 * m * n


class TestTimer:
    """The timer itself, on a GPU where a call takes 10 µs, or 5000 if it is long."""

    @pytest.fixture
    def log(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        log: list[str] = []

        class Stopwatch:
            def __init__(self, stream: Any) -> None:
                assert stream.handle == 7

            def time(self, work: Any) -> float:
                before = len(log)
                work()
                return sum(5000.0 if "long" in entry else 10.0 for entry in log[before:])

        class Graph:
            def __init__(self, work: Any, stream: Any) -> None:
                assert stream.handle == 7
                log.append("capture")
                before = len(log)
                work(stream)
                self.calls = log[before:]
                log.append("captured")

            def launch(self) -> None:
                log.extend(self.calls)

        driver = types.SimpleNamespace(Stream=lambda: types.SimpleNamespace(handle=7))
        monkeypatch.setattr(gpu, "driver", lambda: driver)
        monkeypatch.setattr(gpu, "l2_bytes", lambda: 50 << 20)
        monkeypatch.setattr(gpu, "synchronize", lambda: log.append("synchronize"))
        monkeypatch.setattr(gpu, "Stopwatch", Stopwatch)
        monkeypatch.setattr(gpu, "Graph", Graph)
        return log

    def calls(self, log: list[str], *names: str) -> list[Call]:
        def call(name: str, stream: int) -> None:
            assert stream == 7
            log.append(name)

        return [partial(call, name) for name in names]

    def test_few_short_calls_are_captured_several_times(self, log: list[str]) -> None:
        time = Timer().time(self.calls(log, "a", "b", "c"))
        assert (time.us, time.spread) == (10.0, 1.0)
        captured = log[log.index("capture") + 1 : log.index("captured")]
        assert captured == ["a", "b", "c"] * 3
        assert log[:5] == ["synchronize", "a", "b", "c", "synchronize"], "a first call is outside the capture"

    def test_long_calls_are_captured_once(self, log: list[str]) -> None:
        assert Timer().time(self.calls(log, "long")).us == 5000.0
        assert log[log.index("capture") + 1 : log.index("captured")] == ["long"]

    def test_replays_warm_up_before_they_count(self, log: list[str]) -> None:
        Timer().time(self.calls(log, *"abcdefgh"))
        replayed = len(log[log.index("captured") + 1 :]) / 8
        assert replayed == pytest.approx(WARM_UP_US / 80 + REPLAYS, abs=1)

    def test_results_are_kept_until_their_turn_comes_again(self, log: list[str]) -> None:
        """Memory that a framework gives to a result is not the next one's too: that would stay in the cache."""
        alive = 0
        most = 0

        class Result:
            def __init__(self) -> None:
                nonlocal alive, most
                alive += 1
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= 1

        def call(stream: int) -> Result:
            log.append("call")
            return Result()

        Timer().time([call] * 4)
        assert most >= 4

    @pytest.mark.parametrize(("size", "copies"), [(250 << 20, 1), (100 << 20, 3), (1 << 20, 64), (0, 64), (1 << 30, 1)])
    def test_copies_are_several_times_the_cache(self, size: int, copies: int, log: list[str]) -> None:
        assert Timer().copies(size) == copies


class TestRows:
    def test_a_row_has_its_floor_and_its_fastest_peer(self) -> None:
        row = bench_of(StandIn("slow", [400.0]), StandIn("fast", [300.0, 150.0, -1.0])).time(a_job())
        size = a_job().bytes(BF16)
        assert (row.us, row.spread, row.peers) == (100.0, 1.01, {"slow": 400.0, "fast": 150.0})
        assert row.peer_spread == {"slow": 1.01, "fast": 1.01}
        assert (row.best_peer, row.times_best_peer) == ("fast", 1.5)
        assert row.floor_us == pytest.approx(size / 1e12 * 1e6)
        assert row.share_of_floor == pytest.approx(row.floor_us / 100)
        assert row.gb_per_s == pytest.approx(size / 100e-6 / 1e9)

    def test_the_floor_of_many_tokens_is_the_tensor_cores(self) -> None:
        int8, weight_only = (bench_of().time(a_job(op, 16384)) for op in ("SmoothQuantGemm", "WeightOnlyQuantMatmul"))
        assert weight_only.floor_us == pytest.approx(a_job(m=16384).flops / 1e15 * 1e6)
        assert int8.floor_us == pytest.approx(weight_only.floor_us / 2)

    def test_what_fails_is_noted_and_the_rest_is_timed(self) -> None:
        absent = StandIn("absent", QpassError("not installed: pip install absent"))
        strange = StandIn("strange", ValueError("unfit tile\nwith a second line"))
        fails, good = StandIn("fails", [-1.0]), StandIn("good", [50.0])
        row = bench_of(absent, strange, fails, good).time(a_job())
        assert row.notes == {
            "absent": "not installed: pip install absent",
            "strange": "ValueError: unfit tile",
            "fails": "CUDA: no",
        }
        assert (row.peers, row.times_best_peer) == ({"good": 50.0}, 0.5)
        assert [p.released for p in (absent, strange, fails, good)] == [1] * 4

    def test_a_peer_that_leaves_the_gpu_unusable_is_the_last(self) -> None:
        bad, other = StandIn("bad", [-2.0]), StandIn("other", [1.0])
        bench = bench_of(bad, other)
        row = bench.time(a_job())
        assert bench.broken == "bad"
        assert "illegal memory access" in row.notes["bad"]
        assert not other.asked
        assert "other" not in row.notes

    def test_jobs_that_are_one_to_a_peer_are_timed_once(self) -> None:
        same, apart = StandIn("same", [10.0]), StandIn("apart", [10.0], same=False)
        bench = bench_of(same, apart)
        for op in ("SmoothQuantGemm", "WeightOnlyQuantMatmul"):
            assert bench.time(a_job(op)).peers == {"same": 10.0, "apart": 10.0}
        assert (len(same.asked), len(apart.asked)) == (1, 2)

    def test_norms_have_no_matmul_for_a_peer(self) -> None:
        row = bench_of(StandIn("matmul", [1.0])).time(jobs(["QuantizePerToken"])[0])
        assert (row.peers, row.notes, row.best_peer, row.times_best_peer) == ({}, {}, None, None)

    def test_without_cublas_the_floor_is_the_bytes(self) -> None:
        bench = Bench(StandInTimer(), StandInOurs(), StandIn("cuBLAS", QpassError("not installed")))
        assert bench.tensor_rate == 0
        assert bench.time(a_job(m=16384)).floor_us == pytest.approx(a_job(m=16384).bytes(BF16) / 1e6)

    def test_peers_prepare_for_their_jobs_and_may_fail(self) -> None:
        class Unable(StandIn):
            def prepare(self, jobs: Sequence[Job]) -> None:
                raise RuntimeError("no compiler")

        able = StandIn("able", [1.0])
        bench_of(Unable("unable", [1.0]), able).prepare(jobs(tokens=[16]))
        assert able.prepared == [j for j in jobs(tokens=[16]) if j.n]


class TestPeers:
    @pytest.mark.parametrize(
        ("op", "want"),
        [
            ("SmoothQuantGemm", {"cuBLAS", "torch linear", "torch._int_mm", "torch._scaled_mm"}),
            ("WeightOnlyQuantMatmul", {"cuBLAS", "torch linear", "humming"}),
            ("WeightOnlyGroupwiseQuantMatmul", {"cuBLAS", "torch linear", "humming", "tinygemm"}),
            ("RmsnormQuantization", {"torch.compile"}),
            ("QuantizePerToken", {"torch.compile"}),
        ],
    )
    def test_who_does_whose_work(self, op: str, want: set[str]) -> None:
        assert {name for name, peer in PEERS.items() if peer("bfloat16").applies(jobs([op])[0])} == want

    @pytest.mark.parametrize("name", [n for n, p in PEERS.items() if issubclass(p, TorchPeer)])
    def test_one_that_is_not_installed_says_so(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
        peer = PEERS[name]("bfloat16")
        job = next(j for j in jobs(tokens=[64, 4096]) if peer.applies(j))
        assert bench_of(peer).time(job).notes[name].startswith("not installed: pip install")

    def test_one_that_cannot_be_imported_says_why(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        note = bench_of(PEERS["torch linear"]("bfloat16")).time(a_job()).notes["torch linear"]
        assert note == "torch cannot be imported: libcudart.so.13: cannot open"

    def test_those_for_few_tokens_or_many_refuse_the_others(self) -> None:
        notes = bench_of(PEERS["torch._int_mm"]("bfloat16")).time(a_job(m=16)).notes
        assert "more than 16 rows" in notes["torch._int_mm"]
        notes = bench_of(PEERS["tinygemm"]("bfloat16")).time(a_job("WeightOnlyGroupwiseQuantMatmul", 4096)).notes
        assert "256" in notes["tinygemm"]
        notes = bench_of(PEERS["tinygemm"]("float16")).time(a_job("WeightOnlyGroupwiseQuantMatmul", 4)).notes
        assert "bfloat16" in notes["tinygemm"]

    @pytest.mark.parametrize(
        ("name", "ways"),
        [
            ("torch linear", 2),
            ("torch._int_mm", 1),
            ("torch._scaled_mm", 1),
            ("tinygemm", 3),
            ("humming", 1),
            ("torch.compile", 1),
        ],
    )
    def test_each_way_has_a_call_for_every_copy(self, name: str, ways: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a PyTorch and a Humming that take everything: each variant of each op, on the stream that is asked for."""
        torch = MagicMock()
        torch.compile.side_effect = lambda work, **_: work
        humming = MagicMock()
        humming.get_heuristics_config.return_value = {"block_shape": (8, 128, 64)}
        modules = {"torch": torch, "humming.layer": humming, "humming.tune": humming, "humming.kernel.humming": humming}
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr("importlib.import_module", lambda name: modules[name])
        peer = PEERS[name]("bfloat16")
        mine = [j for j in jobs(tokens=[64], shapes=[(8192, 8192)]) if peer.applies(j)]
        mine = mine or [j for j in jobs(tokens=[16], shapes=[(0, 8192)]) if peer.applies(j)]
        peer.prepare(mine)
        for job in mine:
            made = list(peer.calls(job, 3))
            assert [len(calls) for calls in made] == [3] * ways
            for call in itertools.chain(*made):
                call(7)
        assert {c.args for c in torch.cuda.ExternalStream.call_args_list} == {(7,)}
        peer.release()
        torch.cuda.empty_cache.assert_called_once_with()

    def test_groups_and_variants_are_not_one_to_those_whom_they_concern(self) -> None:
        variants = jobs(["WeightOnlyGroupwiseQuantMatmul"], [16], [(8192, 8192)])
        assert [j.variant for j in variants] == ["int4 g128", "int4 g64", "int4 g32", "int4 g128, all"]
        counts = {n: len({PEERS[n]("bfloat16").key(j) for j in variants}) for n in ("cuBLAS", "tinygemm", "humming")}
        assert counts == {"cuBLAS": 1, "tinygemm": 3, "humming": 4}


def test_the_command_line_imports_no_framework() -> None:
    code = (
        "import sys, qpass.cli, qpass.plugins.bench.session; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "humming", "triton", "pycuda"}
    code = "import sys, qpass.cli; print(*[m for m in sys.modules if m.startswith('qpass.plugins.bench')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split(), "the bench is imported by its command alone"


class TestResults:
    def row(self, m: int = 1, **other: Any) -> Row:
        return Row("op", "", m, 8, 8, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, **other)

    def test_the_file_is_whole_after_every_row(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        results = Results(path, "H200", "bfloat16", {"command": "a"})
        for count in (1, 2, 3):
            results.add(self.row(count, peers={"p": 2.0}, best_peer="p", times_best_peer=2.0))
            told = json.loads(path.read_text())
            assert told == results.to_dict()
            assert len(told["rows"]) == count
        assert set(told) == {"device", "dtype", "runs", "rows"}
        assert [p.name for p in tmp_path.iterdir()] == ["r.json"]

    def test_what_is_there_is_not_done_again(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        first = Results(path, "H200", "bfloat16", {"command": "a"})
        job = a_job()
        first.add(Row(*job.key, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, {"p": 2.0}, {}, {"q": "not installed"}))
        second = Results(path, "H200", "bfloat16", {"command": "b"})
        assert second.lacks(job, [])
        second.resume(path)
        assert not second.lacks(job, ["p", "q"])
        assert second.lacks(job, ["p", "new"])
        assert second.lacks(a_job(m=64), [])
        second.add(Row(*job.key, 3.0, 1.0, 1.0, 1.0, 0.5, 0.5))
        told = json.loads(path.read_text())
        assert [r["us"] for r in told["rows"]] == [3.0]
        assert [r["command"] for r in told["runs"]] == ["a", "b"]

    def test_files_of_other_gpus_and_no_results_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        results = Results(path, "H100", "bfloat16", {})
        results.write()
        with pytest.raises(QpassError, match="device is H100, here it is H200"):
            Results(None, "H200", "bfloat16", {}).resume(path)
        for text in ("{", "[]", "{}", '{"rows": [1], "runs": []}', '{"rows": 3, "runs": 3}'):
            path.write_text(text)
            with pytest.raises(QpassError, match="no result of"):
                results.resume(path)
        with pytest.raises(QpassError, match="cannot be read"):
            results.resume(tmp_path / "none.json")


class TestCommand:
    peers: ClassVar[dict[str, Sequence[float] | Exception]] = {
        "cuBLAS": [200.0],
        "humming": [300.0],
        "tinygemm": QpassError("not installed: pip install torch"),
    }

    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = {name: (lambda dtype, name=name: StandIn(name, self.peers[name])) for name in self.peers}
        monkeypatch.setattr(session, "PEERS", made)
        monkeypatch.setattr("qpass.plugins.bench.peers.PEERS", made)
        monkeypatch.setattr("qpass.plugins.bench.report.PEERS", made)
        monkeypatch.setattr(session, "Timer", StandInTimer)
        monkeypatch.setattr(session, "Ours", StandInOurs)
        monkeypatch.setattr(machine, "clocks", lambda: {"clocks.sm": "1980"})
        monkeypatch.setattr(gpu, "device", lambda: types.SimpleNamespace(name=lambda: "NVIDIA H200"))
        monkeypatch.setattr(plugins, "find", lambda *_: types.SimpleNamespace(description={"cuda": "13.0"}))

    def test_the_file_says_what_was_measured_and_how(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        done = run("plugins", "bench", "--peers", "--op", "SmoothQuantGemm", *SIZES, "-o", path)
        assert done.code == 0, done.err
        told = json.loads(path.read_text())
        (row,), (about,) = told["rows"], told["runs"]
        assert (told["device"], told["dtype"]) == ("NVIDIA H200", "bfloat16")
        rates = {"copy_tb_per_s", "cublas_tflop_per_s", "launch_us"}
        assert set(about) == {"command", "date", "versions", "clocks"} | rates
        assert about["command"].startswith("qpass plugins bench --peers")
        assert about["versions"]["cuda"] == "13.0"
        assert set(about["clocks"]) == {"before", "after"}
        assert set(row) == set(Row.__dataclass_fields__)
        assert (row["peers"], row["best_peer"], row["times_best_peer"]) == (
            {"cuBLAS": 200.0, "humming": 300.0},
            "cuBLAS",
            2.0,
        )
        assert row["notes"] == {"tinygemm": "not installed: pip install torch"}

    def test_the_table_has_a_dash_and_a_note_for_who_is_absent(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "120")
        done = run("plugins", "bench", "--peers", "--only", "SmoothQuantGemm", *SIZES)
        lines = done.out.splitlines()
        assert lines[0].startswith("NVIDIA H200, bfloat16: copy 1000 GB/s")
        assert "a launch 1.5 µs of the CPU" in done.out
        header = next(line for line in lines if "best peer" in line)
        assert header.split()[-6:] == ["cuBLAS", "humming", "tinygemm", "best", "peer", "×"]
        values = next(line for line in lines if "8192×8192" in line).split()
        assert values[-5:] == ["200.0", "300.0", "-", "cuBLAS", "2.00"]
        assert "tinygemm: not installed: pip install torch" in lines

    def test_by_default_the_peer_is_cublas(self, run: Run) -> None:
        told = json.loads(run("plugins", "bench", "--json", "--op", "SmoothQuantGemm", *SIZES).out)
        assert told["rows"][0]["peers"] == {"cuBLAS": 200.0}
        told = json.loads(run("plugins", "bench", "--json", "--peers", "--skip-peer", "humming", *SIZES).out)
        assert all("humming" not in {**r["peers"], **r["notes"]} for r in told["rows"])

    def test_resumed_runs_time_the_rest_into_the_same_file(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        run("plugins", "bench", "--op", "SmoothQuantGemm", *SIZES, "-o", path)
        kept = json.loads(path.read_text())
        kept["rows"][0]["us"] = 7.0
        path.write_text(json.dumps(kept))
        done = run("plugins", "bench", "--op", "SmoothQuantGemm", "--m", "16", "--m", "64", "--resume", path)
        assert done.code == 0, done.err
        told = json.loads(path.read_text())
        assert [r["us"] for r in told["rows"]] == [7.0] + [100.0] * 7
        assert len(told["runs"]) == 2

    def test_a_kill_loses_nothing_that_was_measured(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, count = tmp_path / "r.json", 0

        def calls(self: StandInOurs, job: Job, copies: int) -> list[Call]:
            nonlocal count
            count += 1
            return [call_of(100.0 if count < 3 else -1.0)] * copies

        monkeypatch.setattr(StandInOurs, "calls", calls)
        done = run("plugins", "bench", "--op", "SmoothQuantGemm", "-o", path)
        assert (done.code, done.err.strip().splitlines()[-1]) == (2, "error: CUDA: no")
        assert len(json.loads(path.read_text())["rows"]) == 2

    def test_a_peer_that_ends_the_gpu_is_named_with_the_way_on(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "r.json"
        monkeypatch.setitem(TestCommand.peers, "humming", [-2.0])
        done = run("plugins", "bench", "--peers", "-o", path, "--op", "SmoothQuantGemm", *SIZES)
        assert done.code == 2
        assert "--resume and --skip-peer 'humming'" in done.err
        assert len(json.loads(path.read_text())["rows"]) == 1
        done = run(
            "plugins", "bench", "--peers", "--skip-peer", "humming", "--resume", path, "--op", "SmoothQuantGemm", *SIZES
        )
        assert done.code == 0, done.err
        assert set(json.loads(path.read_text())["rows"][0]["notes"]) == {"tinygemm"}

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--dtype", "int8"], "--dtype int8"),
            (["--skip-peer", "nobody"], "cuBLAS, humming, tinygemm"),
            (["--op", "Gemm"], "SmoothQuantGemm"),
            (["--shape", "big"], "NxK"),
            (["--m", "3"], "leave nothing"),
            (["-o", "no/such/folder/r.json"], "no folder"),
        ],
    )
    def test_mistakes_are_one_line(self, arguments: list[str], says: str, run: Run) -> None:
        done = run("plugins", "bench", *arguments)
        assert done.code == 2
        assert says in done.err
        assert "Traceback" not in done.err


class TestGoals:
    def row(self, **other: Any) -> dict[str, Any]:
        given = {"op": goals.W4A16, "variant": "int4 g128", "m": 16, "n": 8192, "k": 8192, "us": 12.0, "peers": {}}
        return given | {"share_of_floor": 0.7, "tflop_per_s": 1300.0} | other

    def goal(self, measure: str, must: float | None, aim: float) -> goals.Goal:
        return goals.Goal("k", (goals.W4A16,), measure, must, aim, (1, 16), ((8192, 8192),), "int4 g128")

    @pytest.mark.parametrize(
        ("measure", "must", "aim", "reached"),
        [
            (goals.US, 14, 12, "aim"),
            (goals.US, 14, 11, "must"),
            (goals.US, 11.9, 11, "missed"),
            (goals.SHARE, 0.5, 0.7, "aim"),
            (goals.SHARE, 0.7, 0.8, "must"),
            (goals.SHARE, None, 0.8, "missed"),
            (goals.TFLOP, 1300, 1301, "must"),
            ("humming", None, 1.5, "aim"),
            ("humming", None, 1.6, "missed"),
            ("tinygemm", 1, 2, "not measured"),
        ],
    )
    def test_what_is_reached(self, measure: str, must: float | None, aim: float, reached: str) -> None:
        row = self.row(peers={"humming": 18.0})
        assert goals.judge(self.goal(measure, must, aim), [row]).reached == reached

    def test_the_worst_row_counts(self) -> None:
        rows = [self.row(us=9.0, m=1), self.row(us=13.0, m=4), self.row(us=11.0, m=16)]
        verdict = goals.judge(self.goal(goals.US, 14, 10), rows)
        assert (verdict.value, verdict.row, verdict.reached) == (13.0, rows[1], "must")
        rows = [self.row(share_of_floor=s) for s in (0.9, 0.4, 0.8)]
        assert goals.judge(self.goal(goals.SHARE, 0.3, 0.9), rows).value == 0.4

    def test_rows_of_other_sizes_do_not(self) -> None:
        others: list[dict[str, Any]] = [{"m": 64}, {"n": 4096}, {"variant": "int4 g64"}, {"op": goals.W8A16}]
        rows = [self.row(us=99.0, **other) for other in others]
        assert goals.judge(self.goal(goals.US, 14, 10), rows).reached == "not measured"

    def test_goals_are_of_what_is_measured(self) -> None:
        """Each covers rows of the bench, by the names that it has for ops, variants, sizes and peers."""
        told = [{"op": j.op, "variant": j.variant, "m": j.m, "n": j.n, "k": j.k} for j in jobs()]
        for goal in goals.GOALS:
            covered = [j for j, row in zip(jobs(), told, strict=True) if goal.covers(row)]
            assert covered, goal
            assert {(j.n, j.k) for j in covered} >= set(goal.shapes)
            if goal.measure not in goals.KEYS:
                assert all(PEERS[goal.measure]("bfloat16").applies(j) for j in covered), goal

    def test_tables_are_of_what_there_is(self) -> None:
        row = self.row(gb_per_s=1.0, best_peer="humming", times_best_peer=1.5, peers={"humming": 18.0})
        assert "| 12.0 | 1 | 1300 | 70% | humming | 1.50 |" in table({"rows": [row]})
        assert len(table({"rows": []}).splitlines()) == 2
        lines = goals.table({"rows": [row]}).splitlines()
        assert len(lines) == 2 + len(goals.GOALS)
        assert "| W4A16 g128 | ≤ 16 | 8192×8192 | µs | 14 | 11 | 12 | 16, 8192×8192 | must |" in lines
        assert {line.count("|") for line in lines} == {10}


def test_cublas_needs_no_more_than_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it says so; a 16-bit product stands beside 32-bit activations."""
    monkeypatch.setattr("qpass.plugins.bench.peers.cublas._library", lambda: "libno-such-cublas.so")
    peer = Cublas("float32")
    with pytest.raises(QpassError, match="pip install nvidia-cublas"):
        _ = peer._handle
    assert peer._dtype == np.float16
