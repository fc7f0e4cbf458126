"""Constants as rules want to see them: through the nodes that only move or convert their values.

This is a view. Nothing in the graph changes; a rule that claims the view's use leaves the nodes between
without a use, and the rewriter takes those out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from qpass.graph.dtypes import DType, to_numpy, to_onnx
from qpass.graph.ir import Const, Node, Value
from qpass.graph.lazy import Given, Lazy
from qpass.graph.scaled import LIMITS, Dequantized, Quantized, scales_of

ROWS = "Rows"
"""Type of the in-memory node that tells, in `Const.via`, which rows of axis 0 the node before it takes."""


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of axis 0; `squeezed` where that axis, of one row, is dropped."""

    start: int
    stop: int
    squeezed: bool = False


class Constants:
    """Answers whether a tensor is constant, and remembers the answer as long as its producer stays."""

    def __init__(self) -> None:
        self._seen: dict[Value | Const, tuple[Node | None, Const | None]] = {}

    def of(self, tensor: Value | Const) -> Const | None:
        """The tensor as a constant, or None.

        Constant are initializers, outputs of Constant nodes, and what Identity, Transpose, Cast, Reshape
        (with a constant target), Squeeze, Unsqueeze, QuantizeLinear and DequantizeLinear make of these; also rows of
        axis 0 that Gather (of one index), Slice and Split take, such as one expert of a stack. Not constant is an
        initializer that is a graph input too: that is a default, and a caller may feed another value.
        """
        if isinstance(tensor, Const):
            return tensor
        producer = tensor.producer
        if tensor in self._seen and self._seen[tensor][0] is producer:
            return self._seen[tensor][1]
        found = None if producer is None else self._made_by(producer, tensor)
        self._seen[tensor] = producer, found
        return found

    def _made_by(self, node: Node, tensor: Value) -> Const | None:
        if node.domain not in (None, "", "ai.onnx") and (node.domain, node.op) not in _FOREIGN:
            return None
        if node.op == "Constant":
            array = _constant_node(node)
            return None if array is None else Const(tensor.name, array, root=tensor)
        look, choose = _VIEWS.get(node.op), _SELECTIONS.get(node.op)
        if (look is None and choose is None) or not node.inputs:
            return None
        base = self.of(node.inputs[0])
        if base is None:
            return None
        if choose is not None:
            return self._selected(node, tensor, base, choose(self, node, tensor, base.shape))
        assert look is not None
        array = look(self, node, base.array)
        return None if array is None else Const(tensor.name, array, root=base.root, via=(*base.via, node))

    def input(self, node: Node, index: int) -> Const | None:
        """A node's input as a constant, None where it is left out or not constant."""
        return self.of(node.inputs[index]) if _given(node, index) else None

    @staticmethod
    def _selected(node: Node, tensor: Value, base: Const, rows: Rows | None) -> Const | None:
        if rows is None:
            return None
        array = base.array.cut(rows.start, rows.stop)
        if rows.squeezed:
            array = array.reshape(*array.shape[1:])
        # which rows is said by inputs and by the output's place, but views are told apart by their attributes
        told = Node(ROWS, attrs=vars(rows))
        return Const(tensor.name, array, root=base.root, via=(*base.via, node, told))

    def integers(self, node: Node, index: int) -> list[int] | None:
        """The values of a node's integer input, None where it is left out or not constant."""
        const = self.input(node, index)
        return None if const is None else [int(v) for v in const.load().reshape(-1)]


def _given(node: Node, index: int) -> bool:
    return index < len(node.inputs) and not node.inputs[index].is_empty()


def rows_of(c: Const) -> tuple[int, int]:
    """The rows of its root's axis 0 that a view holds, as far as its first steps tell: all of them, or a part."""
    shape = c.root.shape
    start, stop = 0, shape[0] if shape and isinstance(shape[0], int) else sys.maxsize
    for node in c.via:
        if node.op == ROWS:
            start, stop = start + node.attrs["start"], start + node.attrs["stop"]
            if node.attrs["squeezed"]:
                break
        elif node.op not in ("Identity", "Cast", *_SELECTIONS):
            break
    return start, stop


def _constant_node(node: Node) -> Lazy | None:
    attrs = node.attrs
    if isinstance(value := attrs.get("value"), Const):
        return value.array
    for name, dtype in _PLAIN_VALUES.items():
        if name in attrs:
            return Given(np.array(attrs[name], dtype))
    return None  # strings and sparse values


_PLAIN_VALUES: dict[str, type[np.generic]] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _identity(_: Constants, node: Node, array: Lazy) -> Lazy | None:
    return array


def _transpose(_: Constants, node: Node, array: Lazy) -> Lazy | None:
    perm = node.attrs.get("perm", list(range(array.ndim))[::-1])
    return array.transpose(*perm) if len(perm) == array.ndim else None


def _cast(_: Constants, node: Node, array: Lazy) -> Lazy | None:
    try:
        dtype = to_numpy(node.attrs["to"])
    except (KeyError, ValueError):
        return None
    if dtype == array.dtype:
        return array
    return array.astype(dtype) if _exact_cast(array.dtype, dtype) else None


def _exact_cast(source: DType, target: DType) -> bool:
    """Whether numpy casts as ONNX does. ONNX saturates in casts to float8 and smaller; strings are text."""
    if source.kind == "O":
        return False
    return target.name == "bfloat16" or (target.isbuiltin == 1 and target.kind in "biuf")


def _reshape(constants: Constants, node: Node, array: Lazy) -> Lazy | None:
    target = constants.integers(node, 1)
    if target is None:
        return None
    if not node.attrs.get("allowzero", 0):
        if any(d == 0 and i >= array.ndim for i, d in enumerate(target)):
            return None
        target = [array.shape[i] if d == 0 else d for i, d in enumerate(target)]
    try:
        return array.reshape(*target)
    except ValueError:
        return None  # the model is wrong there; not a constant that a rule should touch


def _squeeze(constants: Constants, node: Node, array: Lazy) -> Lazy | None:
    if len(node.inputs) < 2 or node.inputs[1].is_empty():
        return array.reshape(*(d for d in array.shape if d != 1))
    axes = constants.integers(node, 1)
    if axes is None or any(not -array.ndim <= a < array.ndim for a in axes):
        return None
    gone = {a % array.ndim for a in axes}
    if any(array.shape[a] != 1 for a in gone):
        return None
    return array.reshape(*(d for i, d in enumerate(array.shape) if i not in gone))


def _unsqueeze(constants: Constants, node: Node, array: Lazy) -> Lazy | None:
    axes = constants.integers(node, 1)
    if axes is None:
        return None
    ndim = array.ndim + len(axes)
    if len({a % ndim for a in axes}) != len(axes) or any(not -ndim <= a < ndim for a in axes):
        return None
    new = {a % ndim for a in axes}
    dims = iter(array.shape)
    return array.reshape(*(1 if i in new else next(dims) for i in range(ndim)))


def _dequantize(constants: Constants, node: Node, array: Lazy) -> Lazy | None:
    scale, zero = constants.input(node, 1), constants.input(node, 2)
    if scale is None or (zero is None and _given(node, 2)) or array.dtype.kind == "O":
        return None
    if node.attrs.get("output_dtype", 0) not in (0, to_onnx(scale.dtype)):
        return None  # the product is rounded twice there
    found = _scales(node, array, scale, zero)
    return None if found is None else Dequantized(array, found[0], found[1], scale.dtype, *found[2:])


def _quantize(constants: Constants, node: Node, array: Lazy) -> Lazy | None:
    scale, zero = constants.input(node, 1), constants.input(node, 2)
    if scale is None or (zero is None and _given(node, 2)) or array.dtype.kind not in "fV":
        return None
    said = node.attrs.get("output_dtype", 0) or TensorProto.UINT8
    dtype = to_numpy(said) if zero is None else zero.dtype
    found = _scales(node, array, scale, zero) if dtype.name in LIMITS else None
    return None if found is None else Quantized(array, found[0], found[1], dtype, *found[2:])


def _scales(node: Node, array: Lazy, scale: Const, zero: Const | None) -> Any:
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)
    return scales_of(array, scale.array, None if zero is None else zero.array, axis, block)


_FOREIGN = frozenset({("com.microsoft", "DequantizeLinear"), ("com.microsoft", "QuantizeLinear")})
"""Operators of other domains that are those of the same name here, for types that came into the standard later."""

_VIEWS: dict[str, Callable[[Constants, Node, Lazy], Lazy | None]] = {
    "Identity": _identity,
    "QuantizeLinear": _quantize,
    "Transpose": _transpose,
    "Cast": _cast,
    "DequantizeLinear": _dequantize,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}


def _gather(constants: Constants, node: Node, _: Value, shape: tuple[int, ...]) -> Rows | None:
    """One index along axis 0."""
    if not shape or node.attrs.get("axis", 0) not in (0, -len(shape)) or len(node.inputs) < 2:
        return None
    index = constants.of(node.inputs[1])
    if index is None or index.shape not in ((), (1,)):
        return None
    at = int(index.load().reshape(()))
    if not -shape[0] <= at < shape[0]:
        return None
    return Rows(at % shape[0], at % shape[0] + 1, squeezed=not index.shape)


def _slice(constants: Constants, node: Node, _: Value, shape: tuple[int, ...]) -> Rows | None:
    """Neighbouring rows: one pair of bounds, of axis 0."""
    starts, ends = constants.integers(node, 1), constants.integers(node, 2)
    if not shape or starts is None or ends is None or len(starts) != 1 or len(ends) != 1:
        return None
    for i, allowed in ((3, (0, -len(shape))), (4, (1,))):
        if len(node.inputs) > i and not node.inputs[i].is_empty():
            given = constants.integers(node, i)
            if given is None or given[0] not in allowed:
                return None
    start, stop, _step = slice(starts[0], ends[0]).indices(shape[0])
    return Rows(start, max(start, stop))


def _split(constants: Constants, node: Node, tensor: Value, shape: tuple[int, ...]) -> Rows | None:
    """One of the parts along axis 0."""
    if not shape or node.attrs.get("axis", 0) not in (0, -len(shape)):
        return None
    if len(node.inputs) > 1 and not node.inputs[1].is_empty():
        sizes = constants.integers(node, 1)
        if sizes is None or sum(sizes) != shape[0] or len(sizes) != len(node.outputs):
            return None
    else:  # equal parts, the last one smaller where they do not divide
        size = -(-shape[0] // len(node.outputs))
        sizes = [max(0, min(size, shape[0] - i * size)) for i in range(len(node.outputs))]
    at = node.outputs.index(tensor)
    return Rows(sum(sizes[:at]), sum(sizes[: at + 1]))


_SELECTIONS: dict[str, Callable[[Constants, Node, Value, tuple[int, ...]], Rows | None]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
}
