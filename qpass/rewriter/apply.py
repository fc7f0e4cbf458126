"""Applies stages of rules to one graph: match, emit, replace, and put back what nobody claimed."""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass.graph import Const, Model, Node, Value
from qpass.rewriter.deduce import deduce_dtypes, deduce_shapes
from qpass.rewriter.edit import Editor, Pool, take_over
from qpass.rewriter.location import Location, PatternError
from qpass.rewriter.match import Search
from qpass.rewriter.miss import Kind, Miss
from qpass.rewriter.pattern import LIFTED, Pattern
from qpass.rewriter.rule import Decline, Emit, Rule
from qpass.rewriter.view import View, domain_of, producer

Stage = Sequence[Rule[Any, Any]]

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Event:
    """One rule's success or refusal at one match."""

    rule: Rule[Any, Any]
    match: Pattern
    status: str  # "rewritten" | "declined" | "kept" | "excluded"
    why: str = ""
    claimed: tuple[Node, ...] = ()
    """The nodes of the match, sub-matches included, that left the graph."""
    new: tuple[tuple[Node, Node], ...] = ()
    """Every new node, with the matched node it was emitted for."""
    notes: Mapping[Node, str] = field(default_factory=dict)
    """What the rule remarked on a claimed node, for the ledger."""
    respelt: bool = False
    """Whether the new nodes only say the same in other words: they go back unless a later rule claims one of them."""


@dataclass
class RuleStats:
    """What a rule did and cost in one run."""

    tries: int = 0
    hits: int = 0
    declines: int = 0
    seconds: float = 0.0
    matching: float = 0.0
    """Of the seconds those that went into finding matches; the others into what the rule did with them."""


@dataclass
class Outcome:
    """Everything that happened while the stages ran."""

    events: list[Event] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    stats: dict[str, RuleStats] = field(default_factory=lambda: defaultdict(RuleStats))


class Rewriter:
    """Owns one graph while rules run on it.

    Lifted and respelt nodes replace their originals in memory; `unlift` puts the originals of unclaimed ones back, the
    same objects with the same protos, so that they are written as they came.

    Args:
        graph: the model's graph, or one inside it.
        outcome: what the graphs of a model share: an account of what happened.
        pool: and the initializers that rules made.
        prefix: the path that leads to the graph, before the names of its nodes in the ledger and in misses.
    """

    def __init__(
        self, model: Model, graph: Any, outcome: Outcome | None = None, pool: Pool | None = None, prefix: str = ""
    ) -> None:
        self.view = View(model, graph)
        self.edit = Editor(model, graph, self.view)
        self.outcome = outcome if outcome is not None else Outcome()
        self.pool = pool if pool is not None else Pool(model)
        self.position = self.edit.position
        self.labels = self.edit.labels
        self.prefix = prefix
        self.view.inside = self.position
        self.before: dict[Node, int] = {n: i for i, n in enumerate(graph.nodes)}
        self._respelt: list[tuple[list[Node], list[Node]]] = []  # new nodes, and the nodes whose outputs they took over
        self.consts: dict[Node, tuple[Const, ...]] = {}  # lifted node → the constants its match captured
        self.stands_for: dict[Node, tuple[Node, ...]] = {}  # lifted node → the nodes its match held
        deduce_dtypes(graph.nodes, self.view)
        deduce_shapes(graph.nodes, self.view)

    def run(self, rules: Stage, config: Any) -> None:
        """One stage: every node once, last to first, larger patterns before smaller ones.

        Raises:
            PatternError: a rule is wrong in itself, such as one that returns nothing, or that emits an op which
                roots a rule of this stage without declaring it. The message has file and line.
        """
        index: dict[tuple[str, str], list[Rule[Any, Any]]] = defaultdict(list)
        for r in sorted(rules, key=lambda r: -r.benefit):
            for root in r.roots:
                index[root].append(r)
        known = len(self.outcome.misses)
        for node in sorted(self.position, key=self.position.__getitem__, reverse=True):
            for r in index.get((domain_of(node), node.op), ()):
                if node not in self.position:
                    break
                self._try(r, node, config, index)
        self.outcome.misses[known:] = filter(self._is_open, self.outcome.misses[known:])
        self.edit.settle()

    def unlift(self) -> None:
        """Put back what was lifted or respelt and no rule claimed a part of, the last first."""
        for new, replaced in reversed(self._respelt):
            if all(n in self.position for n in new):
                for n in new:
                    self.edit.detach(n)
                for n in replaced:
                    self.edit.restore(n)
        self._respelt.clear()
        self.edit.settle()

    def _is_open(self, miss: Miss) -> bool:
        """Whether a miss leaves something to explain: x · w + r is no Linear with a bias, but x · w is one."""
        return miss.kind > Kind.COMPUTED or all(n in self.position for n in miss.nodes)

    def _try(self, r: Rule[Any, Any], node: Node, config: Any, index: Mapping[tuple[str, str], Any]) -> None:
        stats = self.outcome.stats[r.name]
        stats.tries += 1
        start = time.perf_counter()
        try:
            search = Search(r.pattern, node, self.view)
            m = search.run()
            stats.matching += time.perf_counter() - start
            if m is None:
                if search.near and (miss := search.miss(r.name)) is not None:
                    self.outcome.misses.append(self._labelled(miss))
                return
            emit = Emit(self.pool.constant, node, self.edit.label)
            try:
                result = _call(r, m, emit, config)
                self._check_roots(r, emit, index)
                event = self._replace(r, m, emit, result)
            except Decline as no:
                stats.declines += 1
                self.outcome.events.append(Event(r, m, no.status, no.why))
                if no.status == "declined":
                    name = r.pattern.__name__
                    miss = Miss(node, name, m.nodes, str(no.at), no.why, Kind.GUARD, r.name)
                    self.outcome.misses.append(self._labelled(miss))
                return
            stats.hits += 1
            self.outcome.events.append(event)
        finally:
            stats.seconds += time.perf_counter() - start

    def _labelled(self, miss: Miss) -> Miss:
        named = {n: self.prefix + self.edit.label(n) for n in (miss.root, *miss.nodes)}
        return replace(miss, label=named[miss.root], labels=frozenset(named.values()))

    @staticmethod
    def _check_roots(r: Rule[Any, Any], emit: Emit, index: Mapping[tuple[str, str], Any]) -> None:
        for d in emit.drafts:
            if (d.domain, d.op) in index and d.op not in r.emits:
                raise PatternError(
                    f"{r.location}: {r.name} emits {d.op}, which roots {index[d.domain, d.op][0].name} of the same "
                    "stage; put one of them in another stage"
                )

    def _replace(self, r: Rule[Any, Any], m: Pattern, emit: Emit, result: Any) -> Event:
        mapping = _mapping(r, m, result)
        replaced = {old: self._computes(r, old) for old in mapping}
        held = [*m.nodes, *(n for f in m.fanouts for sub in _listed(getattr(m, f)) for n in sub.nodes)]
        self._check_orphans(r, replaced, set(held))
        drafts = take_over(emit.drafts, mapping, m.root)
        first = min(self.position[n] for n in replaced.values())
        self.edit.refuse_cycle(drafts, first, r.location)

        anchor = {id(d): n for d in drafts for v in d.outputs if (n := replaced.get(v)) is not None}
        places = {n: self.position[n] for n in replaced.values()}
        feeding = [v for n in places for v in n.inputs]
        for n in places:
            self.edit.detach(n)
        new = []
        for d in drafts:
            root = anchor.get(id(d))
            node = self.edit.add(d, places[root] if root is not None else first)
            if d.domain == LIFTED:
                self.stands_for[node] = m.nodes
                self.consts[node] = tuple(c for k in m.captures if isinstance(c := getattr(m, k), Const))
            new.append((node, d.site))
        respelt = r.respells or any(n.domain == LIFTED for n, _ in new)
        if respelt:
            self._respelt.append(([n for n, _ in new], list(places)))
        deduce_dtypes([n for n, _ in new], self.view)
        self.edit.bury_unused(feeding)
        for old, like in emit.shape_of.items():
            self.edit.read_shape_of(like, old)
            self.edit.bury_unused([old])
        claimed = tuple(n for n in dict.fromkeys(held) if n not in self.position)
        return Event(r, m, "rewritten", claimed=claimed, new=tuple(new), notes=dict(emit.notes), respelt=respelt)

    def _computes(self, r: Rule[Any, Any], old: Value) -> Node:
        node = producer(old)
        if node is None or node not in self.position:
            raise PatternError(f"{r.location}: {r.name} replaces '{old.name}', which no node of this graph computes")
        return node

    def _check_orphans(self, r: Rule[Any, Any], replaced: Mapping[Value, Node], held: set[Node]) -> None:
        """A node goes with all its outputs: none that is needed may be left without a producer."""
        for node in dict.fromkeys(replaced.values()):
            for out in node.outputs:
                if out not in replaced and (not held.issuperset(out.outputs) or self.view.is_output(out)):
                    raise PatternError(
                        f"{r.location}: {r.name} replaces an output of {node.op} '{self.edit.label(node)}', but not "
                        f"its output '{out.name}', which is needed; replace both"
                    )


def _call(r: Rule[Any, Any], m: Pattern, emit: Emit, config: Any) -> Any:
    """The rule's result; what goes wrong in a rule from outside the package is told with its file and line."""
    try:
        return r.fn(m, emit, config)
    except (Decline, PatternError, QpassError):
        raise
    except Exception as error:
        if Path(r.location.file).resolve().is_relative_to(_PACKAGE):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == r.location.file]
        at = Location(r.location.file, (frames[-1].lineno if frames else None) or r.location.line)
        raise PatternError(f"{at}: {r.name} raised {type(error).__name__}: {error}") from error


def _mapping(r: Rule[Any, Any], m: Pattern, result: Any) -> dict[Value, Value]:
    """What a rule returned as old value → new value, each new one of the dtype and shape of the old."""
    wants = "return the value that replaces `y`, or a dict from old values to new ones"
    mapping: dict[Any, Any] = dict(result) if isinstance(result, Mapping) else {m.y: result}
    if not mapping:
        raise PatternError(f"{r.location}: {r.name} returned an empty dict; {wants}, or decline with need()")
    for old, new in mapping.items():
        if not isinstance(old, Value):
            raise PatternError(f"{r.location}: {r.name} returned a dict with the key {old!r}; {wants}")
        if not isinstance(new, Value | Const):
            got = f"{new!r} for '{old.name}'" if isinstance(result, Mapping) else f"{new!r}"
            raise PatternError(f"{r.location}: {r.name} returned {got}; {wants}")
        if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
            raise PatternError(
                f"{r.location}: {r.name} replaces '{old.name}', which is {old.dtype}, with a value that is {new.dtype}"
            )
        if _clash(old.shape, new.shape):
            raise PatternError(
                f"{r.location}: {r.name} replaces '{old.name}' of shape {list(old.shape or ())} with a value of shape "
                f"{list(new.shape or ())}"
            )
    return mapping


def _clash(a: Any, b: Any) -> bool:
    """Whether two shapes cannot be the same."""
    if a is None or b is None:
        return False
    return len(a) != len(b) or any(
        isinstance(i, int) and isinstance(j, int) and i != j for i, j in zip(a, b, strict=True)
    )


def _listed(value: Any) -> list[Pattern]:
    return value if isinstance(value, list) else []
