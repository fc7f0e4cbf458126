"""Latency of the engines as a picture, by matplotlib, which is imported only here."""

from __future__ import annotations

import html
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qpass.engine.bench.report import Measured, Report
from qpass.engine.bench.statistics import FOR_P99
from qpass.errors import QpassError

FORMATS = (".png", ".svg", ".html")
_GREY, _BLUE = "#8a8f98", "#2f6fb3"  # baseline and others
_ROW, _MARGIN, _WIDTH = 0.42, 1.1, 9.0  # inches


def check(path: Path) -> None:
    """Raise QpassError where no plot of this name can be drawn."""
    if path.suffix not in FORMATS:
        raise QpassError(f"--plot {path}: wants a name that ends in {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise QpassError(f"--plot {path} needs matplotlib: pip install 'qpass[bench]'")


def drawn(report: Report, suffix: str, command: str) -> bytes:
    """A file's content: the medians as bars with whiskers from the fastest run to p99 (p90 of fewer than
    100 runs), a line at the baseline's, shapes one below the other. An .html page is the .svg and how it was measured.

    Raises:
        QpassError: matplotlib is not installed.
    """
    check(Path(f"plot{suffix}"))
    if suffix != ".html":
        return _picture(report, suffix.removeprefix("."))
    svg = _picture(report, "svg").decode()
    told = [f"{key}: {text}" for key, text in report.described().items()]
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in (*told, *report.remarks()))
    title = html.escape(f"Engines on {report.machine.name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        f"svg{{width:100%;height:auto}}</style><h1>{title}</h1>{svg[svg.index('<svg') :]}"
        f"<ul>{lines}</ul><p><code>{html.escape(command)}</code></p></html>\n"
    ).encode()


def _picture(report: Report, kind: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    count = len(report.points)
    height = count * (len(report.engines) * _ROW + _MARGIN)
    # the same report gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "qpass", "svg.fonttype": "path"}):
        figure: Any = Figure(figsize=(_WIDTH, height), layout="constrained")
        rows = figure.subplots(count, 1, squeeze=False)
        for axes, point in zip(rows[:, 0], report.points, strict=True):
            _bars(axes, report, point)
        tail = 99 if report.method.runs >= FOR_P99 else 90
        figure.suptitle(f"{report.machine.name}: GPU time of one execution, median (whiskers: min to p{tail})")
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _bars(axes: Any, report: Report, point: Measured) -> None:
    names = [s.name for s in report.engines]
    there = [(i, t) for i, t in enumerate(point.timings) if t is not None]
    at, medians = [i for i, _ in there], [t.p50 for _, t in there]
    low = [t.p50 - min(t.runs) for _, t in there]
    high = [t.percentile(t.tail) - t.p50 for _, t in there]
    colours = [_BLUE if i else _GREY for i in at]
    axes.barh(at, medians, height=0.7, color=colours, xerr=[low, high], capsize=3, ecolor="#333333")
    if (baseline := point.timings[0]) is not None:
        axes.axvline(baseline.p50, color=_GREY, linestyle="--", linewidth=1)
    for (i, _), us, whisker in zip(there, medians, high, strict=True):
        times = f"  {point.times_baseline(i) or ''}".rstrip() if i else ""
        axes.annotate(f"{us:.1f} µs{times}", (us + whisker, i), xytext=(6, 0), textcoords="offset points", va="center")
    for i in set(range(len(names))) - set(at):
        axes.annotate("failed", (0, i), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), labels=names)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel("µs")
    axes.set_title(str(point), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
