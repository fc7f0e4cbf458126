"""SmoothQuant: int8 activations × int8 weights, the quantization of activations merged into the norm before them.

Xiao et al. 2022, "SmoothQuant": activations are divided per channel by a smoother s, weights multiplied by it. Where a
norm feeds the Linears, 1/s folds into the norm's gamma and beta.
"""

from __future__ import annotations

import numpy as np

from qpass.graph import Const, Value
from qpass.rewriter import Emit, Pattern, Replacement, attr, const, ir, keep, others, rule, uses, val
from qpass.rules.linears import Linear
from qpass.rules.quantizer import Activation, Quantizer


class NormFanout(Pattern):
    """A norm and the Linears that read it."""

    x: Value = val("... K")
    gamma: Const = const("K")
    beta: Const | None = const("K")
    kind: str = attr()
    epsilon: float = attr()
    y = ir.Norm(x, gamma, beta, kind=kind, epsilon=epsilon) | ir.Norm(x, gamma, kind=kind, epsilon=epsilon)
    heads: list[Linear] = uses(y)
    rest: bool = others(y)


class InputFanout(Pattern):
    """A Linear, and its siblings on the same input."""

    x: Value = val("... K")
    w: Const = const("K N")
    b: Const | None = const("N")
    y = ir.Linear(x, w, b) | ir.Linear(x, w)
    heads: list[Linear] = uses(x)


@rule
def quantize_norm(m: NormFanout, new: Emit, cfg: Quantizer) -> Replacement:
    """A norm that feeds Linears becomes a quantizing norm with SmoothQuantGemms behind it."""
    heads = cfg.quantized_alike([h for h in m.heads if readable(m.y, h)])
    if not heads:
        keep("no Linear that the spec quantizes with its activations reads it")
    needed = m.rest or len(heads) < len(m.heads)
    act = cfg.activation(m.y, heads)
    wide = act.smoother is not None and needed
    gamma, beta = (m.gamma, m.beta) if wide else (act.folded(m.gamma), act.folded(m.beta))
    inputs = {"gamma": cfg.like(gamma, m.x), "beta": cfg.like(beta, m.x) if beta is not None else None}
    if m.kind == "rmsnorm":
        inputs.pop("beta")
    outputs = ["q", *(["scale"] if act.scale is None else []), *(["y"] if needed else [])]
    norm = new.RmsnormQuantization if m.kind == "rmsnorm" else new.LayernormQuantization
    made = norm(
        m.x, **inputs, smoother=act.smoother if wide else None, scale=act.scale, epsilon=m.epsilon, outputs=" ".join(outputs)
    )
    got = dict(zip(outputs, made if len(outputs) > 1 else (made,), strict=True))
    new.note(act.note)
    replaced = {h.y: gemm(h, new, cfg, act, got["q"], got.get("scale", act.scale)) for h in heads}
    if needed:
        replaced[m.y] = got["y"]
    else:
        new.same_shape(m.y, m.x)
    return replaced


@rule
def quantize_input(m: InputFanout, new: Emit, cfg: Quantizer) -> Replacement:
    """Linears with another input than a norm get one QuantizePerToken or QuantizeTensor, then their SmoothQuantGemms."""
    spec = cfg.spec(m)
    if not spec.mode.has_act_and_weight_quant():
        keep("the spec quantizes its weights alone")
    heads = [h for h in cfg.quantized_alike(m.heads) if h.x is m.x]
    if all(h.root is not m.root for h in heads):  # its siblings' spec is another: it goes alone
        heads = [h for h in m.heads if h.root is m.root]
    act = cfg.activation(m.x, heads)
    if act.scale is None:
        q, scale = new.QuantizePerToken(m.x, smoother=act.smoother)
    else:
        q, scale = new.QuantizeTensor(m.x, smoother=act.smoother, scale=act.scale), act.scale
    return {h.y: gemm(h, new, cfg, act, q, scale) for h in heads}


def gemm(h: Linear, new: Emit, cfg: Quantizer, act: Activation, q: Value, scale: object) -> Value:
    """The SmoothQuantGemm of one Linear, reshaped where the Linear read a flattened view of `q`."""
    at = new.at(h)
    at.note(act.note)
    w = cfg.int8(h.w, act.smoother)
    y: Value = at.SmoothQuantGemm(
        q,
        weight=w.weight,
        scale_a=scale,
        scale_w=w.scale,
        bias=cfg.bias(h),
        output_type=cfg.onnx_dtype(h.y),
        has_per_token_scaling=int(act.scale is None),
    )
    if not same_rank(q, h.x):
        rows_by_columns = np.array([-1, h.w.shape[1]], np.int64)
        return at.onnx("Reshape", y, rows_by_columns, dtype=y.dtype, shape=h.y.shape)
    return y


def same_rank(a: Value, b: Value) -> bool:
    """Whether two values that hold the same rows have the same leading dims too."""
    return a.shape is None or b.shape is None or len(a.shape) == len(b.shape)


def readable(x: Value, h: Linear) -> bool:
    """Whether a Linear can take `x` itself in place of the view of it that it reads: as it is, or flattened to rows."""
    return h.x is x or (h.x.shape is not None and x.shape is not None and (same_rank(x, h.x) or len(h.x.shape) == 2))


SMOOTH_QUANT = (quantize_norm,), (quantize_input,)
