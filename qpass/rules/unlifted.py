"""What no lifting rule took: MatMuls and norms that are none of qpass's Linears and norms, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpass.graph import Const, Node, Value
from qpass.ops import DOMAIN
from qpass.ops.body import FLOATS
from qpass.rewriter import Kind, Miss, Outcome, Rewriter
from qpass.rewriter.contrib import MICROSOFT
from qpass.rewriter.view import KEEPS_LAST, View, domain_of, named, producer
from qpass.rules.norms import SPELT_NORMS

WEIGHTED = frozenset({"MatMul", "Gemm"})
PRODUCTS = WEIGHTED | {"FusedMatMul"}
NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})


@dataclass(frozen=True)
class Fused:
    """An operator of ONNX Runtime's that holds a norm or Linears."""

    kind: str
    weights: tuple[int, ...] = ()
    """The inputs that are a Linear's weights, where they are constants."""
    why: str = ""
    """What keeps qpass from taking it, where no rule is for it."""


_UNFUSED = "give qpass the model from before the optimizer"
_NOT_UNPACKED = f"its Linears are not taken out of it; {_UNFUSED}"
_INTEGERS = "it computes with integers; give qpass the model with Q/DQ nodes, or as MatMulNBits"

FUSED = {
    "FusedMatMul": Fused("linear", (0, 1)),
    "TransposeMatMul": Fused("linear", (0, 1)),
    "FusedMatMulActivation": Fused("linear", (0, 1)),
    "FusedGemm": Fused("linear", (0, 1)),
    "GemmFastGelu": Fused("linear", (0, 1)),
    "Attention": Fused("linear", (1,)),
    "DecoderAttention": Fused("linear", (2, 3), _NOT_UNPACKED),
    "DecoderMaskedSelfAttention": Fused("linear", (1,), _NOT_UNPACKED),
    "LongformerAttention": Fused("linear", (1, 4), _NOT_UNPACKED),
    "PackedAttention": Fused("linear", (1,), _NOT_UNPACKED),
    "MoE": Fused("linear", (2, 4, 6), f"its experts are not taken out of it; {_UNFUSED}"),
    "QMoE": Fused("linear", (2, 5, 8), _INTEGERS),
    "QAttention": Fused("linear", (1,), _INTEGERS),
    "QGemm": Fused("linear", (3,), _INTEGERS),
    "DynamicQuantizeMatMul": Fused("linear", (1,), _INTEGERS),
    "MatMulNBits": Fused("linear", (1,)),
    "MatMulBnb4": Fused("linear", (1,), _INTEGERS),
    "MatMulFpQ4": Fused("linear", (1,), _INTEGERS),
    "MatMulIntegerToFloat": Fused("linear", (1,), _INTEGERS),
    "SkipLayerNormalization": Fused("norm"),
    "SkipSimplifiedLayerNormalization": Fused("norm"),
    "EmbedLayerNormalization": Fused("norm"),
    "QEmbedLayerNormalization": Fused("norm", (), f"its embeddings are quantized already; {_UNFUSED}"),
}
"""What ONNX Runtime's optimizers and quantizers make of norms and Linears, in domain com.microsoft."""

INTEGER = {
    "MatMulInteger": Fused("linear", (1,), _INTEGERS),
    "QLinearMatMul": Fused("linear", (3,), _INTEGERS),
}
"""Operators over integers in the standard domain."""


def kind_of(node: Node) -> str | None:
    """ "linear" or "norm" for an operator that may be one, else None."""
    domain = domain_of(node)
    if (known := _fused(node)) is not None:
        return known.kind
    if domain:
        return None
    return "linear" if node.op in WEIGHTED else "norm" if node.op in NORMS else None


def _fused(node: Node) -> Fused | None:
    return {MICROSOFT: FUSED, "": INTEGER}.get(domain_of(node), {}).get(node.op)


def weights(node: Node, view: View) -> list[Const]:
    """The constants that may be a Linear's weight."""
    known = _fused(node)
    at = (0, 1) if known is None else known.weights
    values = [node.inputs[i] for i in at if i < len(node.inputs) and node.inputs[i].name]
    return [c for v in values if (c := view.constant(v)) is not None]


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
        way.append(named(node))
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
        self._spelt = {n: [new for new, _ in e.new] for e in outcome.events if e.respelt for n in e.claimed}

    def of(self, node: Node, view: View) -> tuple[str, str] | None:
        """(status, reason) of an unlifted node; None for a product of two activations, which is no site."""
        if node in self._declined:
            return "declined", self._declined[node]
        if node in self._spelt:  # what became of the nodes that say the same
            alike = [n for n in self._spelt[node] if kind_of(n) == kind_of(node)]
            return next((found for n in alike if (found := self.of(n, view)) is not None), None)
        if (stack := gathered_stack(node, view)) is not None:
            near = self._experts.get(node)
            return "declined", near.why if near is not None else _odd_way(node, stack)
        known = _fused(node)
        if known is not None and known.kind == "linear" and not weights(node, view):
            return None
        if known is not None and known.why:
            return "declined", f"no rule for {node.op}: {known.why}"
        if node.op in PRODUCTS:
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
            if node.attrs.get("transA"):
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
        return f"the weight is computed by {named(maker)} while the model runs"


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
