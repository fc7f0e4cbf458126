"""Lifting norms: every spelling of LayerNorm and RMSNorm becomes one `ir.Norm(x, gamma[, beta], kind=, epsilon=)`."""

from __future__ import annotations

from typing import Any

import numpy as np

from qpass.graph import Const, Given, Value
from qpass.ops.body import FLOATS
from qpass.rewriter import LAST, Domain, Emit, Pattern, Replacement, attr, const, derived, need, op, rule, scalar, val


def mean(v: Any, count: Any) -> Any:
    """mean(v) over the last axis; `count` captures the K that JAX's exporters divide a sum by."""
    return op.ReduceMean(v, axes=LAST, keepdims=1) | op.ReduceSum(v, axes=LAST, keepdims=1) / count


def mean_square(v: Any, count: Any) -> Any:
    """mean(v²) over the last axis."""
    return mean(v * v | v**2, count) | op.ReduceSumSquare(v, axes=LAST, keepdims=1) / count


def scaled_over_root(v: Any, variance: Any, gamma: Any) -> Any:
    """v / sqrt(variance) · gamma as exporters write it, or without the gamma."""
    deviation = op.Sqrt(variance) | variance**0.5
    inverse = op.Reciprocal(deviation) | 1 / deviation | variance**-0.5
    n = v / deviation | v * inverse
    weighted = v * gamma
    return n * gamma | v * (inverse * gamma) | weighted * inverse | weighted / deviation | n


def plus_one(w: Any, one: Any) -> Any:
    """The weight, or 1 + w as Gemma has it."""
    return w + one | w


class LayerNormNode(Pattern, free_casts=True):
    x: Value = val("... K")
    w: Const = const("K")
    one: float | None = scalar(1, 1)
    beta: Const | None = const("K")
    eps: float = attr()
    gamma = plus_one(w, one)
    y = op.LayerNormalization(x, gamma, beta, axis=LAST, epsilon=eps) | op.LayerNormalization(
        x, gamma, axis=LAST, epsilon=eps
    )


class RMSNormNode(Pattern, free_casts=True):
    x: Value = val("... K")
    w: Const = const("K")
    one: float | None = scalar(1, 1)
    eps: float = attr()
    gamma = plus_one(w, one)
    y = op.RMSNormalization(x, gamma, axis=LAST, epsilon=eps) | Domain("").SimplifiedLayerNormalization(
        x, gamma, axis=LAST, epsilon=eps
    )


class LayerNormSpelt(Pattern, free_casts=True):
    x: Value = val("... K")
    w: Const | None = const("K")
    one: float | None = scalar(1, 1)
    beta: Const | None = const("K")
    eps: float = scalar(0, 1e-1)
    count: float | None = scalar(1)
    mu = mean(x, count)
    d = x - mu
    spread = mean_square(x, count) - mu * mu  # E[x²] − E[x]², as Flax has it
    variance = (mean_square(d, count) | spread | op.Max(spread, 0)) + eps
    n = scaled_over_root(d, variance, plus_one(w, one))
    y = n + beta | n


class LayerNormFolded(Pattern, free_casts=True):
    """x · s + (β − μ · s) with s = γ / sqrt(variance), as TensorFlow's batch_normalization has it."""

    x: Value = val("... K")
    w: Const | None = const("K")
    one: float | None = scalar(1, 1)
    beta: Const | None = const("K")
    eps: float = scalar(0, 1e-1)
    mu = op.ReduceMean(x, axes=LAST, keepdims=1)
    d = x - mu
    root = op.Sqrt(op.ReduceMean(d * d | d**2, axes=LAST, keepdims=1) + eps)
    inverse = op.Reciprocal(root) | 1 / root
    s = inverse * plus_one(w, one) | inverse
    y = x * s + (beta - mu * s)


class RMSNormSpelt(Pattern, free_casts=True):
    x: Value = val("... K")
    w: Const | None = const("K")
    one: float | None = scalar(1, 1)
    eps: float = scalar(0, 1e-1)
    count: float | None = scalar(1)
    y = scaled_over_root(x, mean_square(x, count) + eps, plus_one(w, one))


@rule
def lift_layer_norm(m: LayerNormNode, new: Emit, cfg: object) -> Replacement:
    """LayerNormalization nodes over the last axis."""
    return _lifted(new, m, "layernorm", m.x, m.w, m.one, m.beta, m.eps)


@rule
def lift_rms_norm(m: RMSNormNode, new: Emit, cfg: object) -> Replacement:
    """RMSNormalization nodes (opset 23), and ONNX Runtime's SimplifiedLayerNormalization, over the last axis."""
    return _lifted(new, m, "rmsnorm", m.x, m.w, m.one, None, m.eps)


@rule
def lift_spelt_layer_norm(m: LayerNormSpelt, new: Emit, cfg: object) -> Replacement:
    """LayerNorm written out as mean, difference, variance, root, with or without weight and bias."""
    _need_count(m.count, m.x, m.w or m.beta)
    return _lifted(new, m, "layernorm", m.x, m.w, m.one, m.beta, m.eps)


@rule
def lift_folded_layer_norm(m: LayerNormFolded, new: Emit, cfg: object) -> Replacement:
    """LayerNorm written out with the mean folded into the bias."""
    return _lifted(new, m, "layernorm", m.x, m.w, m.one, m.beta, m.eps)


@rule
def lift_spelt_rms_norm(m: RMSNormSpelt, new: Emit, cfg: object) -> Replacement:
    """RMSNorm written out as mean square, root, scale; the scale w, 1 + w or none."""
    _need_count(m.count, m.x, m.w)
    return _lifted(new, m, "rmsnorm", m.x, m.w, m.one, None, m.eps)


def _lifted(
    new: Emit,
    m: Pattern,
    kind: str,
    x: Value,
    w: Const | None,
    one: float | None,
    beta: Const | None,
    epsilon: float,
) -> Value:
    """The norm, its x in the dtype of its result where a Cast between them allows that."""
    k = _width(x, w or beta)
    need(k is not None, "the width of the norm is not known: its input's last dim is not, and it has no weight")
    if w is None:
        gamma = new.constant(Given(np.ones(k or 0, np.float32)), f"{new.label(m.root)}.gamma")
    else:
        gamma = w if one is None else derived(w, w.array.astype(np.float32) + one)
    return new.lifted("Norm", in_dtype(x, m.y), gamma, beta, like=m.y, kind=kind, epsilon=epsilon)


def _width(x: Value, c: Const | None) -> int | None:
    """The size of the last axis. A constant of one element may be broadcast: it does not tell."""
    known = x.shape[-1] if x.shape else None
    if isinstance(known, int):
        return known
    return c.shape[-1] if c is not None and c.shape[-1] != 1 else None


def _need_count(count: float | None, x: Value, c: Const | None) -> None:
    if count is not None:
        k = _width(x, c)
        need(count == k, f"the sum is divided by {count:g}, a mean over the last axis by {k}")


def in_dtype(x: Value, y: Value) -> Value:
    """`x`, or what it is cast from where that has y's dtype: exporters compute norms of float16 in float32."""
    v: Value | None = x
    while v is not None and v.dtype in FLOATS and v.dtype != y.dtype:
        maker = v.producer
        v = maker.inputs[0] if maker is not None and maker.op in ("Cast", "Identity") else None
    return v if v is not None and v.dtype in FLOATS else x


SPELT_NORMS = (lift_spelt_layer_norm, lift_folded_layer_norm, lift_spelt_rms_norm)
"""The rules over norms that are written out."""

LIFT_NORMS = (lift_layer_norm, lift_rms_norm, *SPELT_NORMS)
