"""One self-contained HTML page of a run: the ledger, the layers, sizes, coverage, near misses and rules.

The page loads nothing, so it works from a file, a mail or a build's artifacts. The same run gives the same bytes: what
rules cost in seconds is on it only where that is asked for.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass.graph.commit import Folder
from qpass.pipeline import Rewritten, ledger_of
from qpass.report.explain import OPEN, brief, misses, nearest, unclaimed
from qpass.report.text import facts
from qpass.rewriter import Miss, Rule
from qpass.rules import Found


def check_place(page: Path, model: Path, output: Path | None = None, *others: Path | None) -> None:
    """Refuse a place for the page before any work is done.

    Raises:
        QpassError: its folder is missing or cannot be written in, or a file of the run lies there.
    """
    folder = page.parent
    if not folder.is_dir():
        raise QpassError(f"--report {page}: there is no folder {folder}")
    if page.is_dir():
        raise QpassError(f"--report {page}: that is a folder; name a file in it, such as {page / 'report.html'}")
    if not os.access(folder, os.W_OK):
        raise QpassError(f"--report {page}: cannot write in {folder}")
    taken = [model, *others, *((output, ledger_of(output)) if output is not None else ())]
    if any(t is not None and t.resolve() == page.resolve() for t in taken):
        raise QpassError(f"--report {page}: a file of this run has that name; choose another, such as report.html")
    if page.exists() and not _is_page(page):
        raise QpassError(f"--report {page}: a file that is no report of qpass's lies there; choose another name")


def write_page(
    page: Path, done: Rewritten, rules: Iterable[tuple[str, Rule[Any, Any]]], *, timed: bool = False
) -> None:
    """Write the page, complete or not at all.

    Args:
        rules: every rule with its stage, in the order in which they ran.
        timed: tell the time that each rule took, which differs from run to run.

    Raises:
        QpassError: it cannot be written.
    """
    try:
        with Folder(page.parent) as folder:
            temporary = folder.temporary(page.name)
            with open(temporary.fd, "wb", closefd=False) as f:
                f.write(render(page_data(done, rules, timed=timed)))
            folder.commit([(temporary, page)], iter(()))
    except OSError as error:
        raise QpassError(f"--report {page}: cannot be written: {error.strerror}") from error


def render(data: Mapping[str, Any]) -> bytes:
    """The page for some data. Names in a model may hold anything: nothing of them can end the script they are in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    script = _part("page.js") + "\n" + _part("views.js")
    parts = {"title": html.escape(str(data["model"])), "css": _part("page.css"), "js": script, "data": text}
    whole = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], _part("page.html"))
    return whole.encode("utf-8", errors="replace")


def page_data(done: Rewritten, rules: Iterable[tuple[str, Rule[Any, Any]]], *, timed: bool = False) -> dict[str, Any]:
    """All that the page shows, as JSON has it."""
    near = misses(done)
    about = facts(done)
    return {
        "model": done.ledger.model,
        "qpass": done.ledger.qpass,
        "written": done.output.name if done.saved is not None else None,
        "spec": done.spec.describe(),
        "facts": {k: about[k] for k in ("opsets", "ir_version", "producer", "nodes")},
        "totals": done.ledger.totals(),
        "coverage": done.ledger.coverage(),
        "remarks": done.remarks,
        "sites": [_site(f, near) for f in done.found],
        "misses": [_miss(m) for m in unclaimed(done, near)],
        "rules": _rules(done, rules, timed),
        "timed": timed,
    }


def module_path(f: Found) -> list[str]:
    """The modules that lead to a site, a list's name and index in one: ["m", "layers.0", "mlp", "up_proj"].

    Of a model without module scopes the name of the node tells, or that of the weight.
    """
    site = f.site
    path = max(f.names.scopes, key=lambda s: s.count("."), default="")
    if not path:
        name = site.name.strip("/").partition("@")[0]
        path = name.rpartition("/")[0].replace("/", ".") if "/" in name else name if "." in name else ""
        if not path and site.weight is not None:
            path = site.weight.name.rpartition(".")[0]
    parts: list[str] = []
    for part in path.split(".") if path else ():
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return parts


def _site(f: Found, near: list[Miss]) -> dict[str, Any]:
    s = f.site
    miss = nearest(s, near) if s.status in OPEN else None
    return {
        "kind": s.kind,
        "status": s.status,
        "op": s.op,
        "rule": s.rule,
        "name": s.name,
        "reason": brief(s.reason, s.name) if s.reason else None,
        "nodes": s.nodes,
        "new": s.new_nodes,
        "fed": s.fed_by,
        "parts": s.parts,
        "weight": vars(s.weight) if s.weight is not None else None,
        "path": module_path(f),
        "reads": f.tensor if s.kind == "linear" else None,
        "miss": _miss(miss) if miss is not None else None,
    }


def _miss(m: Miss) -> dict[str, Any]:
    return {
        "node": m.label,
        "op": m.root.op,
        "rule": m.rule,
        "pattern": m.pattern,
        "matched": m.matched,
        "total": m.total,
        "at": m.at,
        "why": brief(m.why, m.label),
    }


def _rules(done: Rewritten, rules: Iterable[tuple[str, Rule[Any, Any]]], timed: bool) -> list[dict[str, Any]]:
    out = []
    for stage, r in rules:
        if (s := done.outcome.stats.get(r.name)) is not None:
            about = {"stage": stage, "rule": r.name, "at": str(r.location), "does": r.summary}
            counts = {"tries": s.tries, "hits": s.hits, "declines": s.declines}
            out.append(about | counts | ({"seconds": round(s.seconds, 6)} if timed else {}))
    return out


def _part(name: str) -> str:
    return (resources.files("qpass.report") / name).read_text(encoding="utf-8")


_MARK = '<meta name="generator" content="qpass">'


def _is_page(path: Path) -> bool:
    """Whether a file is a report written before, or empty."""
    try:
        with open(path, "rb") as f:
            start = f.read(1000)
            return not start or _MARK.encode() in start
    except OSError:
        return False
