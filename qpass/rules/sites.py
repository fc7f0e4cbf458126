"""Sites: what there is to quantize in a model, found once, and what became of each."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from qpass.filters import SiteNames
from qpass.graph import Const, Lazy, Node, rows_of
from qpass.graph.constants import ROWS
from qpass.graph.dtypes import file_bytes
from qpass.ops import DOMAIN
from qpass.rewriter import LIFTED, Kind, Outcome, Rewriter, Site, Weight
from qpass.rewriter.ledger import WEIGHTED_KINDS
from qpass.rewriter.view import producer
from qpass.rules.functions import Functions
from qpass.rules.parts import ACTIVATIONS, Mlp
from qpass.rules.stored import find
from qpass.rules.tied import Embeddings
from qpass.rules.unlifted import Reasons, gathered_stack, kind_of, nearly_norms, weights

_TELLS_MORE = ("rewritten", "excluded", "declined", "kept", "near_miss")


@dataclass(eq=False)
class Found:
    """A site with its graph side."""

    site: Site
    names: SiteNames
    originals: tuple[Node, ...]
    lifted: Node | None = None
    """The in-memory node that stands for it; None where no lifting rule knew it."""
    weight: Const | None = None
    made: list[Node] = field(default_factory=list)
    """New nodes that took its place."""
    tensor: str | None = None
    """Name of the activation that a Linear reads, or that a norm or an MLP's activation gives: what calibration
    statistics are kept under."""
    mlp: Mlp | None = None
    """The Linears before and behind an activation."""


class Survey:
    """Every site of a model in graph order; made after lifting, before the rules proper run.

    Args:
        graphs: the graphs of the model, each with the prefix its nodes get in the ledger ("" for the main graph).
        outcome: what rules that ran before or during lifting have done.
    """

    def __init__(self, graphs: Sequence[tuple[str, Rewriter]], outcome: Outcome) -> None:
        self.found: list[Found] = []
        rewriters = [r for _, r in graphs]
        self._embeddings = Embeddings(rewriters)
        self._reasons = Reasons(rewriters, outcome)
        self._functions = Functions(rewriters[0].edit.model.proto)
        self._claimed = {n: e for e in outcome.events if not e.respelt for n in e.claimed}
        self._heirs = _heirs(rewriters, outcome)
        self._beside: dict[Node, list[Node]] = {}
        """In-memory node that stands for merged ones → the nodes that give each its own result."""
        for prefix, r in graphs:
            lifted = [self._lifted(prefix, r, n) for n in r.position if n.domain == LIFTED]
            here = [f for f in lifted if f is not None]
            held = {n for f in here for n in f.originals}
            for n in r.before:
                if n not in held:
                    here += self._rest(prefix, r, n)
            here += self._spelt_norms(prefix, r, outcome, {n for f in here for n in f.originals})
            here.sort(key=lambda f: max((r.before[n] for n in f.originals), default=len(r.before)))
            self.found += here
        self.by_lifted = {f.lifted: [f] for f in self.found if f.lifted is not None}
        """The sites that an in-memory node stands for: one, or those that were merged into it."""
        self.sharers: dict[int, list[Found]] = defaultdict(list)
        """Root tensor of a weight (by id) → the Linears that use it, in whatever view."""
        index = {f.lifted: i for i, f in enumerate(self.found)}
        for f in self.found:
            if f.mlp is not None:
                f.site.parts = [index[n] for n in f.mlp.linears if n in index]
            if f.weight is not None and f.lifted is not None:
                self.sharers[id(f.weight.root)].append(f)

    def _lifted(self, prefix: str, r: Rewriter, node: Node) -> Found | None:
        """The site of a lifted node; None for an activation that is none: no Linear reads it, or a rule made it."""
        originals = sorted(set(self._originals(r, node)), key=r.before.__getitem__)
        mlp = Mlp.around(node, r.view) if node.op in ACTIVATIONS else None
        if mlp is not None and not (mlp.rows and originals):
            return None
        weighted = node.op.lower() in WEIGHTED_KINDS
        weight = r.view.constant(node.inputs[1]) if weighted else None
        names = SiteNames(
            nodes=tuple(prefix + r.labels[n] for n in originals) or (prefix + r.edit.label(node),),
            weight=weight.origin if weight is not None else None,
            scopes=tuple(dict.fromkeys(s for n in originals for s in _scopes(n))),
            tied=weight is not None and self._embeddings.tied(weight),
        )
        site = Site(node.op.lower() if mlp is None else mlp.kind, list(names.nodes), weight=_weight(weight))
        tensor = node.inputs[0] if weighted else node.outputs[0]
        return Found(site, names, tuple(originals), node, weight, tensor=prefix + tensor.name, mlp=mlp)

    def _originals(self, r: Rewriter, node: Node) -> Iterator[Node]:
        """Nodes of the original graph behind a lifted one, the helpers of its constants included."""
        for n in r.stands_for[node]:
            if n.domain == LIFTED:
                yield from self._originals(r, n)
            else:
                yield from self._before(r, n)
        for c in r.consts[node]:
            yield from (n for n in c.via if n in r.before)

    def _before(self, r: Rewriter, node: Node) -> Iterator[Node]:
        """The nodes of the original graph that a node stands for; it may have been put in another's place twice."""
        if node in r.before:
            yield node
        for original in self._heirs.get(node, ()):
            yield from self._before(r, original)

    def _rest(self, prefix: str, r: Rewriter, node: Node) -> Iterator[Found]:
        """Sites that were not lifted: claimed by a rule of the user's, in a function's body, or of no known form."""
        label = prefix + r.labels[node]
        for inside in self._functions.inside(node, label, r.view):
            yield _unlifted(Site(inside.kind, [inside.path], "declined", reason=inside.reason), node)
        stack = gathered_stack(node, r.view)
        kind = "experts" if stack is not None else kind_of(node)
        if kind is None:
            return
        if (event := self._claimed.get(node)) is not None:
            mine = [n for n in event.claimed if n in r.before and (n is node or kind_of(n) is None)]
            mine.sort(key=r.before.__getitem__)
            site = Site(kind, [prefix + r.labels[n] for n in mine], "rewritten", event.rule.name)
            made = [n for n, _ in event.new]
            site.new_nodes, site.op = [n.name for n in made], _last_op(made)
            yield _unlifted(site, node, made)
        elif (found := self._reasons.of(node, r.view)) is not None:
            status, reason = found
            constants = weights(node, r.view) if kind == "linear" else []
            weight = stack if stack is not None else next(iter(constants), None)
            yield _unlifted(Site(kind, [label], status, reason=reason, weight=_weight(weight)), node)

    def _spelt_norms(self, prefix: str, r: Rewriter, outcome: Outcome, held: set[Node]) -> Iterator[Found]:
        """Norms written out in a form that nearly is one that qpass knows: the nearest miss of each."""
        near = [m for m in nearly_norms(outcome.misses) if m.root in r.before]
        for m in sorted(near, key=lambda m: (-len(m.nodes), r.before[m.root])):
            nodes = [n for n in m.nodes if n in r.before]
            if held.isdisjoint(nodes):
                held.update(nodes)
                nodes.sort(key=r.before.__getitem__)
                status = "declined" if m.kind is Kind.GUARD else "near_miss"
                site = Site("norm", [prefix + r.labels[n] for n in nodes], status, reason=m.why)
                scopes = tuple(dict.fromkeys(s for n in nodes for s in _scopes(n)))
                yield Found(site, SiteNames(tuple(site.nodes), None, scopes, tied=False), tuple(nodes))

    def merged(self, outcome: Outcome) -> None:
        """Learn which in-memory nodes a rule put in the place of several; to be called before others claim them."""
        for event in outcome.events:
            sites = [f for n in event.claimed for f in self.by_lifted.get(n, ())]
            for node, _ in event.new:
                if event.respelt and node.domain == LIFTED and sites:
                    self.by_lifted[node] = sites
                    self._beside[node] = [n for n, _ in event.new if n is not node]

    def settle(self, outcome: Outcome) -> None:
        """Write into every site what the rules did with it."""
        for event in outcome.events:
            if event.status != "rewritten":
                for f in self.by_lifted.get(event.match.root, ()):
                    if _TELLS_MORE.index(event.status) <= _TELLS_MORE.index(f.site.status):
                        f.site.status, f.site.reason, f.site.rule = event.status, event.why, event.rule.name
                continue
            if event.respelt:
                continue
            for node in event.claimed:
                sites = self.by_lifted.get(node, ())
                for f in sites:
                    f.site.status, f.site.rule = "rewritten", event.rule.name
                    f.site.reason = event.notes.get(node) or None
                    f.made = [*(n for n, at in event.new if at is node), *self._beside.get(node, ())]
                    f.site.new_nodes = [n.name for n in f.made]
                    f.site.op = _last_op(f.made)
                    if f.site.weight is not None:
                        f.site.weight.bytes_after = _new_bytes(f.made) * _rows(f) // sum(map(_rows, sites))
        norm_of = {n: i for i, f in enumerate(self.found) if f.site.kind == "norm" for n in f.made}
        for f in self.found:
            if f.site.kind == "linear":
                feeding = (producer(v) for n in f.made for v in n.inputs if v.dtype == np.int8)
                f.site.fed_by = next((norm_of[p] for p in feeding if p in norm_of), None)
            if f.site.kind != "linear" and f.site.status == "kept" and f.site.reason is None:
                f.site.reason = "no Linear that the spec quantizes with its activations reads it"


def _unlifted(site: Site, node: Node, made: Sequence[Node] = ()) -> Found:
    names = SiteNames(nodes=tuple(site.nodes), weight=None, scopes=tuple(_scopes(node)), tied=False)
    return Found(site, names, (node,), made=list(made))


def _weight(c: Const | None) -> Weight | None:
    """The tensor behind a weight as the original has it, or those of its rows that are the weight.

    The bytes are those of its scales and zero points too.
    """
    if c is None:
        return None
    root = c.root.array if isinstance(c.root, Const) else c.array
    scales: tuple[Lazy, ...] = ()
    if (quantized := find(c.array)) is not None:
        scales = quantized.sources
        root = root if isinstance(c.root, Const) else quantized.base
    name, shape, size = c.origin, list(root.shape), root.nbytes
    if any(n.op == ROWS for n in c.via):
        start, stop = rows_of(c)
        name += f"[{start}]" if stop - start == 1 else f"[{start}:{stop}]"
        shape, size = list(c.shape), file_bytes(root.dtype, c.shape)
    size += sum(s.nbytes for s in scales)
    return Weight(name, shape, str(root.dtype), size, size)


def _heirs(graphs: Iterable[Rewriter], outcome: Outcome) -> dict[Node, list[Node]]:
    """New nodes that were lifted → the original nodes that they stand for.

    A rule that runs before lifting may put one form of a norm or Linear in another's place: that stays one site.
    """
    stood = {n for r in graphs for nodes in r.stands_for.values() for n in nodes}
    out: dict[Node, list[Node]] = {}
    for event in reversed(outcome.events):  # what an heir stands for may be new itself
        sites = [n for n in event.claimed if kind_of(n) is not None]
        helpers = [n for n in event.claimed if kind_of(n) is None]
        new = [n for n, _ in event.new if n in stood and kind_of(n) is not None]
        for heir, original in zip(new, reversed(sites), strict=False):
            out[heir], helpers = [original, *helpers], []
            stood.add(original)
        if event.respelt and not sites and (last := event.new[-1][0]) in stood:  # an activation with a bias
            out[last] = helpers
    return out


def _scopes(node: Node) -> Iterator[str]:
    """Module scopes of a node: torch's dynamo exporter writes metadata, its TorchScript one a path as the name."""
    if node.name.startswith("/"):
        yield node.name.strip("/").rpartition("/")[0].replace("/", ".")
    for p in node.proto.metadata_props if node.proto is not None else ():
        if p.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = ast.literal_eval(p.value)
            except (ValueError, SyntaxError):
                continue
            yield from (s for s in scopes if isinstance(s, str) and s)


def _rows(f: Found) -> int:
    """Output channels of a Linear, which all cost the same."""
    return f.weight.shape[1] if f.weight is not None else 0


def _last_op(made: Sequence[Node]) -> str | None:
    """The type of the plugin node that gives a site's result: the last, quantizing its input comes before."""
    return next((n.op for n in reversed(made) if n.domain == DOMAIN), None)


def _new_bytes(nodes: Sequence[Node]) -> int:
    """Bytes of the constants that were made for a site: packed weight, scales, zero points."""
    new = {id(v): v for n in nodes for v in n.inputs if isinstance(v, Const) and v.proto is None}
    return sum(c.array.nbytes for c in new.values() if c.dtype != np.int64)  # those are shapes
