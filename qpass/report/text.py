"""What the command line prints: tables of a ledger, near misses and rules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal as size
from rich.markup import escape
from rich.table import Table

from qpass.calibrate import Stats
from qpass.engine.verify import EngineReport
from qpass.pipeline import Rewritten
from qpass.rewriter import Ledger, Rule, RuleStats, Site
from qpass.rewriter.ledger import WEIGHTED_KINDS
from qpass.spec import PRESETS, QuantSpec
from qpass.verify import Report

STYLE = {"rewritten": "green", "kept": "dim", "excluded": "yellow", "declined": "red", "near_miss": "red"}

_PLURAL = {"linear": "Linears", "experts": "stacks of experts"}


def summary(ledger: Ledger) -> Table:
    """Rewritten sites by kind and op, the rest by status and reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("sites", "right"),
        ("kind", "left"),
        ("status", "left"),
        ("what", "left"),
        ("such as", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    groups: dict[tuple[str, str, str], list[Site]] = defaultdict(list)
    for s in ledger.sites:
        groups[s.kind, s.status, (s.op if s.status == "rewritten" else s.reason) or ""].append(s)
    order = list(STYLE)
    for (kind, status, what), sites in sorted(groups.items(), key=lambda g: (order.index(g[0][1]), g[0][0])):
        table.add_row(str(len(sites)), kind, f"[{STYLE[status]}]{status}[/]", escape(what), escape(sites[0].name))
    return table


def sizes(ledger: Ledger) -> str:
    """Bytes of weights before and after, and how many Linears were rewritten."""
    before, after = ledger.bytes_before, ledger.bytes_after
    ratio = f" ({before / after:.2f} × smaller)" if after else ""
    counts = Counter((s.kind, s.status) for s in ledger.sites if s.kind in WEIGHTED_KINDS and s.status != "excluded")
    asked = {kind: sum(n for (k, _), n in counts.items() if k == kind) for kind in WEIGHTED_KINDS}
    done = [f"{counts[k, 'rewritten']} of {asked[k]} {_PLURAL[k]}" for k in WEIGHTED_KINDS if asked[k] or k == "linear"]
    return f"weights {size(before)} → {size(after)}{ratio}; {' and '.join(done)} rewritten ({ledger.coverage():.0%})"


def remarks_on_sites(ledger: Ledger) -> list[str]:
    """What rules noted on rewritten sites, such as that smoothing was not used, counted."""
    notes = Counter(s.reason for s in ledger.sites if s.status == "rewritten" and s.reason)
    return [f"{n} × {text}" if n > 1 else text for text, n in notes.most_common()]


def rewritten(done: Rewritten, page: Path | None = None) -> RenderableType:
    """The whole report of `qpass rewrite`."""
    lines: list[RenderableType] = [summary(done.ledger), ""]
    lines += [f"[dim]note:[/] {escape(r)}" for r in done.remarks]
    lines.append(escape(sizes(done.ledger)))
    if done.saved is not None:
        files = ", ".join(f"{f.name} ({size(f.stat().st_size)})" for f in done.saved.files)
        lines.append(f"wrote {escape(files)}")
        lines += [f"report: {escape(str(page))}"] if page is not None else []
        lines.append(f"next: [bold]qpass verify {escape(str(done.model))} {escape(str(done.output))}[/]")
    return Group(*lines)


def as_json(done: Rewritten) -> dict[str, Any]:
    """The report of `qpass rewrite` for machines."""
    return {
        "output": str(done.output) if done.saved is not None else None,
        "ledger": str(done.ledger_path) if done.saved is not None else None,
        "files": [str(f) for f in done.saved.files] if done.saved is not None else [],
        "spec": done.ledger.spec,
        "coverage": done.ledger.coverage(),
        "totals": done.ledger.totals(),
        "not_rewritten": [
            {"nodes": s.nodes, "status": s.status, "reason": s.reason}
            for s in done.ledger.sites
            if s.kind in WEIGHTED_KINDS and s.status != "rewritten"
        ],
        "remarks": done.remarks,
        "rules": {name: vars(s) for name, s in done.outcome.stats.items()},
    }


def rules(all_rules: Iterable[tuple[str, Rule[Any, Any]]], stats: dict[str, dict[str, float]]) -> Table:
    """Every rule with its stage, file and line, and what it did in the last run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "rule", "pattern", "at", "hits", "tries", "does"):
        table.add_column(name, justify="right" if name in ("hits", "tries") else "left", overflow="fold")
    for stage, r in all_rules:
        s = stats.get(r.name, {})
        hits, tries = (str(s.get(k, "")) for k in ("hits", "tries"))
        table.add_row(stage, r.name, r.pattern.__name__, str(r.location), hits, tries, escape(r.summary))
    return table


def profile(stats: dict[str, RuleStats], all_rules: Iterable[tuple[str, Rule[Any, Any]]]) -> Table:
    """What each rule did and cost in this run, the dearest first."""
    at = {r.name: r.location for _, r in all_rules}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rule", "at", "tries", "hits", "declines", "match ms", "ms", "share"):
        table.add_column(name, justify="left" if name in ("rule", "at") else "right")
    whole = sum(s.seconds for s in stats.values())
    for name, s in sorted(stats.items(), key=lambda item: -item[1].seconds):
        counts = (str(n) for n in (s.tries, s.hits, s.declines))
        share = s.seconds / whole if whole else 0.0
        times = (f"{t * 1e3:.1f}" for t in (s.matching, s.seconds))
        table.add_row(name, str(at.get(name, "")), *counts, *times, f"{share:.0%}")
    table.add_section()
    counts = (str(sum(getattr(s, k) for s in stats.values())) for k in ("tries", "hits", "declines"))
    matching = sum(s.matching for s in stats.values())
    table.add_row("all rules", "", *counts, f"{matching * 1e3:.1f}", f"{whole * 1e3:.1f}", "")
    return table


def facts(done: Rewritten) -> dict[str, Any]:
    """The model as it is: opsets, nodes, sites, sizes."""
    linears, norms = done.ledger.of("linear"), done.ledger.of("norm")
    return {
        "model": str(done.model),
        "opsets": {o.domain or "ai.onnx": o.version for o in done.proto.opset_import},
        "ir_version": done.proto.ir_version,
        "producer": f"{done.proto.producer_name} {done.proto.producer_version}".strip(),
        "nodes": len(done.proto.graph.node),
        "inputs": [v.name for v in done.proto.graph.input],
        "outputs": [v.name for v in done.proto.graph.output],
        "linears": len(linears),
        "norms": len(norms),
        "weight_bytes": done.ledger.bytes_before,
        "linear_weight_bytes": sum({s.weight.name: s.weight.bytes_before for s in linears if s.weight}.values()),
    }


def inspected(done: Rewritten) -> RenderableType:
    """The report of `qpass inspect`: the model, every site, and what the spec would do."""
    f = facts(done)
    opsets = ", ".join(f"{d} {v}" for d, v in f["opsets"].items())
    head = (
        f"{f['model']}: {f['nodes']} nodes, opset {opsets}, ir_version {f['ir_version']}"
        + (f", by {f['producer']}" if f["producer"] else "")
        + f"\n{f['linears']} Linears ({size(f['linear_weight_bytes'])} of {size(f['weight_bytes'])} weights), "
        + f"{f['norms']} norms"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("#", "kind", "site", "weight", "shape", "fed by", "would be", "why"):
        table.add_column(name, overflow="fold")
    for i, s in enumerate(done.ledger.sites):
        would = f"[{STYLE[s.status]}]{s.op if s.status == 'rewritten' else s.status}[/]"
        weight, shape = (s.weight.name, "×".join(map(str, s.weight.shape))) if s.weight else ("", "")
        fed = str(s.fed_by) if s.fed_by is not None else ""
        table.add_row(str(i), s.kind, escape(s.name), escape(weight), shape, fed, would, escape(s.reason or ""))
    notes = [f"[dim]note:[/] {escape(r)}" for r in done.remarks]
    return Group(
        escape(head), "", table, "", f"with {escape(done.spec.describe())}:", escape(sizes(done.ledger)), *notes
    )


def calibrated(stats: Stats, model: Path, output: Path) -> RenderableType:
    """The report of `qpass calibrate`."""
    tokens = max((s.count for s in stats.tensors.values()), default=0)
    left_out = f", padding left out by '{stats.key.mask}'" if stats.key.mask else ""
    return Group(
        f"{stats.done} samples, up to {tokens} tokens an activation{left_out}; {len(stats.tensors)} activations",
        escape(f"wrote {output}"),
        f"next: [bold]qpass rewrite {escape(str(model))} --preset w8a8 --calibration {escape(str(output))}[/]",
    )


def verified(found: Report) -> RenderableType:
    """The report of `qpass verify`: outputs, and the sites where the models part."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("output", "cosine", "worst", "relative error", "max abs", "equal"):
        table.add_column(name, justify="left" if name == "output" else "right")
    for o in found.outputs:
        cosine = [f"{c:.6f}" if c is not None else "" for c in (o.cosine, o.worst_cosine)]
        table.add_row(escape(o.name), *cosine, f"{o.relative_error:.3g}", f"{o.max_abs:.3g}", f"{o.equal:.1%}")
    verdict = f"every output reaches {found.minimum:g}" if found.passed else f"[red]below {found.minimum:g}[/]"
    parts: list[RenderableType] = [f"{found.samples} samples: {escape(found.inputs)}", "", table, "", verdict]
    parts += [f"[dim]note:[/] {escape(n)}" for n in found.notes]
    if found.sites:
        sites = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("worst sites", "op", "cosine", "relative error"):
            sites.add_column(name, justify="left" if name in ("worst sites", "op") else "right", overflow="fold")
        for s in found.worst_sites():
            sites.add_row(escape(s.name), s.op or "", f"{s.cosine:.6f}", f"{s.relative_error:.3g}")
        p = found.parted
        first = f"they part at {p.kind} '{p.name}', relative error {p.relative_error:.3g}" if p else "no site parts"
        parts += ["", escape(first), sites]
    return Group(*parts)


def verified_engine(found: EngineReport) -> RenderableType:
    """The report of `qpass verify` for an engine: each output's error, by where it comes from."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("output", "of", "cosine", "worst", "relative error", "max abs", "equal"):
        table.add_column(name, justify="left" if name in ("output", "of") else "right")
    kinds = {
        "the engine's arithmetic": found.arithmetic,
        "of rounding to float16": found.rounding,
        "quantization": found.quantization,
        "both": found.outputs,
    }
    there = {what: reports for what, reports in kinds.items() if reports}
    for reports in zip(*there.values(), strict=True):
        for what, o in zip(there, reports, strict=True):
            cosine = [f"{c:.6f}" if c is not None else "" for c in (o.cosine, o.worst_cosine)]
            errors = (f"{o.relative_error:.3g}", f"{o.max_abs:.3g}", f"{o.equal:.1%}")
            table.add_row(escape(o.name) if o is reports[0] else "", what, *cosine, *errors)
    most = " and ".join(dict.fromkeys(f"{limit:.3g}" for limit in found.limits.values()))
    limits = f"cosines of both ≥ {found.minimum:g}, errors of the engine's arithmetic ≤ {most}"
    verdict = f"passed: {limits}" if found.passed else "[red]failed:[/] " + escape("; ".join(found.failures))
    about = f"{escape(found.backend)}, {found.samples} samples: {escape(found.inputs)}"
    return Group(about, "", table, "", verdict, *(f"[dim]note:[/] {escape(n)}" for n in found.notes))


def presets() -> Table:
    """The presets and what each does."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("preset", "what", "for"):
        table.add_column(name, overflow="fold")
    for name, preset in PRESETS.items():
        table.add_row(name, QuantSpec.preset(name).describe().removeprefix(f"{name}: "), preset.doc)
    return table


def stats_of(stats: dict[str, RuleStats]) -> dict[str, dict[str, float]]:
    """Rule statistics as plain data."""
    return {name: vars(s) for name, s in stats.items()}


def console(stderr: bool = False) -> Console:
    """A console that does not break long lines where its output is no terminal."""
    c = Console(stderr=stderr, highlight=False)
    return c if c.is_terminal else Console(stderr=stderr, highlight=False, width=200, soft_wrap=True)
