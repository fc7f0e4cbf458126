"""An op of one's own, and the rule that emits it: Gemma 2's soft-capping of logits, three nodes, as one plugin.

qpass rewrite model.onnx --rules softcap.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpass import Emit, Pattern, Quantizer, Value, op, rule, scalar, val
from qpass.ops import Attribute, Input, Op, Output, register
from qpass.ops.base import Array, Attr, Tensors
from qpass.ops.body import Body
from qpass.ops.body import Value as Computed


class Softcap(Op):
    doc = "y = tanh(x / cap) · cap"
    inputs = (Input("x", "T", "... K"),)
    outputs = (Output("y", "T", "... K"),)
    attributes = (Attribute("cap", float, "the largest magnitude of a result"),)

    def build(self, b: Body) -> Sequence[Computed]:
        """The meaning as ONNX nodes: what ONNX Runtime runs, and TensorRT where it lacks the plugin."""
        cap = b.attribute("cap")
        return [b.node("Tanh", b.float32("x") / cap) * cap]

    def compute(self, given: Tensors, attrs: Mapping[str, Attr]) -> Sequence[Array]:
        """The meaning in NumPy: what tests compare with."""
        cap = np.float32(attrs["cap"])
        return [np.tanh(given["x"] / cap) * cap]


register(Softcap())


class Softcapped(Pattern):
    x: Value = val("... K")
    cap: float = scalar(1e-3, 1e6)
    y = op.Tanh(x / cap) * cap


@rule
def fuse_softcap(m: Softcapped, new: Emit, cfg: Quantizer) -> Value:
    """x / cap, Tanh, · cap become one Softcap."""
    capped: Value = new.Softcap(m.x, cap=m.cap)
    return capped
