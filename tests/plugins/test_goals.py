"""What the kernels are to reach, held against results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals
from benchmarks.plugins import table
from qpass.plugins.bench.jobs import jobs
from qpass.plugins.bench.peers import PEERS


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


def test_what_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="No such file"):
        goals.read(path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(SystemExit, match="is no result of `qpass plugins bench`"):
            goals.read(path)
