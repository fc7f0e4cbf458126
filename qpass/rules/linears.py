"""Lifting Linears: every spelling of x·W (+ b) becomes one `ir.Linear(x, w[, b])` with w seen as [K, N]."""

from __future__ import annotations

from qpass.graph import Const, Value
from qpass.rewriter import Emit, Pattern, attr, const, derived, ir, need, op, rule, val
from qpass.rewriter.rule import Replacement


class Linear(Pattern):
    """A lifted Linear: y [..., N] = x [..., K] · w [K, N] + b [N]."""

    x: Value = val("... K")
    w: Const = const("K N")
    b: Const | None = const("N")
    y = ir.Linear(x, w, b) | ir.Linear(x, w)


class MatMulLinear(Pattern):
    x: Value = val("... K")
    w: Const = const("K N")
    b: Const | None = const("N")
    mm = op.MatMul(x, w)
    y = mm + b | mm


class GemmLinear(Pattern):
    x: Value = val("M K")
    w: Const = const("_ _")
    b: Const | None = const("_")
    alpha: float = attr()
    beta: float = attr()
    transposed: int = attr()
    y = op.Gemm(x, w, b, alpha=alpha, beta=beta, transA=0, transB=transposed) | op.Gemm(
        x, w, alpha=alpha, beta=beta, transA=0, transB=transposed
    )


class FlatLinear(Pattern):
    """[B, S, K] → [B·S, K] → Linear → [B, S, N], as Conv1D layers are exported."""

    x: Value = val("... K")
    to_flat: Value = val()
    to_full: Value = val()
    w: Const = const("K N")
    b: Const | None = const("N")
    flat = op.Reshape(x, to_flat)
    inner = ir.Linear(flat, w, b) | ir.Linear(flat, w)
    y = op.Reshape(inner, to_full)


@rule
def lift_matmul(m: MatMulLinear, new: Emit, cfg: object) -> Replacement:
    """MatMul with a constant right operand, and the Add of a bias in either order."""
    for c in (m.w, m.b):  # a constant of higher rank than x would add dims to the result
        need(c is None or m.x.shape is None or len(c.shape) <= len(m.x.shape), "the constant has more dims than the input")
    return new.lifted("Linear", m.x, m.w, m.b, like=m.y)


@rule
def lift_gemm(m: GemmLinear, new: Emit, cfg: object) -> Replacement:
    """Gemm with a constant second operand, either transB; alpha and beta fold into weight and bias."""
    w = m.w.array.T if m.transposed else m.w.array
    k = m.x.shape[-1] if m.x.shape is not None else None
    need(not isinstance(k, int) or k == w.shape[0], f"the weight has K={w.shape[0]}, the input K={k}")
    b = m.b
    if b is not None and b.shape != (w.shape[1],):
        need(b.array.size == 1, f"the bias has shape {list(b.shape)}, wants [{w.shape[1]}]")
        b = derived(b, b.array.reshape(1) + _zeros(w.shape[1], b))
    if m.alpha != 1:
        w = w * m.alpha
    if b is not None and m.beta != 1:
        b = derived(b, b.array * m.beta)
    return new.lifted("Linear", m.x, m.w if w is m.w.array else derived(m.w, w), b, like=m.y)


@rule
def lift_flat(m: FlatLinear, new: Emit, cfg: object) -> Replacement:
    """A Linear between Reshapes that fold and unfold the leading dims."""
    need(_unfolds(m.x, m.y), "the Reshape behind the Linear is not known to bring the leading dims back")
    return new.lifted("Linear", m.x, m.w, m.b, like=m.y)


def _zeros(n: int, like: Const) -> object:
    import numpy as np

    return np.zeros(n, like.dtype)


def _unfolds(x: Value, y: Value) -> bool:
    """Whether y's leading dims are x's: all known equal but at most one, which the element count then settles."""
    if x.shape is None or y.shape is None or len(x.shape) != len(y.shape):
        return False
    unproven = sum(a is None or a != b for a, b in zip(x.shape[:-1], y.shape[:-1], strict=True))
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(x.shape[:-1], y.shape[:-1], strict=True))
    return unproven <= 1 and not clash


LIFT_LINEARS = (lift_matmul, lift_gemm)
LIFT_VIEWS = (lift_flat,)
