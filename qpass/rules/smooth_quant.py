"""SmoothQuant: int8 activations × int8 weights, the quantization of activations merged into the norm before them.

Xiao et al. 2022, "SmoothQuant": activations are divided per channel by a smoother s, weights multiplied by it. Where a
norm feeds the Linears, 1/s folds into the norm's gamma and beta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpass.graph import Value
from qpass.rewriter import Emit, Replacement, keep, need, others, rule, uses
from qpass.rules.added_norms import AddedNorm, in_dtype_of, operands
from qpass.rules.linears import Linear, unfit
from qpass.rules.quantizer import Activation, Quantizer
from qpass.rules.rows import as_read, readable, same_rows


class NormFanout(AddedNorm):
    """A norm, maybe of a sum, and the Linears that read it."""

    heads: list[Linear] = uses(AddedNorm.y)
    rest: bool = others(AddedNorm.y)


class InputFanout(Linear):
    """A Linear, and its siblings on the same input."""

    heads: list[Linear] = uses(Linear.x)


@rule
def quantize_norm(m: NormFanout, new: Emit, cfg: Quantizer) -> Replacement:
    """A norm that feeds Linears becomes a quantizing norm with SmoothQuantGemms behind it; an Add before it is part."""
    heads = fed(m.y, m.heads, cfg)
    x, residual = operands(m)
    needed = m.rest or len(heads) < len(m.heads)
    like = next((v for v in (x, residual) if v is not None and same_rows(m.total, v)), None)
    total_needed = residual is not None and (m.added_needed or like is None)
    act = cfg.activation(m.y, heads)
    wide = act.smoother is not None and needed
    gamma, beta = (m.gamma, m.beta) if wide else (act.folded(m.gamma), act.folded(m.beta))
    inputs = {"gamma": cfg.like(gamma, x), "beta": cfg.like(beta, x)}
    norm = new.LayernormQuantization
    if m.kind == "rmsnorm":
        norm = new.RmsnormQuantization
        inputs.pop("beta")
    outputs = results(act, y=needed, sum=total_needed)
    made = norm(
        x,
        residual=residual,
        **inputs,
        smoother=act.smoother if wide else None,
        scale=act.scale,
        zero=act.zero,
        epsilon=m.epsilon,
        outputs=" ".join(outputs),
    )
    got = dict(zip(outputs, made if len(outputs) > 1 else (made,), strict=True))
    replaced = behind(m.y, heads, new, cfg, act, got)
    if total_needed and m.added is not None:
        replaced[m.added] = got["sum"]
    if not needed:
        new.same_shape(m.y, m.added if total_needed and m.added else like or x)
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


def fed(y: Value, readers: Sequence[Linear], cfg: Quantizer) -> list[Linear]:
    """The Linears that read `y` and take it quantized, all in one way.

    Raises:
        Keep: there are none.
    """
    heads = cfg.quantized_alike([h for h in readers if readable(y, h) and unfit(h) is None])
    if not heads:
        keep("no Linear that the spec quantizes with its activations reads it")
    return heads


def results(act: Activation, **needed: bool) -> list[str]:
    """The outputs of an op that quantizes its result: q, its scale where that is not known before, what is needed."""
    return ["q", *(["scale"] if act.scale is None else []), *(name for name, there in needed.items() if there)]


def behind(
    y: Value, heads: Sequence[Linear], new: Emit, cfg: Quantizer, act: Activation, got: Mapping[str, Value]
) -> dict[Value, Value]:
    """What takes the place of the Linears behind a quantized `y`, and of `y` where the op gives that too."""
    new.note(act.note)
    replaced = {h.y: gemm(h, y, new, cfg, act, got["q"], got.get("scale", act.scale)) for h in heads}
    if "y" in got:
        replaced[y] = in_dtype_of(y, got["y"], new)
    return replaced


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
    return as_read(y, x, h, at)
