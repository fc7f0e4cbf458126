"""What no lifting rule took: MatMuls and norms that are none of qpass's Linears and norms, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qpass.graph import Const, Node, Value
from qpass.ops import DOMAIN
from qpass.ops.body import FLOATS
from qpass.rewriter import Kind, Miss, Outcome, Rewriter
from qpass.rewriter.edit import first_output
from qpass.rewriter.view import KEEPS_LAST, View, domain_of, producer
from qpass.rules.norms import SPELT_NORMS

WEIGHTED = frozenset({"MatMul", "Gemm"})
NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
FUSED = {
    "FusedMatMul": "linear",
    "FusedGemm": "linear",
    "GemmFastGelu": "linear",
    "SkipLayerNormalization": "norm",
    "SkipSimplifiedLayerNormalization": "norm",
    "EmbedLayerNormalization": "norm",
}
"""What ONNX Runtime's optimizers merge norms and Linears into, in domain com.microsoft."""


def kind_of(node: Node) -> str | None:
    """ "linear" or "norm" for an operator that may be one, else None."""
    domain = domain_of(node)
    if domain == "com.microsoft":
        return FUSED.get(node.op)
    if domain:
        return None
    return "linear" if node.op in WEIGHTED else "norm" if node.op in NORMS else None


_GATHERS = frozenset({"Gather", "GatherND"})
_MOVES_ALL = KEEPS_LAST | {"Cast", "Identity", "Transpose"}


def gather_behind(v: Value) -> Node | None:
    """The Gather that a value comes from, by nodes that move or cast."""
    node = producer(v)
    while node is not None and node.op in _MOVES_ALL and not domain_of(node):
        node = producer(node.inputs[0])
    return node if node is not None and node.op in _GATHERS and not domain_of(node) else None


def gathered_stack(node: Node, view: View) -> Const | None:
    """The stack of matrices that a Gather chooses an operand of a product from: the product is a site of experts."""
    if node.op not in ("MatMul", "Einsum") or domain_of(node) or len(node.inputs) != 2:
        return None
    for gather in (gather_behind(v) for v in node.inputs if view.constant(v) is None):
        w = view.constant(gather.inputs[0]) if gather is not None else None
        if w is not None and len(w.shape) == 3 and w.dtype in FLOATS:
            return w
    return None


def _odd_way(product: Node, stack: Const) -> str:
    """What of the way from the Gather to a product no pattern has."""
    way: list[str] = []
    node = next(producer(v) for v in product.inputs if gather_behind(v) is not None)
    while node is not None and node.op not in _GATHERS:
        way.append(f"{node.op} '{node.name or first_output(node)}'")
        node = producer(node.inputs[0])
    return f"no pattern takes experts {list(stack.shape)} by way of {', '.join(way[::-1]) or product.op}"


_MEANS, _ROOTS = {"ReduceMean", "ReduceSum", "ReduceSumSquare"}, {"Sqrt", "Pow", "Reciprocal"}


def nearly_norms(misses: Iterable[Miss]) -> list[Miss]:
    """Of all misses those of a norm written out: a root and a mean were in sight, and no mere other op stopped it."""
    names = {r.name for r in SPELT_NORMS}
    return [
        m
        for m in misses
        if m.rule in names
        and m.kind is not Kind.OP
        and not _MEANS.isdisjoint(seen := {*(n.op for n in m.nodes), m.op})
        and not _ROOTS.isdisjoint(seen)
    ]


class Reasons:
    """Why nodes were not lifted.

    Args:
        graphs: of one model, outer ones before inner ones.
        outcome: of the lifting.
    """

    def __init__(self, graphs: Sequence[Rewriter], outcome: Outcome) -> None:
        self._declined = {n: e.why for e in outcome.events if e.status == "declined" for n in e.match.nodes}
        self._nearest: dict[Node, Miss] = {}
        self._experts = {m.root: m for m in outcome.misses if m.rule == "lift_experts"}
        for miss in outcome.misses:
            for n in {miss.root, *miss.nodes}:
                if kind_of(n) is None:
                    continue
                if n not in self._nearest or miss.rank > self._nearest[n].rank:
                    self._nearest[n] = miss
        self._activations = _activations(graphs)

    def of(self, node: Node, view: View) -> tuple[str, str] | None:
        """(status, reason) of an unlifted node; None for a product of two activations, which is no site."""
        if domain_of(node):
            if kind_of(node) == "linear" and not any(view.constant(v) for v in node.inputs if v.name):
                return None
            what = f"{node.domain}.{node.op}"
            return "declined", f"qpass has no rule for {what}; give it the model from before ONNX Runtime's optimizer"
        if node in self._declined:
            return "declined", self._declined[node]
        if (stack := gathered_stack(node, view)) is not None:
            near = self._experts.get(node)
            return "declined", near.why if near is not None else _odd_way(node, stack)
        if node.op in WEIGHTED:
            why = self._no_linear(node, view)
            return None if why is None else ("declined", why)
        miss = self._nearest.get(node)
        return "near_miss", miss.why if miss is not None else f"qpass has no rule for {node.op}"

    def _no_linear(self, node: Node, view: View) -> str | None:
        left, right = node.inputs[0], node.inputs[1]
        a, b = view.constant(left), view.constant(right)
        if b is not None:
            if len(b.shape) < 2 or b.array.size != b.shape[-2] * b.shape[-1]:
                dims = "1 dim" if len(b.shape) == 1 else f"{len(b.shape)} dims"
                if len(b.shape) == 3:
                    what = f"a batch of {b.shape[0]} weights, each for one entry of the input's batch"
                    return f"the constant '{b.origin}' has 3 dims, {list(b.shape)}: {what}; a Linear's weight has two"
                return f"the constant '{b.origin}' has {dims}, {list(b.shape)}; a Linear's weight has two"
            miss = self._nearest.get(node)
            if node.op == "Gemm" and node.attrs.get("transA"):
                return "transA is set: the rows of the input are its columns"
            return miss.why if miss is not None else f"no pattern takes its weight, {list(b.shape)}"
        if a is not None:
            return f"the constant '{a.origin}' is the left operand"
        shape = right.shape
        if shape is None or len(shape) != 2 or not all(isinstance(d, int) for d in shape):
            return None
        maker = producer(right)
        if maker is None:
            return f"the weight '{right.name}' is a graph input that callers may change"
        if right in self._activations or maker.domain == DOMAIN:
            return None
        return f"the weight is computed by {maker.op} '{maker.name or first_output(maker)}' while the model runs"


def _activations(graphs: Iterable[Rewriter]) -> set[Value]:
    """The values that depend on what callers feed. A node with a graph inside counts as one that does."""
    fed: set[Value] = set()
    for r in graphs:
        fed.update(v for v in r.edit.graph.inputs if v.default is None)
        for node in r.edit.graph.nodes:
            inner = any(type(a) is type(r.edit.graph) for a in node.attrs.values())
            if inner or any(v in fed for v in node.inputs):
                fed.update(node.outputs)
    return fed
