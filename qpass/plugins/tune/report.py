"""What was timed, as a table and as the record that goes into cuda_plugins/tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from qpass.plugins.bench import machine
from qpass.plugins.tune.choice import Row


def table_of(rows: Sequence[Row], device: str) -> Table:
    """A line a product and number of tokens."""
    table = Table(title=device, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in ("kind", "N×K", "M", "variant", "µs", "by the rule", "µs", "×"):
        table.add_column(name, justify="left" if name in ("kind", "variant", "by the rule") else "right")
    for r in rows:
        times = f"{r.us[r.variant]:.1f}", r.rule, f"{r.us[r.rule]:.1f}", f"{r.gain:.2f}"
        table.add_row(r.kind, f"{r.n}×{r.k}", str(r.m), r.variant, *times)
    return table


def record(rows: Sequence[Row], device: str, dtype: str, command: str, cuda: str) -> dict[str, Any]:
    """Everything, for JSON: µs of every variant, and of what they were measured."""
    return {
        "device": device,
        "dtype": dtype,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(cuda),
        "clocks": machine.clocks(),
        "rows": [asdict(r) | {"variant": r.variant} for r in rows],
    }


def rows_of(told: Mapping[str, Any]) -> list[Row]:
    """The rows of a record."""
    return [Row(*(r[name] for name in ("kind", "n", "k", "m", "rule", "us"))) for r in told["rows"]]
