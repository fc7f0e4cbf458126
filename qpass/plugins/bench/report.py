"""Results as tables: one an op, a column a peer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from qpass.plugins.bench.peers import PEERS


def tables(results: dict[str, Any]) -> Iterator[Table | str]:
    """What `Results.to_dict` gives as a line about the GPU, a table an op, and why peers have no time."""
    run, rows = results["runs"][-1], results["rows"]
    copy, tensor = run["copy_tb_per_s"] * 1e3, run["cublas_tflop_per_s"]
    launch = f", a launch {run['launch_us']:.1f} µs of the CPU" if "launch_us" in run else ""  # older files lack it
    yield f"{results['device']}, {results['dtype']}: copy {copy:.0f} GB/s, cuBLAS {tensor:.0f} TFLOP/s{launch}"
    for op in dict.fromkeys(r["op"] for r in rows):
        yield _table(op, [r for r in rows if r["op"] == op])
    yield from dict.fromkeys(f"{name}: {note}" for r in rows for name, note in r["notes"].items())


def _table(op: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=op, box=None, pad_edge=False, header_style="bold", title_justify="left")
    peers = [name for name in PEERS if any(name in r["peers"] or name in r["notes"] for r in rows)]
    for name in ("variant", "M", "N×K", "µs", "floor", "host µs", *peers, "best peer", "×"):
        table.add_column(name, justify="left" if name in ("variant", "best peer") else "right")
    for r in rows:
        times = [f"{r['peers'][name]:.1f}" if name in r["peers"] else "-" for name in peers]
        ratio = f"{r['times_best_peer']:.2f}" if r["best_peer"] else ""
        size = f"{r['n']}×{r['k']}" if r["n"] else str(r["k"])
        host = "" if r.get("host_us") is None else f"{r['host_us']:.1f}"
        shown = (f"{r['us']:.1f}", f"{r['share_of_floor']:.0%}", host, *times, r["best_peer"] or "", ratio)
        table.add_row(r["variant"], str(r["m"]), size, *shown)
    return table
