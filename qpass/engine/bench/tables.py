"""What `qpass bench` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.filesize import decimal as size
from rich.markup import escape
from rich.table import Table

from qpass.engine.bench.report import Measured, Report
from qpass.engine.bench.timing import LayerTime

LONGEST = 10
"""How many layers a table shows."""


def shown(report: Report) -> RenderableType:
    """The engines, a table for each point, the layers if they were profiled, and how it was measured."""
    m = report.machine
    parts: list[RenderableType] = [
        escape(f"{m.name} (compute capability {m.capability}), driver {m.driver}; {_backends(report)}"),
        "",
        _engines(report),
        *(f"[dim]{escape(s.name)}:[/] {escape(s.kind)}" for s in report.engines),
    ]
    for point in report.points:
        parts += ["", *_point(report, point)]
        for i, layers in enumerate(point.layers):
            if layers:
                parts += ["", _layers(report.engines[i].name, point, i)]
    parts.append("")
    parts += [f"[dim]{key}:[/] {escape(text)}" for key, text in report.described().items()]
    parts += [f"[dim]note:[/] {escape(line)}" for line in report.remarks()]
    return Group(*parts)


def _backends(report: Report) -> str:
    return ", ".join(dict.fromkeys(s.backend for s in report.engines if s.backend is not None))


def _engines(report: Report) -> Table:
    table = _table("", ("engine",), ("plugin layers", "on disk", "activations", "loaded", "build s"))
    for s in report.engines:
        seconds = f"{s.build_seconds:.1f}" if s.build_seconds is not None else ""
        sizes = (size(n) if n is not None else "" for n in (s.engine_bytes, s.activation_bytes, s.memory_bytes))
        plugins = str(s.plugin_layers) if s.plugin_layers is not None else ""
        table.add_row(escape(s.name), plugins, *sizes, seconds)
    return table


def _point(report: Report, point: Measured) -> Iterator[RenderableType]:
    items = ", and batch items a second at the median" if point.batch is not None else ""
    title = f"{point}: µs of {report.method.runs} runs{items}"
    known = {name for timing in point.timings if timing is not None for name in timing.to_dict()}
    columns = [name for name in ("p50", "p90", "p99", "min", "mean") if name in known] or ["p50"]
    table = _table(title, ("engine",), (*columns, *(["items/s"] if items else []), "× baseline"))
    for i, (engine, timing) in enumerate(zip(report.engines, point.timings, strict=True)):
        if timing is None:
            table.add_row(escape(engine.name), "failed")
            continue
        us, rate, times = timing.to_dict(), point.items_per_second(i), point.times_baseline(i)
        told = (*([f"{rate:.1f}"] if rate is not None else []), str(times) if times is not None and i else "")
        table.add_row(escape(engine.name), *(f"{us[name]:.1f}" for name in columns), *told)
    yield table
    for engine, error in zip(report.engines, point.errors, strict=True):
        if error is not None:
            yield f"{escape(engine.name)} failed: {escape(error)}"


def _layers(name: str, point: Measured, engine: int) -> Table:
    timing = point.timings[engine]
    whole = f", a run in one go (p50) {timing.p50:.1f} µs" if timing is not None else ""
    title = f"{name} at {point}, layer by layer: {point.layers_us(engine):.1f} µs together{whole}"
    table = _table(title, ("layer",), ("layers", "µs", "share"))
    for name, count, us, share in _longest(point.layers[engine]):
        table.add_row(escape(name), str(count), f"{us:.1f}", f"{share:.1%}")
    return table


def _longest(layers: Sequence[LayerTime]) -> Iterator[tuple[str, int, float, float]]:
    for t in layers[:LONGEST]:
        yield f"{t.name} (plugin)" if t.is_plugin else t.name, t.layers, t.us, t.share
    if rest := layers[LONGEST:]:
        yield "all others", sum(t.layers for t in rest), sum(t.us for t in rest), sum(t.share for t in rest)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=escape(title) or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
