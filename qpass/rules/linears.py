"""Lifting Linears: every spelling of x·W (+ b) becomes one `ir.Linear(x, w[, b])` with w seen as [K, N]."""

from __future__ import annotations

import numpy as np

from qpass.graph import Const, Value
from qpass.ops.body import FLOATS
from qpass.rewriter import Emit, Pattern, Replacement, attr, const, derived, ir, ms, need, op, rule, transposed, val


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
    c: Const | None = const()
    alpha: float = attr()
    beta: float = attr()
    transposed: int = attr()
    y = op.Gemm(x, w, c, alpha=alpha, beta=beta, transA=0, transB=transposed) | op.Gemm(
        x, w, alpha=alpha, beta=beta, transA=0, transB=transposed
    )


class FusedMatMulLinear(Pattern):
    """ONNX Runtime's MatMul with a factor and a transposition in it."""

    x: Value = val("... K")
    w: Const | None = const("K N")
    turned: Const | None = const("N K")
    b: Const | None = const("N")
    alpha: float = attr()
    mm = ms.FusedMatMul(x, w, alpha=alpha) | ms.FusedMatMul(x, turned, alpha=alpha, transB=1)
    y = mm + b | mm


class FlatLinear(Pattern):
    """[B, S, K] → [B·S, K] → Linear → [B, S, N], as Conv1D layers are exported."""

    x: Value = val("... K")
    to_flat: Value = val()
    to_full: Value = val()
    w: Const = const("K N")
    b: Const | None = const("N")
    flat = op.Reshape(x, to_flat, allowzero=attr())
    inner = ir.Linear(flat, w, b) | ir.Linear(flat, w)
    y = op.Reshape(inner, to_full, allowzero=attr())


@rule
def lift_matmul(m: MatMulLinear, new: Emit, cfg: object) -> Replacement:
    """MatMul with a constant right operand, and the Add of a bias in either order."""
    need(
        m.w.shape[0] != 1 or len(m.w.root.shape or ()) == 2,
        f"'{m.w.origin}' is a vector: this is an outer product, such as of positions and frequencies",
    )
    return new.lifted("Linear", m.x, m.w, m.b, like=m.y)


@rule
def lift_gemm(m: GemmLinear, new: Emit, cfg: object) -> Replacement:
    """Gemm with a constant second operand, either transB; alpha and beta fold into weight and bias."""
    w = _scaled(transposed(m.w) if m.transposed else m.w, m.x, m.alpha)
    return new.lifted("Linear", m.x, w, _bias(m.c, w.shape[1], m.beta), like=m.y)


@rule
def lift_fused_matmul(m: FusedMatMulLinear, new: Emit, cfg: object) -> Replacement:
    """com.microsoft.FusedMatMul with a constant second operand, either transB; alpha folds into the weight."""
    w = m.w if m.turned is None else transposed(m.turned)
    assert w is not None
    return new.lifted("Linear", m.x, _scaled(w, m.x, m.alpha), m.b, like=m.y)


@rule
def lift_flat(m: FlatLinear, new: Emit, cfg: object) -> Replacement:
    """A Linear between Reshapes that fold and unfold the leading dims."""
    need(_unfolds(m.x, m.y, m.w.shape[1]), "the Reshape behind the Linear is not known to undo the one before it")
    return new.lifted("Linear", m.x, m.w, m.b, like=m.y)


def unfit(m: Linear) -> str | None:
    """Why no op of qpass takes a Linear: its dtypes."""
    for what, dtype in (("weight", m.w.dtype), ("input", m.x.dtype), ("result", m.y.dtype)):
        if dtype not in FLOATS:
            return f"its {what} is {dtype or 'of unknown dtype'}, wants float32, float16 or bfloat16"
    return None


def _scaled(w: Const, x: Value, alpha: float) -> Const:
    """The weight [K, N] times alpha; declines where the input's K is another."""
    k, known = w.shape[0], x.shape[-1] if x.shape is not None else None
    need(not isinstance(known, int) or known == k, f"the weight has K={k}, the input K={known}")
    return w if alpha == 1 else derived(w, w.array.astype(np.float32) * alpha)


def _bias(c: Const | None, n: int, beta: float) -> Const | None:
    """Gemm's third input as a bias [N]; it broadcasts to [M, N]."""
    if c is None or beta == 0:
        return None
    rows = c.shape[0] if len(c.shape) == 2 else 1
    need(rows == 1, f"the third input differs from row to row: its shape is {list(c.shape)}, a bias has [{n}]")
    need(c.array.size in (1, n), f"the third input has shape {list(c.shape)}, a bias has [{n}]")
    if c.shape != (n,):
        c = derived(c, c.array.reshape(-1) + np.zeros(n, c.dtype))
    return c if beta == 1 else derived(c, c.array.astype(np.float32) * beta)


def _unfolds(x: Value, y: Value, n: int) -> bool:
    """Whether y [..., N] has x's leading dims: all known equal, or all but one, which the element count settles."""
    if x.shape is None or y.shape is None or len(x.shape) != len(y.shape) or y.shape[-1] != n:
        return False
    dims = list(zip(x.shape[:-1], y.shape[:-1], strict=True))
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in dims)
    unproven = sum(a is None or a != b for a, b in dims)
    return not clash and unproven <= isinstance(x.shape[-1], int)


LIFT_LINEARS = (lift_matmul, lift_gemm, lift_fused_matmul)
LIFT_VIEWS = (lift_flat,)
