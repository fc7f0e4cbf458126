"""SmoothQuant of an MLP: fc → activation → projection with the activation and its quantization in one op.

The fc (or gate and up) is the column-parallel Linear: its output channels are split over ranks, and the activation
works on each alone. The projection is the row-parallel one: its input, the activation's result, is divided per channel
by its smoother and quantized; its bias is added after the all-reduce.
"""

from __future__ import annotations

from qpass.graph import Value
from qpass.ops.activation_quantization import Activation as Kind
from qpass.ops.body import FLOATS
from qpass.rewriter import Emit, Pattern, Replacement, attr, ir, need, others, rule, uses, val
from qpass.rules.linears import Linear
from qpass.rules.quantizer import Quantizer
from qpass.rules.smooth_quant import behind, fed, results


class ActivationFanout(Pattern):
    """An activation, gated or not, and the Linears that read it."""

    x: Value = val("... K")
    up: Value | None = val("... K")
    kind: str = attr()
    y = ir.GatedActivation(x, up, kind=kind) | ir.Activation(x, kind=kind)
    heads: list[Linear] = uses(y)
    rest: bool = others(y)


@rule
def quantize_activation(m: ActivationFanout, new: Emit, cfg: Quantizer) -> Replacement:
    """An activation that feeds Linears becomes an ActivationQuantization with SmoothQuantGemms behind it."""
    heads = fed(m.y, m.heads, cfg)
    need(m.x.dtype in FLOATS, f"its input is {m.x.dtype}, wants float32, float16 or bfloat16")
    needed = m.rest or len(heads) < len(m.heads)
    act = cfg.activation(m.y, heads)
    outputs = results(act, y=needed)
    made = new.ActivationQuantization(
        m.x,
        up=m.up,
        smoother=act.smoother,
        scale=act.scale,
        zero=act.zero,
        activation=Kind[m.kind.upper()],
        outputs=" ".join(outputs),
    )
    got = dict(zip(outputs, made if len(outputs) > 1 else (made,), strict=True))
    if not needed:
        new.same_shape(m.y, m.x)
    return behind(m.y, heads, new, cfg, act, got)
