"""What the kernels are to reach on an H200, and whether a file of `qpass plugins bench --peers -o FILE` reaches it.

A goal counts where it is worst: the row of its ops and sizes that is furthest from it.

python -m benchmarks.goals benchmarks/results/plugins_h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NORMS = ("LayernormQuantization", "RmsnormQuantization")
QUANTIZERS = ("QuantizePerToken", "QuantizeTensor")
W8A8, W8A16, W4A16 = "SmoothQuantGemm", "WeightOnlyQuantMatmul", "WeightOnlyGroupwiseQuantMatmul"
HIDDEN = ((0, 4096), (0, 8192))
SQUARE, TALL, WIDE = (8192, 8192), (57344, 8192), (8192, 28672)
SHARE, US, TFLOP, HOST = "of the floor", "µs", "TFLOP/s", "µs of the CPU"
KEYS = {SHARE: "share_of_floor", US: "us", TFLOP: "tflop_per_s", HOST: "host_us"}


@dataclass(frozen=True)
class Goal:
    """One number to reach.

    Args:
        measure: `SHARE`, `US` and `HOST` (the lower the better), `TFLOP`, or a peer's name: its time over the op's.
        must: what the kernel may not miss; None where there is an aim alone.
        ops: any where empty.
        tokens: least and most M.
        shapes: N and K; any where empty.
        variant: of the ops; any where None.
    """

    kernel: str
    ops: tuple[str, ...]
    measure: str
    must: float | None
    aim: float
    tokens: tuple[int, int]
    shapes: tuple[tuple[int, int], ...] = ()
    variant: str | None = None

    def value(self, row: Row) -> float | None:
        """What is measured, of a row; None where its peer was not."""
        if self.measure in KEYS:
            found = row.get(KEYS[self.measure])
            return None if found is None else float(found)
        peer = row["peers"].get(self.measure)
        return None if peer is None else peer / row["us"]

    def covers(self, row: Row) -> bool:
        return (
            (not self.ops or row["op"] in self.ops)
            and self.tokens[0] <= row["m"] <= self.tokens[1]
            and (not self.shapes or (row["n"], row["k"]) in self.shapes)
            and self.variant in (None, row["variant"])
        )


FEW, MANY, LARGE = (1, 16), (1024, 1 << 30), (4096, 1 << 30)
G128 = "int4 g128"
GOALS = (
    Goal("norm + quantization", NORMS, SHARE, 0.80, 0.90, LARGE, HIDDEN),
    Goal("norm + quantization", NORMS, "torch.compile", None, 2.0, LARGE, HIDDEN),
    Goal("norm + quantization", NORMS, US, 3.0, 2.3, FEW),
    Goal("quantization", QUANTIZERS, SHARE, 0.85, 0.92, LARGE, HIDDEN),
    Goal("W8A8 int8", (W8A8,), SHARE, 0.75, 0.85, FEW, (SQUARE, TALL, WIDE)),
    Goal("W8A8 int8", (W8A8,), US, None, 18.5, FEW, (SQUARE,)),
    Goal("W8A8 int8", (W8A8,), TFLOP, 1250, 1400, MANY),
    Goal("W8A8 int8", (W8A8,), "cuBLAS", 1.7, 1.9, MANY),
    Goal("W8A8 int8", (W8A8,), "torch._scaled_mm", None, 1.0, MANY),
    Goal("W4A16 g128", (W4A16,), US, 14, 11, FEW, (SQUARE,), G128),
    Goal("W4A16 g128", (W4A16,), US, 68, 62, FEW, (TALL,), G128),
    Goal("W4A16 g128", (W4A16,), "humming", None, 1.4, FEW, (SQUARE, TALL), G128),
    Goal("W4A16 g128", (W4A16,), "cuBLAS", None, 3.0, FEW, (SQUARE, TALL), G128),
    Goal("W4A16 g128", (W4A16,), US, 24, 18, (64, 64), (SQUARE,), G128),
    Goal("W8A16", (W8A16,), US, 21, 18.5, FEW, (SQUARE,)),
    Goal("W4A16", (W4A16,), "cuBLAS", 0.9, 1.0, MANY),
    Goal("W8A16", (W8A16,), "cuBLAS", 0.9, 1.0, MANY),
    Goal("enqueueing any", (), HOST, 3.0, 3.0, (1, 1 << 30)),
)


@dataclass(frozen=True)
class Verdict:
    """A goal's worst value, the row it is of, and what is reached: "aim", "must", "missed" or "not measured"."""

    goal: Goal
    value: float | None
    row: Row | None
    reached: str


def judge(goal: Goal, rows: Sequence[Row]) -> Verdict:
    """Hold a goal against the rows that it covers."""
    measured = [(value, row) for row in rows if goal.covers(row) and (value := goal.value(row)) is not None]
    if not measured:
        return Verdict(goal, None, None, "not measured")
    sign = -1 if goal.measure in (US, HOST) else 1
    value, row = min(measured, key=lambda pair: sign * pair[0])
    if sign * value >= sign * goal.aim:
        reached = "aim"
    elif goal.must is not None and sign * value >= sign * goal.must:
        reached = "must"
    else:
        reached = "missed"
    return Verdict(goal, value, row, reached)


def table(results: dict[str, Any]) -> str:
    """Every goal with its worst value, as Markdown. Where there is no must, "missed" is said of the aim."""
    lines = [
        "| kernel | M | N×K | measure | must | aim | worst | at | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for verdict in (judge(goal, results["rows"]) for goal in GOALS):
        goal, row = verdict.goal, verdict.row
        measure = goal.measure if goal.measure in KEYS else f"× {goal.measure}"
        bounds = f"{_shown(goal.must, goal.measure)} | {_shown(goal.aim, goal.measure)}"
        sizes = ", ".join(f"{n}×{k}" for n, k in goal.shapes)
        at = "" if row is None else f"{row['m']}, {row['n']}×{row['k']}" if row["n"] else f"{row['m']}, {row['k']}"
        worst = _shown(verdict.value, goal.measure)
        cells = (goal.kernel, _tokens(*goal.tokens), sizes, measure, bounds, worst, at, verdict.reached)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tokens(low: int, high: int) -> str:
    if high <= 1 << 20:
        return str(low) if low == high else f"≤ {high}"
    return f"≥ {low}" if low > 1 else ""


def _shown(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if measure == SHARE else f"{value:.0f}" if measure == TFLOP else f"{value:.4g}"


def read(path: Path) -> dict[str, Any]:
    """What `qpass plugins bench -o FILE` wrote.

    Raises:
        SystemExit: there is no such file, or it is something else.
    """
    try:
        told = json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; `qpass plugins bench -o FILE` writes one on a GPU") from None
    except ValueError:
        told = None
    if not isinstance(told, dict) or "rows" not in told:
        raise SystemExit(f"{path} is no result of `qpass plugins bench`")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(table(read(parser.parse_args().results)))


if __name__ == "__main__":
    main()
