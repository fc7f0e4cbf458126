"""A rule file: a norm that nothing but Linears may read, for tests of unexpected consumers."""

from __future__ import annotations

from qpass import Emit, Pattern, Quantizer, Value, every, ir, rule, val
from qpass.rules.linears import Linear


class OnlyLinears(Pattern):
    x: Value = val()
    y = ir.Norm(x, val(), kind="layernorm", epsilon=1e-5)
    heads: list[Linear] = every(y)


@rule
def needs_only_linears(m: OnlyLinears, new: Emit, cfg: Quantizer) -> Value:
    """Takes norms that nothing but Linears read."""
    return new.onnx("Identity", m.y, dtype=m.y.dtype, shape=m.y.shape)
