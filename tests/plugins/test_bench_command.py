"""`qpass plugins bench`: files, filters, what goes wrong."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qpass import gpu, plugins
from qpass.errors import QpassError
from qpass.plugins.bench import machine, session
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.measure import Row
from qpass.plugins.bench.results import Earlier, Results
from qpass.plugins.bench.timing import Call
from tests.conftest import Run
from tests.plugins.stand_ins import SIZES, StandIn, StandInOurs, StandInTimer, a_job, call_of


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
        second.resume(Earlier.read(path))
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
            Results(None, "H200", "bfloat16", {}).resume(Earlier.read(path))
        for text in ("{", "[]", "{}", '{"rows": [1], "runs": []}', '{"rows": 3, "runs": 3}'):
            path.write_text(text)
            with pytest.raises(QpassError, match="no result of"):
                Earlier.read(path)
        with pytest.raises(QpassError, match="cannot be read: Is a directory"):
            Earlier.read(tmp_path)


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
        done = run("plugins", "bench", "--op", "SmoothQuantGemm", "--m", "16,64", "--resume", path)
        assert done.code == 0, done.err
        told = json.loads(path.read_text())
        assert [r["us"] for r in told["rows"]] == [7.0] + [100.0] * 7
        assert len(told["runs"]) == 2

    @pytest.mark.parametrize(
        ("text", "why"),
        [(None, "there is no such file; -o begins one"), ("{", "is no result of `qpass plugins bench`")],
    )
    def test_what_cannot_be_gone_on_with_is_told_before_anything_else(
        self, text: str | None, why: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("QPASS_PLUGINS", str(tmp_path / "no-library.so"))
        path = tmp_path / "some.json"
        if text is not None:
            path.write_text(text)
        done = run("plugins", "bench", "--resume", path, *SIZES)
        assert (done.code, done.err.strip()) == (2, f"error: --resume {path}: {why}")

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
            (["--m", "3", "--op", "Rmsnorm"], "leave nothing"),
            (["--m", "16,many"], "--m 16,many: wants whole numbers"),
            (["-o", "no/such/folder/r.json"], "no folder"),
        ],
    )
    def test_mistakes_are_one_line(self, arguments: list[str], says: str, run: Run) -> None:
        done = run("plugins", "bench", *arguments)
        assert done.code == 2
        assert says in done.err
        assert "Traceback" not in done.err
