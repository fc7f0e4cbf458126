"""Applies stages of rules to one graph: match, emit, replace, and put back what nobody claimed."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpass.graph import Const, Lazy, Model, Node, Value
from qpass.graph.order import sort_nodes
from qpass.rewriter.match import Kind, Miss, declined, match, of_rule
from qpass.rewriter.pattern import LIFTED, Pattern, PatternError
from qpass.rewriter.rule import Decline, Draft, Emit, Rule
from qpass.rewriter.view import SHAPE_OPS, View, domain_of, producer

Stage = Sequence[Rule[Any, Any]]


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


@dataclass
class RuleStats:
    """What a rule did and cost in one run."""

    tries: int = 0
    hits: int = 0
    declines: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """Everything that happened while the stages ran."""

    events: list[Event] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    stats: dict[str, RuleStats] = field(default_factory=lambda: defaultdict(RuleStats))


class Rewriter:
    """Owns one graph while rules run on it.

    Lifted nodes replace their originals in memory; `unlift` puts the originals of unclaimed ones back, the same
    objects with the same protos, so that they are written as they came.
    """

    def __init__(self, model: Model, graph: Any, outcome: Outcome | None = None) -> None:
        self.model = model
        self.graph = graph
        self.view = View(model, graph)
        self.outcome = outcome if outcome is not None else Outcome()
        self.before: dict[Node, int] = {n: i for i, n in enumerate(graph.nodes)}
        self.labels = _labels(graph.nodes)
        self.position: dict[Node, tuple[int, ...]] = {n: (i,) for n, i in self.before.items()}
        self.view.inside = self.position
        self.originals: dict[Node, Node] = {}  # lifted node → the node whose output it took over
        self.consts: dict[Node, tuple[Const, ...]] = {}  # lifted node → the constants its match captured
        self.stands_for: dict[Node, tuple[Node, ...]] = {}  # lifted node → the nodes its match held
        self._snapshots: dict[Node, tuple[list[Value], list[Value], tuple[int, ...]]] = {}  # of nodes taken out
        self._buried: dict[Value, Node] = {}  # value nobody needed → the node that computed it
        self._made: dict[int, tuple[Lazy, Const]] = {}
        self._serial = 0

    # -- stages

    def run(self, rules: Stage, config: Any) -> None:
        """One stage: every node once, last to first, larger patterns before smaller ones.

        Raises:
            PatternError: a rule emits an op that roots a rule of this stage without declaring it.
        """
        index: dict[tuple[str, str], list[Rule[Any, Any]]] = defaultdict(list)
        for r in sorted(rules, key=lambda r: -r.benefit):
            for root in r.roots:
                index[root].append(r)
        for node in sorted(self.position, key=self.position.__getitem__, reverse=True):
            for r in index.get((domain_of(node), node.op), ()):
                if node not in self.position:
                    break
                self._try(r, node, config, index)
        self._settle()

    def unlift(self) -> None:
        """Put back the originals of every lifted node that no rule claimed."""
        while lifted := [n for n in self.position if n.domain == LIFTED]:
            for node in lifted:
                self._detach(node)
                self._restore(self.originals[node])
        self._settle()

    def _try(self, r: Rule[Any, Any], node: Node, config: Any, index: Mapping[tuple[str, str], Any]) -> None:
        stats = self.outcome.stats[r.name]
        stats.tries += 1
        start = time.perf_counter()
        try:
            m, miss = match(r.pattern, node, self.view)
            if m is None:
                if miss is not None and (miss.matched > 1 or miss.kind > Kind.OP):
                    self.outcome.misses.append(of_rule(miss, r.name))
                return
            emit = Emit(self._constant, node, self.label)
            try:
                result = r.fn(m, emit, config)
                self._check(r, emit, index)
                event = self._replace(r, m, emit, result)
            except Decline as no:
                stats.declines += 1
                self.outcome.events.append(Event(r, m, no.status, no.why))
                if no.status == "declined":
                    self.outcome.misses.append(declined(node, r.pattern, len(m.nodes), str(no.at), no.why, r.name))
                return
            stats.hits += 1
            self.outcome.events.append(event)
        finally:
            stats.seconds += time.perf_counter() - start

    @staticmethod
    def _check(r: Rule[Any, Any], emit: Emit, index: Mapping[tuple[str, str], Any]) -> None:
        for d in emit.drafts:
            if (d.domain, d.op) in index and d.op not in r.emits:
                raise PatternError(
                    f"{r.location}: {r.name} emits {d.op}, which roots {index[d.domain, d.op][0].name} of the same stage; "
                    "put one of them in another stage"
                )

    # -- replacing

    def _replace(self, r: Rule[Any, Any], m: Pattern, emit: Emit, result: Any) -> Event:
        mapping: dict[Value, Value] = dict(result) if isinstance(result, Mapping) else {m.y: result}
        replaced: dict[Value, Node] = {}
        for old in mapping:
            node = producer(old)
            if node is None or node not in self.position:
                raise PatternError(f"{r.location}: {r.name} replaces '{old.name}', which no node of this graph computes")
            replaced[old] = node
        drafts = _take_over(emit.drafts, mapping, m.root)
        first = min(self.position[n] for n in replaced.values())
        self._refuse_cycle(r, drafts, first)

        anchor = {id(d): n for d in drafts for v in d.outputs if (n := replaced.get(v)) is not None}
        places = {n: self.position[n] for n in replaced.values()}
        feeding = [v for n in replaced.values() for v in n.inputs]
        for n in places:
            self._detach(n)
        for old, like in emit.shape_of.items():
            for user in [u for u in old.outputs if u.op in SHAPE_OPS]:
                user.inputs[0] = like
        new = []
        for d in drafts:
            root = anchor.get(id(d))
            node = self._add(d, places[root] if root is not None else first)
            if d.domain == LIFTED and root is not None:
                self.originals[node] = root
                self.stands_for[node] = m.nodes
                self.consts[node] = tuple(c for k in m.captures if isinstance(c := getattr(m, k), Const))
            new.append((node, d.site))
        self._bury_unused(feeding)
        held = [*m.nodes, *(n for f in m.fanouts for sub in _listed(getattr(m, f)) for n in sub.nodes)]
        claimed = tuple(n for n in dict.fromkeys(held) if n not in self.position)
        return Event(r, m, "rewritten", claimed=claimed, new=tuple(new), notes=dict(emit.notes))

    def _refuse_cycle(self, r: Rule[Any, Any], drafts: list[Draft], first: tuple[int, ...]) -> None:
        """Decline where a new node would feed itself; only nodes after the first replaced one can close a cycle."""
        made_by = {v: d for d in drafts for v in d.outputs}
        for start in drafts:
            seen: set[object] = set()
            todo = list(start.inputs)
            while todo:
                v = todo.pop()
                source = made_by.get(v) or producer(v)
                if source is None or source in seen:
                    continue
                if source is start:
                    raise Decline(f"the rewrite would make '{v.name or start.op}' depend on itself", r.location)
                seen.add(source)
                if isinstance(source, Draft) or self.position.get(source, first) >= first:
                    todo += source.inputs

    def label(self, node: Node) -> str:
        """A name for messages and new nodes: the original's where the node stands for one."""
        return self.labels.get(node) or node.name

    def _add(self, d: Draft, place: tuple[int, ...]) -> Node:
        origin = self.label(d.site)
        name = origin if d.domain == LIFTED else self.model.unique(f"{origin}.{d.op}")
        for k, v in enumerate(d.outputs):
            if not v.name:
                v.name = self.model.unique(f"{name}_output_{k}")
        node = Node(d.op, name=name, attrs=d.attrs, inputs=d.inputs, outputs=d.outputs, domain=d.domain)
        self._serial += 1
        self.position[node] = (*place[:1], self._serial)
        return node

    def _constant(self, array: Lazy, name: str) -> Const:
        """The initializer of a lazy array; asked twice for the same array it gives the same one."""
        key = id(array)
        if key not in self._made:  # keeps the array too, so that its id stays its own
            self._made[key] = (array, Const(self.model.unique(name), array))
        return self._made[key][1]

    # -- what leaves the graph, and what comes back

    def _detach(self, node: Node) -> None:
        self._snapshots[node] = (list(node.inputs), list(node.outputs), self.position.pop(node))
        node.inputs.clear()
        node.outputs.clear()

    def _bury_unused(self, values: Sequence[Value]) -> None:
        """Take out the producers of values that nothing needs any more, and theirs."""
        todo = list(values)
        while todo:
            node = producer(todo.pop())
            if node is None or node not in self.position:
                continue
            if any(out.outputs or self.view.is_output(out) for out in node.outputs):
                continue
            todo += node.inputs
            self._buried |= dict.fromkeys(node.outputs, node)
            self._detach(node)

    def _restore(self, node: Node) -> None:
        todo = [node]
        while todo:
            back = todo.pop()
            inputs, outputs, self.position[back] = self._snapshots.pop(back)
            back.inputs, back.outputs = inputs, outputs
            todo += [self._buried.pop(v) for v in dict.fromkeys(inputs) if not v.inputs and v in self._buried]

    def _settle(self) -> None:
        """Write the node order back: replaced nodes in their place, new ones where their root was, then sorted."""
        self.graph.nodes[:] = sorted(self.position, key=self.position.__getitem__)
        sort_nodes(self.graph)


def _take_over(drafts: Sequence[Draft], mapping: Mapping[Value, Value], site: Node) -> list[Draft]:
    """Drafts rewired so that each drafted value takes the place and the name of the graph value it replaces."""
    out = list(drafts)
    made = {v for d in drafts for v in d.outputs}
    takes_over: dict[Value, Value] = {}
    for old, new in mapping.items():
        if new not in made or new in takes_over:  # an existing value, or one that takes over twice
            copy = Value("", dtype=old.dtype, shape=old.shape)
            out.append(Draft("Identity", "", [new], {}, [copy], site))
            new = copy
        takes_over[new] = old
    for d in out:
        d.inputs = [takes_over.get(v, v) for v in d.inputs]
        d.outputs = [takes_over.get(v, v) for v in d.outputs]
    return out


def _listed(value: Any) -> list[Pattern]:
    return value if isinstance(value, list) else []


def _labels(nodes: Sequence[Node]) -> dict[Node, str]:
    """Unique names: a node's own, or `<op>@<first output>` where it has none or shares it."""
    count = Counter(n.name for n in nodes)
    return {n: n.name if n.name and count[n.name] == 1 else f"{n.op}@{n.outputs[0].name}" for n in nodes}
