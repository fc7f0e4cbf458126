"""Norms and Linears in the bodies of model-local functions whose calls were not expanded: named in the ledger.

These are functions of another opset, whose operators mean something else there, and functions that call themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx import FunctionProto, ModelProto

from qpass.graph import Node
from qpass.graph.functions import labels
from qpass.ops import DOMAIN
from qpass.rewriter.view import View, domain_of
from qpass.rules.unlifted import NORMS, WEIGHTED

_SEES_THROUGH = frozenset(
    {"Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"}
)


@dataclass(frozen=True)
class Inside:
    """A MatMul, Gemm or norm in a function's body, for one call of the function."""

    kind: str
    path: str
    """The call's label, the labels of calls within, and the node's."""
    reason: str


class Functions:
    """The local functions of a model, as it came."""

    def __init__(self, model: ModelProto) -> None:
        self._functions = {(f.domain, f.name, f.overload): f for f in model.functions if f.domain != DOMAIN}

    def inside(self, call: Node, label: str, view: View) -> Iterator[Inside]:
        """What is inside a node of the graph, if that calls a function; of MatMuls those with a constant operand."""
        function = self._functions.get((domain_of(call), call.op, call.overload))
        if function is not None:
            constant = [bool(v.name) and view.constant(v) is not None for v in call.inputs]
            yield from self._walk(function, constant, label, ())

    def _walk(
        self, f: FunctionProto, constant: Sequence[bool], path: str, above: tuple[FunctionProto, ...]
    ) -> Iterator[Inside]:
        known = {name for name, is_constant in zip(f.input, constant, strict=False) if is_constant}
        labelled = labels(f.node)
        for i, n in enumerate(f.node):
            here = f"{path}/{labelled[i]}"
            if n.op_type == "Constant" or (n.op_type in _SEES_THROUGH and all(x in known for x in n.input if x)):
                known.update(n.output)
            inner = self._functions.get((n.domain, n.op_type, n.overload))
            if inner is not None and inner not in above:
                yield from self._walk(inner, [x in known for x in n.input], here, (*above, f))
            if n.domain not in ("", "ai.onnx"):
                continue
            kind = "norm" if n.op_type in NORMS else "linear" if n.op_type in WEIGHTED else None
            if kind == "norm" or (kind == "linear" and any(x in known for x in n.input[:2])):
                name = f"{f.domain}.{f.name}" if f.domain else f.name
                yield Inside(kind, here, f"it lies in the body of the function {name}; inline it first (onnx.inliner)")
