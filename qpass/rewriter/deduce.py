"""Dtypes and shapes that ONNX's inference does not find: behind an operator that it does not know it gives up.

An operator's schema says which of its inputs and outputs are of one type. MatMul's are, so the weight tells the type of
the activation, and of what comes after it. And what Gemm takes and gives has two dims.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

import onnx

from qpass.graph import Const, Node, Value
from qpass.graph.dtypes import DType
from qpass.rewriter.view import View, domain_of, producer


def deduce_shapes(nodes: Iterable[Node], view: View) -> None:
    """Give what MatMuls and Gemms read and make the last dim that their weights tell; Gemm's have two dims."""
    for node in nodes:
        if node.op not in ("Gemm", "MatMul") or domain_of(node):
            continue
        w = view.constant(node.inputs[1])
        if w is None or len(w.shape) != 2 or node.attrs.get("transA"):
            continue
        k, n = w.shape[::-1] if node.attrs.get("transB") else w.shape
        for v, width in ((node.inputs[0], k), (node.outputs[0], n)):
            if isinstance(v, Const):
                continue
            if v.shape is None and node.op == "Gemm":
                v.shape = (None, width)
            elif v.shape and not isinstance(v.shape[-1], int):
                v.shape = (*v.shape[:-1], width)


def deduce_dtypes(nodes: Sequence[Node], view: View) -> None:
    """Give every value of unknown dtype the one that its neighbours imply, forwards and backwards."""
    unsure = [n for n in nodes if any(v.name and v.dtype is None for v in (*n.inputs, *n.outputs))]
    todo = dict.fromkeys(unsure)
    while todo:
        node = next(iter(todo))
        del todo[node]
        for v in _deduce(node, view):
            maker = producer(v)
            todo |= dict.fromkeys([*v.outputs, *([maker] if maker is not None else [])])


def _deduce(node: Node, view: View) -> list[Value]:
    """The values that this node has told the dtype of."""
    types = _type_variables(node.op, view.opset(domain_of(node)), domain_of(node))
    if types is None:
        return []
    groups: dict[str, list[Value | Const]] = defaultdict(list)
    for names, values in zip(types, (node.inputs, node.outputs), strict=True):
        for i, v in enumerate(values):
            name = names[min(i, len(names) - 1)] if names else ""  # the last one may be variadic
            if v.name and name:
                groups[name].append(v)
    told: list[Value] = []
    for values in groups.values():
        known: DType | None = next((v.dtype for v in values if v.dtype is not None), None)
        for v in values:
            if known is not None and v.dtype is None:
                v.dtype = known
                told.append(v)
    return told


_FOREIGN = {
    ("com.microsoft", "MatMulNBits"): (("T", "", "T", "", "", "T"), ("T",)),
    ("com.microsoft", "GatherBlockQuantized"): (("", "", "T", ""), ("T",)),
    ("com.microsoft", "DequantizeLinear"): (("", "T", ""), ("T",)),
}
"""The same of operators that onnx does not know: inputs, and outputs."""


@cache
def _type_variables(op_type: str, opset: int, domain: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The type variable of each input and output ("" for a fixed type), or None for an operator onnx does not know."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return _FOREIGN.get((domain, op_type))

    def names(parameters: Iterable[onnx.defs.OpSchema.FormalParameter]) -> tuple[str, ...]:
        return tuple(p.type_str if p.is_homogeneous and "(" not in p.type_str else "" for p in parameters)

    return names(schema.inputs), names(schema.outputs)
