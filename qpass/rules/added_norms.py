"""Norms with the Add before them, and the plugins that they become where nothing is quantized behind them.

TensorRT 8.6 spells a norm out, an RMSNorm as five kernels and the residual's Add as a sixth; at few tokens that is as
long as the integer products beside it. TensorRT-LLM 0.5 has its Layernorm and Rmsnorm plugins for the same reason.
"""

from __future__ import annotations

from qpass.graph import Const, Value
from qpass.graph.dtypes import to_onnx
from qpass.ops.body import FLOATS
from qpass.rewriter import Emit, Pattern, Replacement, attr, const, ir, need, others, rule, val
from qpass.rewriter.view import width
from qpass.rules.quantizer import Quantizer


class AddedNorm(Pattern):
    """A norm, maybe of a sum."""

    x: Value = val()
    residual: Value | None = val()
    gamma: Const = const("K")
    beta: Const | None = const("K")
    kind: str = attr()
    epsilon: float = attr()
    added: Value | None = x + residual
    total = added | x
    y = ir.Norm(total, gamma, beta, kind=kind, epsilon=epsilon) | ir.Norm(total, gamma, kind=kind, epsilon=epsilon)
    added_needed: bool = others(added)


@rule
def plug_norm(m: AddedNorm, new: Emit, cfg: Quantizer) -> Replacement:
    """A norm whose result stays in floats becomes a Layernorm or Rmsnorm plugin; an Add before it is part."""
    cfg.check_norm(m.root)
    x, residual = operands(m)
    gamma, beta = cfg.like(m.gamma, x), cfg.like(m.beta, x)
    summed = residual is not None and m.added_needed
    outputs = "y sum" if summed else "y"
    if m.kind == "rmsnorm":
        made = new.Rmsnorm(x, residual=residual, gamma=gamma, epsilon=m.epsilon, outputs=outputs)
    else:
        made = new.Layernorm(x, residual=residual, gamma=gamma, beta=beta, epsilon=m.epsilon, outputs=outputs)
    if not summed or m.added is None:
        return {m.y: in_dtype_of(m.y, made, new)}
    return {m.y: in_dtype_of(m.y, made[0], new), m.added: made[1]}


def operands(m: AddedNorm) -> tuple[Value, Value | None]:
    """What a norm op reads: x and a residual, where the sum can be taken in; else the sum, or x, alone.

    Raises:
        Decline: its dtype is none that norm ops have.
    """
    need(m.total.dtype in FLOATS, f"its input is {m.total.dtype}, wants float32, float16 or bfloat16")
    return (m.x, m.residual) if _adds_rows(m) else (m.total, None)


def _adds_rows(m: AddedNorm) -> bool:
    """Whether the sum before a norm is of two whole rows, in the dtype that the norm reads."""
    if m.residual is None:
        return False
    k = m.gamma.shape[0]
    return all(v.dtype == m.total.dtype and width(v) == k for v in (m.x, m.residual))


def in_dtype_of(old: Value, y: Value, new: Emit) -> Value:
    """`y` in the dtype of the value that it replaces: a norm or an activation may have had a Cast in it."""
    if old.dtype is None or old.dtype == y.dtype:
        return y
    return new.onnx("Cast", y, dtype=old.dtype, shape=y.shape, to=to_onnx(old.dtype))


NORM_PLUGINS = (plug_norm,)
