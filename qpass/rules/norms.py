"""Lifting norms: every spelling of LayerNorm and RMSNorm becomes one `ir.Norm(x, gamma[, beta], kind=, epsilon=)`."""

from __future__ import annotations

from typing import Any

from qpass.graph import Const, Given, Value
from qpass.rewriter import LAST, Emit, Pattern, attr, cast, const, derived, need, op, rule, scalar, val
from qpass.rewriter.rule import Replacement


def mean_square(v: Any) -> Any:
    """mean(v²) over the last axis."""
    return op.ReduceMean(v * v | v**2, axes=LAST, keepdims=1)


def over_root(v: Any, variance: Any) -> Any:
    """v / sqrt(variance) as exporters write it."""
    deviation = op.Sqrt(variance)
    return v / deviation | v * (op.Reciprocal(deviation) | 1 / deviation | variance**-0.5)


class LayerNormNode(Pattern):
    x: Value = val("... K")
    gamma: Const = const("K")
    beta: Const | None = const("K")
    eps: float = attr()
    y = op.LayerNormalization(x, gamma, beta, axis=LAST, epsilon=eps) | op.LayerNormalization(
        x, gamma, axis=LAST, epsilon=eps
    )


class RMSNormNode(Pattern):
    x: Value = val("... K")
    gamma: Const = const("K")
    eps: float = attr()
    y = op.RMSNormalization(x, gamma, axis=LAST, epsilon=eps)


class LayerNormSpelt(Pattern):
    x: Value = val("... K")
    gamma: Const | None = const("K")
    beta: Const | None = const("K")
    eps: float = scalar(0, 1e-1)
    xf = cast(x)
    d = xf - op.ReduceMean(xf, axes=LAST, keepdims=1)
    n = cast(over_root(d, mean_square(d) + eps))
    scaled = n * cast(gamma) | n
    y = cast(cast(scaled) + cast(beta)) | cast(n * cast(gamma))


class RMSNormSpelt(Pattern):
    x: Value = val("... K")
    w: Const = const("K")
    one: float | None = scalar(1, 1)
    eps: float = scalar(0, 1e-1)
    xf = cast(x)
    n = cast(over_root(xf, mean_square(xf) + eps))
    g = cast(w)
    y = cast(n * (g | g + one))


@rule
def lift_layer_norm(m: LayerNormNode, new: Emit, cfg: object) -> Replacement:
    """LayerNormalization nodes over the last axis."""
    return new.lifted("Norm", m.x, m.gamma, m.beta, like=m.y, kind="layernorm", epsilon=m.eps)


@rule
def lift_rms_norm(m: RMSNormNode, new: Emit, cfg: object) -> Replacement:
    """RMSNormalization nodes (opset 23) over the last axis."""
    return new.lifted("Norm", m.x, m.gamma, like=m.y, kind="rmsnorm", epsilon=m.eps)


@rule
def lift_spelt_layer_norm(m: LayerNormSpelt, new: Emit, cfg: object) -> Replacement:
    """LayerNorm written out as mean, difference, variance, root."""
    gamma = m.gamma if m.gamma is not None else _ones(m.beta)
    return new.lifted("Norm", m.x, gamma, m.beta, like=m.y, kind="layernorm", epsilon=m.eps)


@rule
def lift_spelt_rms_norm(m: RMSNormSpelt, new: Emit, cfg: object) -> Replacement:
    """RMSNorm written out as mean square, root, scale; the scale w or 1 + w."""
    gamma = m.w if m.one is None else derived(m.w, m.w.array.astype("float32") + m.one)
    return new.lifted("Norm", m.x, gamma, like=m.y, kind="rmsnorm", epsilon=m.eps)


def _ones(like: Const | None) -> Const:
    need(like is not None, "a norm without weight and bias has no known width")
    assert like is not None
    import numpy as np

    return Const(f"{like.name}.ones", Given(np.ones(like.shape, like.dtype)))


LIFT_NORMS = (lift_layer_norm, lift_rms_norm, lift_spelt_layer_norm, lift_spelt_rms_norm)
