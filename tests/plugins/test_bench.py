"""What `qpass plugins bench` times, and how: jobs, the clock, rows."""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import pytest

from benchmarks import small
from qpass import gpu
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.plugins.bench.jobs import DTYPES, Job, jobs, shape
from qpass.plugins.bench.measure import Bench
from qpass.plugins.bench.ours import Ours
from qpass.plugins.bench.timing import REPLAYS, WARM_UP_US, Call, Time, Timer
from qpass.plugins.library import Choice
from tests.plugins.stand_ins import BF16, StandIn, StandInOurs, StandInTimer, a_job, bench_of


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

    def test_weights_and_tokens_of_a_model(self) -> None:
        found = jobs(["WeightOnlyGroupwiseQuantMatmul"], [3, 24], [(22016, 4096)])
        assert [(j.variant, j.m, j.n, j.k) for j in found] == [("int4 g128", m, 22016, 4096) for m in (3, 24)]
        with pytest.raises(QpassError, match="--shape 4096x100: K must be a multiple of 128"):
            jobs(shapes=[(4096, 100)])

    def test_filters_that_leave_nothing_say_what_there_is(self) -> None:
        with pytest.raises(QpassError, match=r"M are 1, 4, .*K 768, 4096"):
            jobs(["QuantizePerToken"], tokens=[3])

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


def test_small_sizes_are_timed_by_every_variant() -> None:
    """benchmarks/small.py, which runs on a GPU alone: what it asks for, and in what it is told."""

    class Run:
        variant = "first"

        def __call__(self, stream: int) -> None: ...
        def choice(self) -> Choice:
            return Choice(("first", "second"), "first", "w8a8")

        def take(self, variant: str) -> None:
            self.variant = variant

    class AnyTimer:
        def copies(self, size: int) -> int:
            return 2

        def time(self, calls: Sequence[Any]) -> Time:
            return Time(2.0 if calls[0].variant == "second" else 1.0, 1.0)

    class AnyOurs(StandInOurs):
        def calls(self, job: Job, copies: int) -> list[Any]:
            assert job.bytes(DTYPES["float16"]) > 0
            return [Run() for _ in range(copies)]

    ours, timer = cast(Ours, AnyOurs()), cast(Timer, AnyTimer())
    assert {r["cold"] for r in small.rows(ours, timer)} == {1.0}
    found = list(small.products(ours, timer))
    assert len(found) == len(small.KINDS) * len(small.TOKENS) * len(small.PRODUCTS)
    assert {(r["rule"], *r["cold"].values()) for r in found} == {("first", 1.0, 2.0)}
    assert [r["warm"] for r in small.chains(ours, timer)] == [len(small.CHAIN)] * 2
