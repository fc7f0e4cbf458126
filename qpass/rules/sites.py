"""Sites: what there is to quantize in a model, found once, and what became of each."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qpass.graph import Const, Node
from qpass.ops import DOMAIN
from qpass.rewriter import LIFTED, Event, Outcome, Rewriter, Site, View, Weight
from qpass.rewriter.view import domain_of, producer
from qpass.spec import SiteNames

WEIGHTED = frozenset({"MatMul", "Gemm"})
_TELLS_MORE = ("rewritten", "excluded", "declined", "kept", "near_miss")
NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


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
    """Name of the activation that a Linear reads, or that a norm gives: what calibration statistics are kept under."""


class Survey:
    """Every site of a model in graph order; made after lifting, before the rules proper run.

    Args:
        graphs: the graphs of the model, each with the prefix its nodes get in the ledger ("" for the main graph).
        outcome: what rules that ran before or during lifting have done.
    """

    def __init__(self, graphs: Sequence[tuple[str, Rewriter]], outcome: Outcome) -> None:
        self.found: list[Found] = []
        early = {n: e for e in outcome.events if e.status == "rewritten" for n in e.claimed if n.proto is not None}
        embeddings = {id(c.root) for _, r in graphs for c in _gathered(r)}
        for prefix, r in graphs:
            here = [self._lifted(prefix, r, n, embeddings) for n in r.position if n.domain == LIFTED]
            held = {n for f in here for n in f.originals}
            here += [f for n in r.before if n not in held and (f := self._rest(prefix, r, n, early)) is not None]
            here.sort(key=lambda f: max(r.before[n] for n in f.originals))
            self.found += here
        self.by_lifted = {f.lifted: f for f in self.found if f.lifted is not None}
        self.sharers: dict[int, list[Node]] = defaultdict(list)
        """Root tensor of a weight (by id) → the lifted Linears that use it, in whatever view."""
        for f in self.found:
            if f.weight is not None and f.lifted is not None:
                self.sharers[id(f.weight.root)].append(f.lifted)

    def _lifted(self, prefix: str, r: Rewriter, node: Node, embeddings: set[int]) -> Found:
        originals = sorted(set(_originals(r, node)), key=r.before.__getitem__)
        site = Site(node.op.lower(), [prefix + r.labels[n] for n in originals])
        weight, tied = None, False
        if node.op == "Linear":
            weight = next(v for v in node.inputs if isinstance(v, Const))
            tied = id(weight.root) in embeddings
            root = weight.root if isinstance(weight.root, Const) else weight
            site.weight = Weight(
                weight.origin, list(root.shape), str(root.dtype), root.array.nbytes, root.array.nbytes
            )
        names = SiteNames(
            nodes=tuple(site.nodes),
            weight=weight.origin if weight is not None else None,
            scopes=tuple(dict.fromkeys(s for n in originals for s in _scopes(n))),
            tied=tied,
        )
        tensor = node.inputs[0] if node.op == "Linear" else node.outputs[0]
        return Found(site, names, tuple(originals), node, weight, tensor=prefix + tensor.name)

    @staticmethod
    def _rest(prefix: str, r: Rewriter, node: Node, early: dict[Node, Event]) -> Found | None:
        """A weighted MatMul or a norm that was not lifted: claimed by a rule of the user's, or a near miss."""
        if domain_of(node) or node.op not in WEIGHTED | NORMS:
            return None
        kind = "norm" if node.op in NORMS else "linear"
        site = Site(kind, [prefix + r.labels[node]])
        names = SiteNames(nodes=tuple(site.nodes), weight=None, scopes=tuple(_scopes(node)), tied=False)
        if (event := early.get(node)) is not None:
            site.nodes = [prefix + r.labels[n] for n in event.claimed if n in r.labels]
            site.status, site.rule = "rewritten", event.rule.name
            site.new_nodes = [n.name for n, _ in event.new]
            site.op = event.new[0][0].op if event.new else None
            return Found(site, names, (node,), made=[n for n, _ in event.new])
        why = unsuited(node, r.view) if kind == "linear" else "it does not normalize over the last axis with constant weights"
        if why is None:
            return None
        site.status, site.reason = "near_miss", why
        return Found(site, names, (node,))

    def settle(self, outcome: Outcome) -> None:
        """Write into every site what the rules did with it."""
        for event in outcome.events:
            if event.status != "rewritten":
                f = self.by_lifted.get(event.match.root)
                if f is not None and _TELLS_MORE.index(event.status) <= _TELLS_MORE.index(f.site.status):
                    f.site.status, f.site.reason, f.site.rule = event.status, event.why, event.rule.name
                continue
            for node in event.claimed:
                if (f := self.by_lifted.get(node)) is not None:
                    f.site.status, f.site.reason, f.site.rule = "rewritten", event.notes.get(node), event.rule.name
                    f.made = [n for n, at in event.new if at is node]
                    f.site.new_nodes = [n.name for n in f.made]
                    f.site.op = next((n.op for n in f.made if n.domain == DOMAIN), None)
                    if f.site.weight is not None:
                        f.site.weight.bytes_after = _new_bytes(f.made)
        norm_of = {n: i for i, f in enumerate(self.found) if f.site.kind == "norm" for n in f.made}
        for f in self.found:
            if f.site.kind == "linear":
                feeding = (producer(v) for n in f.made for v in n.inputs)
                f.site.fed_by = next((norm_of[p] for p in feeding if p in norm_of), None)
            if f.site.kind == "norm" and f.site.status == "kept" and f.site.reason is None:
                f.site.reason = "no Linear that the spec quantizes with its activations reads it"


def unsuited(node: Node, view: View) -> str | None:
    """Why a MatMul or Gemm that was not lifted is no Linear; None for a product of two activations."""
    left, right = node.inputs[0], node.inputs[1]
    a, b = view.constant(left), view.constant(right)
    if a is not None and b is not None:
        return "both operands are constant"
    if a is not None:
        return f"the constant '{a.origin}' is the left operand"
    if b is not None:
        if len(b.shape) != 2:
            return f"the constant '{b.origin}' has {len(b.shape)} dims, {list(b.shape)}; a Linear's weight has two"
        if node.op == "Gemm" and node.attrs.get("transA"):
            return "transA is set: the rows of the input are its columns"
        return f"the input's last dim does not agree with the weight's {list(b.shape)}"
    shape = right.shape
    if shape is None or len(shape) != 2 or not all(isinstance(d, int) for d in shape):
        return None
    maker = producer(right)
    if maker is None:
        return f"the weight '{right.name}' is a graph input that callers may change"
    return f"the weight is computed by {maker.op} '{maker.name}' while the model runs"


def _gathered(r: Rewriter) -> Iterator[Const]:
    """Constants that a Gather looks rows up in: embeddings."""
    for n in r.position:
        if n.op == "Gather" and not domain_of(n) and (c := r.view.constant(n.inputs[0])) is not None:
            yield c


def _originals(r: Rewriter, node: Node) -> Iterator[Node]:
    """Nodes of the original graph behind a lifted one, the helpers of its constants included."""
    for n in r.stands_for[node]:
        if n.domain == LIFTED:
            yield from _originals(r, n)
        elif n in r.before:
            yield n
    for c in r.consts[node]:
        yield from (n for n in c.via if n in r.before)


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


def _new_bytes(nodes: Sequence[Node]) -> int:
    """Bytes of the constants that were made for a site: packed weight, scales, zero points."""
    new = {id(v): v for n in nodes for v in n.inputs if isinstance(v, Const) and v.proto is None}
    return sum(c.array.nbytes for c in new.values())

