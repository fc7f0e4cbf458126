"""Why sites are as they are, in words: what `qpass explain` prints and the page shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from rich.filesize import decimal as size

from qpass.errors import QpassError
from qpass.pipeline import Rewritten
from qpass.rewriter import Kind, Miss, Site
from qpass.rewriter.view import MOVES_ONLY

OPEN = ("near_miss", "declined", "excluded")
"""The statuses that ask for an explanation, the most surprising first; what is excluded was asked for."""

NEAR = 0.4
"""Share of a pattern that must have matched for a miss to be called near."""

NAMES = 5
"""How many names a line lists."""


def explained(done: Rewritten, rule: str | None, limit: int) -> list[str]:
    """Why sites were left, and what came near at others; of a rule that is asked for, all that came near.

    An entry is a line that names the site and the cause, and indented ones with what was tried and with sites alike.
    """
    if rule is not None:
        return _of_rule(done, rule, limit)
    near = misses(done)
    entries = [_about(sites, near) for status in OPEN[:-1] for sites in _alike(done, status)]
    for m in unclaimed(done, near):
        entries += [[f"near miss: {m.root.op} '{m.label}': {brief(m.why, m.label)}", f"    {_where(m)}"]]
    entries += [_about(sites, near) for sites in _alike(done, "excluded")]
    lines = [line for entry in entries[:limit] for line in entry]
    if len(entries) > limit:
        lines.append(f"and {len(entries) - limit} more; --limit {len(entries)} shows them")
    lines += [line for sites in _alike(done, "rewritten") if sites[0].reason for line in _about(sites, ())]
    if not entries:
        whole = "every site is rewritten, or kept because the spec asks nothing of it"
        lines.append(whole if done.ledger.sites else "there is no norm and no Linear in it")
    return lines + [f"note: {r}" for r in done.remarks]


def unclaimed(done: Rewritten, near: Iterable[Miss]) -> list[Miss]:
    """Near misses at nodes that no open site holds: a norm that is kept, a bias that stays an Add.

    Moving data computes nothing, so that nothing is lost where such a pattern ends in a move.
    """
    told = {n for s in done.ledger.sites if s.status in OPEN for n in s.nodes}
    return [m for m in near if m.kind > Kind.COMPUTED and m.root.op not in MOVES_ONLY and told.isdisjoint(m.labels)]


def _about(sites: list[Site], near: Iterable[Miss]) -> list[str]:
    first, rest = sites[0], sites[1:]
    status = "rewritten, but" if first.status == "rewritten" else f"{first.status.replace('_', ' ')}:"
    lines = [f"{first.kind} '{first.name}' {status} {brief(first.reason or '', first.name)}"]
    if (miss := nearest(first, near)) is not None:
        lines.append(f"    {_where(miss)}")
    if rest:
        lines.append(f"    and {len(rest)} more like it: {_listed(s.name for s in rest)}")
    return lines


def brief(why: str, name: str) -> str:
    """A cause without the name of its node, where that has just been said."""
    output = name.partition("@")[2]
    return re.sub(rf"^\w+ '({re.escape(name)}|{re.escape(output)})': ", "", why)


def _of_rule(done: Rewritten, rule: str, limit: int) -> list[str]:
    near = misses(done, rule)
    if near:
        more = [f"and {len(near) - limit} more; --limit {len(near)} shows them"] if len(near) > limit else []
        return [*map(str, near[:limit]), *more]
    s = done.outcome.stats.get(rule)
    if s is None or not s.tries:
        return [f"{rule} was not tried: the model has no node that could be the last of its pattern"]
    return [f"{rule} has no near misses: tried at {s.tries} nodes, rewrote {s.hits}, declined {s.declines}"]


def about_site(done: Rewritten, name: str) -> list[str]:
    """All that is known of the sites that hold a node of this name, a glob.

    Raises:
        QpassError: there are none.
    """
    numbered = list(enumerate(done.ledger.sites))
    found = [(i, s) for i, s in numbered if name in s.nodes]
    found = found or [(i, s) for i, s in numbered if any(fnmatchcase(n, name) for n in s.nodes)]
    if not found:
        names = _listed((s.name for s in done.ledger.sites), 3)
        raise QpassError(f"--site {name}: no site holds such a node; the sites are {names or 'none at all'}")
    near = misses(done)
    lines = []
    for i, s in found:
        became = f" → {s.op}" if s.op else ""
        why = f": {brief(s.reason, s.name)}" if s.reason else ""
        lines.append(f"[{i}] {s.kind} '{s.name}' {s.status.replace('_', ' ')}{became}{why}")
        facts = {"rule": s.rule or "", "nodes": ", ".join(s.nodes), "new nodes": ", ".join(s.new_nodes)}
        if s.weight is not None:
            shape = "×".join(map(str, s.weight.shape))
            before, after = size(s.weight.bytes_before), size(s.weight.bytes_after)
            facts["weight"] = f"{s.weight.name} [{shape}] {s.weight.dtype}, {before} → {after}"
        if s.fed_by is not None:
            facts["fed by"] = f"[{s.fed_by}] norm '{done.ledger.sites[s.fed_by].name}'"
        if s.parts:
            facts["its Linears"] = ", ".join(f"[{j}] '{done.ledger.sites[j].name}'" for j in s.parts)
        if s.kind == "norm":
            facts["feeds"] = ", ".join(f"[{j}] '{t.name}'" for j, t in numbered if t.fed_by == i)
        if (miss := nearest(s, near)) is not None and s.status in OPEN:
            facts["nearest"] = _where(miss)
        lines += [f"    {what}: {fact}" for what, fact in facts.items() if fact]
    return lines


def misses(done: Rewritten, rule: str | None = None) -> list[Miss]:
    """Near misses of all rules or one, the nearest first; not those within another that came nearer."""
    near = [m for m in done.outcome.misses if rule in (None, m.rule) and m.matched >= NEAR * m.total]
    kept: list[Miss] = []
    held: dict[str, list[Miss]] = {}
    for m in sorted(near, key=lambda m: m.rank, reverse=True):
        if any(m.labels <= k.labels for k in held.get(m.label, ())):
            continue
        kept.append(m)
        for n in m.labels:
            held.setdefault(n, []).append(m)
    return kept


def nearest(site: Site, near: Iterable[Miss]) -> Miss | None:
    """The first of the misses that has to do with a site."""
    return next((m for m in near if not m.labels.isdisjoint(site.nodes)), None)


def _where(m: Miss) -> str:
    if m.kind is Kind.GUARD:
        return f"{m.rule} declined at {m.at}"
    return f"{m.pattern} matched {m.matched} of {m.total} nodes up to {m.root.op} '{m.label}'; stopped at {m.at}"


def _alike(done: Rewritten, status: str) -> list[list[Site]]:
    """The sites of a status; those of one kind whose reasons differ in nothing but names together."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for s in done.ledger.sites:
        if s.status == status:
            groups.setdefault((s.kind, re.sub(r"'[^']*'", "''", s.reason or "")), []).append(s)
    return list(groups.values())


def _listed(names: Iterable[str], most: int = NAMES) -> str:
    all_names = list(names)
    return ", ".join(f"'{n}'" for n in all_names[:most]) + (" …" if len(all_names) > most else "")
