"""Mixture of experts: stacked weights [E, …] of which a Gather takes those that the router chose, before a product.

    chosen = W[ids]                      Gather, axis 0: […, N, K], or […, K, N]
    y = chosen · x, or x · chosenᵀ       MatMul or Einsum, maybe with a Transpose before it

Lifted they are `ir.Experts(x, w, ids)` with w seen as [E, N, K]. Integers and scales are gathered in place of floats
and only what was chosen is dequantized, so the file and the gather's traffic shrink; the product stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpass.graph import Const, Lazy, Node, Value
from qpass.ops.body import FLOATS
from qpass.rewriter import Emit, Pattern, Replacement, attr, cast, const, ir, need, op, rule, val
from qpass.rewriter.pattern import LIFTED
from qpass.rewriter.view import producer
from qpass.rules.quantizer import Quantizer
from qpass.rules.stored import find
from qpass.rules.unlifted import gather_behind
from qpass.rules.weight_only import INT4, INT8


class GatheredProduct(Pattern):
    """A product with chosen rows of a stack of matrices."""

    x: Value = val()
    w: Const = const("E _ _")
    ids: Value = val()
    axis: int | None = attr()
    batch_dims: int | None = attr()
    perm: Sequence[int] | None = attr()
    equation: str | None = attr()
    gathered = op.Gather(w, ids, axis=axis) | op.GatherND(w, ids, batch_dims=batch_dims)
    chosen = cast(gathered)
    operand = op.Transpose(chosen, perm=perm) | chosen
    left = op.MatMul(operand, x) | op.Einsum(operand, x, equation=equation)
    y = left | op.MatMul(x, operand) | op.Einsum(x, operand, equation=equation)


class Experts(Pattern):
    """Lifted experts: a product of x with w[ids], w [E, N, K].

    `product` is the operator, `place` the operand that w[ids] is of it, `rank` that operand's dims, `k_first` whether
    it has K before N; `gather` is the operator that takes w[ids].
    """

    x: Value = val()
    w: Const = const("E N K")
    ids: Value = val()
    product: str = attr()
    place: int = attr()
    rank: int = attr()
    k_first: int = attr()
    equation: str = attr()
    gather: str = attr()
    y = ir.Experts(
        x, w, ids, product=product, place=place, rank=rank, k_first=k_first, equation=equation, gather=gather
    )


@rule
def lift_experts(m: GatheredProduct, new: Emit, cfg: object) -> Replacement:
    """MatMul or Einsum of activations with the experts' weights that a Gather takes out of a stack."""
    place = next(i for i, v in enumerate(m.root.inputs) if _leads_to(v, m.nodes))
    need(not _is_gathered(m.root.inputs[1 - place]), "both operands are gathered: neither is an activation")
    nd = m.axis is None
    need(nd or m.axis in (0, -3), f"the Gather is along axis {m.axis}: it takes parts of every expert, not experts")
    need(not m.batch_dims, "the GatherND has batch dims")
    shape = m.ids.shape
    if nd:
        need(shape is not None and shape[-1] == 1, "the GatherND takes rows or elements, not experts")
    known = None if shape is None else len(shape) + (1 if nd else 2)
    transposed = any(n.op == "Transpose" for n in m.nodes)
    rank = len(m.perm) if m.perm is not None else known
    need(rank is not None, "the rank of the indices is not known")
    assert rank is not None
    if transposed:
        perm = list(m.perm) if m.perm is not None else list(range(rank))[::-1]
        lead = list(range(rank - 2))
        need(perm == [*lead, rank - 1, rank - 2], f"the Transpose moves more than the last two dims: {perm}")
    k_first = place == 1 if m.equation is None else _k_first(m.equation, place, rank)
    w = m.w if k_first == transposed else _turned(m.w)
    k, known_k = w.shape[2], _contracted(m.x, place) if m.equation is None else None
    need(not isinstance(known_k, int) or known_k == k, f"the experts have K={k}, the input K={known_k}")
    return new.lifted(
        "Experts",
        m.x,
        w,
        m.ids,
        like=m.y,
        product=m.root.op,
        place=place,
        rank=rank,
        k_first=int(k_first),
        equation=m.equation or "",
        gather="GatherND" if nd else "Gather",
    )


@rule
def quantize_experts(m: Experts, new: Emit, cfg: Quantizer) -> Replacement:
    """Stacked experts: integers and scales are gathered, then DequantizeWeight gives the chosen weights."""
    spec = cfg.spec(m)
    need((why := _unfit(m)) is None, why or "")
    need(find(m.w.array) is None, f"'{m.w.origin}' came quantized, and qpass keeps no integers of experts yet")
    reader = _other_reader(m.w)
    need(reader is None, f"'{m.w.origin}' is also read by {reader}, which needs it as it is")
    k = m.w.shape[2]
    if spec.mode.is_int4_weight_only():
        need(k % 2 == 0, f"K={k} is odd: int4 packs two weights of a row into a byte")
    group = spec.group_size if spec.mode.has_per_group_scaling() else 0
    need(not group or k % group == 0, f"K={k} is not a multiple of the group size {group}")
    new.note(cfg.note(m))
    q = cfg.experts(m.w, spec)
    ids = None if m.ids.shape is None else m.ids.shape[: -1 if m.gather == "GatherND" else None]

    def chosen(array: Lazy | None, what: str) -> Value | None:
        if array is None:
            return None
        stack = new.constant(array, f"{new.label(m.root)}.{what}")
        shape = None if ids is None else (*ids, *stack.shape[1:])
        settings: dict[str, Any] = {"axis": 0} if m.gather == "Gather" else {}
        return new.onnx(m.gather, stack, m.ids, dtype=stack.dtype, shape=shape, **settings)

    w: Value = new.DequantizeWeight(
        chosen(q.weight, "weight"),
        chosen(q.scale, "scale"),
        chosen(q.zero, "zero"),
        output_type=cfg.onnx_dtype(m.x),
        weight_type_id=INT8 if spec.mode.is_int8_weight_only() else INT4,
        group_size=group,
    )
    if m.k_first:
        perm = [*range(m.rank - 2), m.rank - 1, m.rank - 2]
        turned = None if w.shape is None else [w.shape[i] for i in perm]
        w = new.onnx("Transpose", w, dtype=w.dtype, shape=turned, perm=perm)
    operands = (w, m.x) if m.place == 0 else (m.x, w)
    return new.onnx(m.product, *operands, like=m.y, **({"equation": m.equation} if m.equation else {}))


def _unfit(m: Experts) -> str | None:
    for what, dtype in (("weight", m.w.dtype), ("input", m.x.dtype), ("result", m.y.dtype)):
        if dtype not in FLOATS:
            return f"its {what} is {dtype or 'of unknown dtype'}, wants float32, float16 or bfloat16"
    return None


def _other_reader(w: Const) -> str | None:
    """What else reads the stack, besides experts and Linears."""
    for tensor in (w.root, *(out for n in w.via for out in n.outputs)):
        for user in tensor.uses:
            if user.domain != LIFTED and user not in w.via:
                return f"{user.op} '{user.name or user.outputs[0].name}'"
    return None


def _turned(w: Const) -> Const:
    """Every matrix of a stack seen the other way round, as through a Transpose node."""
    step = Node("Transpose", attrs={"perm": [0, 2, 1]})
    return Const(w.name, w.array.transpose(0, 2, 1), root=w.root, via=(*w.via, step))


def _is_gathered(v: Value) -> bool:
    gather = gather_behind(v)
    return gather is not None and (isinstance(gather.inputs[0], Const) or producer(gather.inputs[0]) is None)


def _leads_to(v: Value, nodes: Sequence[Node]) -> bool:
    """Whether an operand is the matched one: the Gather behind it is of the match."""
    gather = gather_behind(v)
    return gather is not None and gather in nodes


def _contracted(x: Value, place: int) -> object:
    """The dim of x that a MatMul sums over."""
    if not x.shape:
        return None
    return x.shape[-1] if place == 1 or len(x.shape) == 1 else x.shape[-2]


def _k_first(equation: str, place: int, rank: int) -> bool:
    """Whether an Einsum's gathered operand has K, which is summed over, before N, which it gives."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    need(arrow and len(terms) == 2 and "." not in equation, f"the Einsum '{equation}' is not of two named operands")
    w, x = terms[place], terms[1 - place]
    need(len(w) == rank and len(set(w)) == rank, f"'{w}' of the Einsum '{equation}' does not name {rank} dims")

    def is_k(dim: str) -> bool:
        return dim in x and dim not in out

    def is_n(dim: str) -> bool:
        return dim not in x and dim in out

    a, b = w[-2], w[-1]
    plain = (is_k(a) and is_n(b)) or (is_n(a) and is_k(b))
    need(plain, f"the Einsum '{equation}' does not sum over one of the experts' dims and give the other")
    return is_k(a)


LIFT_EXPERTS = (lift_experts,)
EXPERTS = (quantize_experts,)
