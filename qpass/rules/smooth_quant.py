"""SmoothQuant: int8 activations × int8 weights, the quantization of activations merged into the norm before them.

Xiao et al. 2022, "SmoothQuant": activations are divided per channel by a smoother s, weights multiplied by it. Where a
norm feeds the Linears, 1/s folds into the norm's gamma and beta.
"""

from __future__ import annotations

import numpy as np

from qpass.graph import Const, Value
from qpass.graph.dtypes import to_onnx
from qpass.ops.body import FLOATS
from qpass.rewriter import Emit, Pattern, Replacement, attr, const, ir, keep, need, others, rule, uses, val
from qpass.rewriter.view import KEEPS_LAST
from qpass.rules.linears import Linear, unfit
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


class InputFanout(Linear):
    """A Linear, and its siblings on the same input."""

    heads: list[Linear] = uses(Linear.x)


@rule
def quantize_norm(m: NormFanout, new: Emit, cfg: Quantizer) -> Replacement:
    """A norm that feeds Linears becomes a quantizing norm with SmoothQuantGemms behind it."""
    heads = cfg.quantized_alike([h for h in m.heads if readable(m.y, h) and unfit(h) is None])
    if not heads:
        keep("no Linear that the spec quantizes with its activations reads it")
    need(m.x.dtype in FLOATS, f"its input is {m.x.dtype}, wants float32, float16 or bfloat16")
    needed = m.rest or len(heads) < len(m.heads)
    act = cfg.activation(m.y, heads)
    wide = act.smoother is not None and needed
    gamma, beta = (m.gamma, m.beta) if wide else (act.folded(m.gamma), act.folded(m.beta))
    inputs = {"gamma": cfg.like(gamma, m.x), "beta": cfg.like(beta, m.x)}
    norm = new.LayernormQuantization
    if m.kind == "rmsnorm":
        norm = new.RmsnormQuantization
        inputs.pop("beta")
    outputs = ["q", *(["scale"] if act.scale is None else []), *(["y"] if needed else [])]
    made = norm(
        m.x,
        **inputs,
        smoother=act.smoother if wide else None,
        scale=act.scale,
        zero=act.zero,
        epsilon=m.epsilon,
        outputs=" ".join(outputs),
    )
    got = dict(zip(outputs, made if len(outputs) > 1 else (made,), strict=True))
    new.note(act.note)
    replaced = {h.y: gemm(h, m.y, new, cfg, act, got["q"], got.get("scale", act.scale)) for h in heads}
    if needed:
        replaced[m.y] = _in_dtype_of(m.y, got["y"], new)
    else:
        new.same_shape(m.y, m.x)
    return replaced


@rule
def quantize_input(m: InputFanout, new: Emit, cfg: Quantizer) -> Replacement:
    """Linears that no norm feeds get one QuantizePerToken or QuantizeTensor, and SmoothQuantGemms behind it."""
    cfg.spec(m)
    if cfg.activation_quantization(m) is None:
        came = cfg.came(m)
        keep("the spec quantizes its weights alone" if came is None else f"{came.came}, its activations did not")
    need((why := unfit(m)) is None, why or "")
    heads = [h for h in cfg.quantized_alike(m.heads) if h.x is m.x and unfit(h) is None]
    if all(h.root is not m.root for h in heads):  # its siblings' spec is another: it goes alone
        heads = [h for h in m.heads if h.root is m.root]
    act = cfg.activation(m.x, heads)
    scale: object = act.scale
    if scale is None:
        q, scale = new.QuantizePerToken(m.x, smoother=act.smoother)
    else:
        q = new.QuantizeTensor(m.x, smoother=act.smoother, scale=scale, zero=act.zero)
    return {h.y: gemm(h, m.x, new, cfg, act, q, scale) for h in heads}


def gemm(h: Linear, x: Value, new: Emit, cfg: Quantizer, act: Activation, q: Value, scale: object) -> Value:
    """One Linear's SmoothQuantGemm over `q`, the quantized `x`; reshaped where it read x's rows regrouped."""
    at = new.at(h)
    came = cfg.came(h)
    at.note("; ".join(filter(None, ["" if came is None else came.came, act.note])))
    per_channel = came is not None or cfg.spec(h).mode.has_per_channel_scaling()
    w = came or cfg.int8(h.w, act.smoother, per_channel)
    y: Value = at.SmoothQuantGemm(
        q,
        weight=w.weight,
        scale_a=scale,
        scale_w=w.scale,
        bias=cfg.bias(h) if act.zero is None else cfg.corrected_bias(h, act, w),
        output_type=cfg.onnx_dtype(h.y),
        has_per_token_scaling=int(act.scale is None),
        has_per_channel_scaling=int(per_channel),
    )
    if same_rows(x, h.x):
        return y
    target = np.array(regrouped(h.x, h.w.shape[1]), np.int64)
    return at.onnx("Reshape", y, target, dtype=y.dtype, shape=h.y.shape)


def readable(x: Value, h: Linear) -> bool:
    """Whether a Linear that reads a view of x's rows can take `x` itself, its result reshaped where that is needed."""
    return same_rows(x, h.x) or regrouped(h.x, h.w.shape[1]) is not None


def same_rows(x: Value, view: Value) -> bool:
    """Whether a view of x's rows has x's leading dims: nothing between them regroups, or all dims are known."""
    v: Value | None = view
    while v is not None and v is not x:
        maker = v.producer
        v = maker.inputs[0] if maker is not None and maker.op not in KEEPS_LAST else None
    return v is x or (x.shape is not None and x.shape == view.shape and None not in x.shape)


def regrouped(view: Value, n: int) -> list[int] | None:
    """The shape [..., n] with the leading dims of `view` as a Reshape's target; None where two of them are unknown."""
    if view.shape is None:
        return None
    lead = [d if isinstance(d, int) else -1 for d in view.shape[:-1]]
    return [*lead, n] if lead.count(-1) <= 1 else None


def _in_dtype_of(old: Value, y: Value, new: Emit) -> Value:
    """`y` in the dtype of the value that it replaces: a norm may have had a Cast in it."""
    if old.dtype is None or old.dtype == y.dtype:
        return y
    return new.onnx("Cast", y, dtype=old.dtype, shape=y.shape, to=to_onnx(old.dtype))


SMOOTH_QUANT = (quantize_norm,), (quantize_input,)
