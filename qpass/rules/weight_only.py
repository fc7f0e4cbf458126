"""Weight-only Linears: int8 and int4 per channel, int4 in groups along K."""

from __future__ import annotations

from qpass.graph import Const, Value
from qpass.rewriter import Emit, Replacement, keep, need, rule
from qpass.rules.linears import Linear, unfit
from qpass.rules.quantizer import Quantizer
from qpass.rules.stored import StoredWeight

INT8, INT4 = 1, 2  # weight_type_id


@rule
def weight_only(m: Linear, new: Emit, cfg: Quantizer) -> Replacement:
    """A Linear whose spec quantizes weights alone becomes WeightOnlyQuantMatmul or its groupwise form."""
    spec, came = cfg.spec(m), cfg.came(m)
    if cfg.activation_quantization(m) is not None:
        keep("the spec quantizes its activations too" if came is None else f"{came.came}; so are its activations")
    need((why := unfit(m)) is None, why or "")
    if came is not None:
        return _as_it_came(m, new, came, cfg.bias(m))
    k = m.w.shape[0]
    if spec.mode.is_int8_weight_only():
        q = cfg.int8(m.w)
        return new.WeightOnlyQuantMatmul(m.x, q.weight, q.scale, bias=cfg.bias(m), weight_type_id=INT8)
    need(k % 2 == 0, f"K={k} is odd: int4 packs two weights of a row into a byte")
    if not spec.mode.has_per_group_scaling():
        q = cfg.int4(m.w, spec)
        return new.WeightOnlyQuantMatmul(m.x, q.weight, q.scale, bias=cfg.bias(m), weight_type_id=INT4)
    group = spec.group_size
    need(k % group == 0, f"K={k} is not a multiple of the group size {group}")
    q = cfg.int4_groups(m.w, spec)
    return new.WeightOnlyGroupwiseQuantMatmul(
        m.x, weight=q.weight, scale=q.scale, zero=q.zero, bias=cfg.bias(m), group_size=group
    )


def _as_it_came(m: Linear, new: Emit, came: StoredWeight, bias: Const | None) -> Value:
    """The op for integers that the model came with, whatever the spec would have made of floats."""
    new.note(came.came)
    kind = INT8 if came.bits == 8 else INT4
    tensors = {"weight": came.weight, "scale": came.scale, "zero": came.zero, "bias": bias}
    if came.group is None:
        return new.WeightOnlyQuantMatmul(m.x, **tensors, weight_type_id=kind)
    return new.WeightOnlyGroupwiseQuantMatmul(m.x, **tensors, group_size=came.group, weight_type_id=kind)


WEIGHT_ONLY = (weight_only,)
