"""How a node is rewritten in place: into the form of an older schema, and into words that TensorRT 8.6 reads rightly.

Written out here is only what onnx's schemas do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qpass.engine.opset.schemas import Schema, is_default, schema_of, unlike
from qpass.engine.opset.scope import Scope, get_attribute, has_input


class Site:
    """A node at work, what is known around it, and the new nodes that are to stand before it."""

    def __init__(self, node: NodeProto, scope: Scope, path: str, fresh: Callable[[str], str]) -> None:
        self.node, self.scope, self._fresh = node, scope, fresh
        self._label = node.name or f"{node.op_type}@{next(filter(None, node.output), '')}"
        self.path = path + self._label
        self.before: list[NodeProto] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The output of a new node."""
        name = self._fresh(f"{self._label}/{op}")
        self.before.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def add_integers(self, values: Iterable[int]) -> str:
        return self.add("Constant", value=numpy_helper.from_array(np.array(list(values), np.int64)))


def _reduce(site: Site) -> str | None:
    """Axes became an input."""
    node, axes = site.node, site.scope.integers(site.node, 1)
    if axes is None:
        return "its axes are not constant"
    if not axes and get_attribute(node, "noop_with_empty_axes"):
        if node.op_type not in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"):
            return "it reduces no axes, but computes"
        node.op_type = "Identity"
        del node.attribute[:]
    elif axes:
        set_attribute(node, "axes", axes)
    del node.input[1:]
    set_attribute(node, "noop_with_empty_axes", None)
    return None


def _split(site: Site) -> str | None:
    """Where sizes are left out, the parts were equal; now the last one may be smaller."""
    node, parts = site.node, len(site.node.output)
    if not has_input(node, 1):
        axis, dims = get_attribute(node, "axis") or 0, site.scope.dims(node.input[0])
        size = None if dims is None else dims[axis]
        if size is None and not site.scope.own:  # onnx's own functions split evenly
            return f"whether {parts} parts of {node.input[0]} are equal is not known"
        if size is not None and size % parts:
            part = -(-size // parts)
            sizes = [max(0, min(part, size - i * part)) for i in range(parts)]
            node.input[:] = [node.input[0], site.add_integers(sizes)]
    set_attribute(node, "num_outputs", None)
    return None


def _pad(site: Site) -> str | None:
    """Pads were of all axes."""
    node = site.node
    if not has_input(node, 3):
        return None
    axes, dims = site.scope.integers(node, 3), site.scope.dims(node.input[0])
    if axes is None or dims is None:
        return "its axes are not constant" if axes is None else f"the rank of {node.input[0]} is not known"
    place = {a % len(dims): i for i, a in enumerate(axes)}
    zero = 2 * len(axes)  # the place of one behind the pads
    index = [place[d] + end if d in place else zero for end in (0, len(axes)) for d in range(len(dims))]
    if (pads := site.scope.integers(node, 1)) is not None:
        node.input[1] = site.add_integers([*pads, 0][i] for i in index)
    else:
        padded = site.add("Concat", node.input[1], site.add_integers([0]), axis=0)
        node.input[1] = site.add("Gather", padded, site.add_integers(index))
    del node.input[3:]
    return None


_ADAPTERS: dict[str, tuple[int, Callable[[Site], str | None]]] = {
    **{f"Reduce{r}": (18, _reduce) for r in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod")},
    "ReduceSumSquare": (18, _reduce),
    "Split": (18, _split),
    "Pad": (18, _pad),
    "DFT": (20, lambda _: "its axis was another by default"),
    "GroupNormalization": (21, lambda _: "its scale was of groups, not channels"),
}
"""What has another form or meaning since an opset. Each returns why a node cannot have the older one."""

_LATER: dict[tuple[str, str], tuple[int, Sequence[bytes | int]]] = {
    ("AveragePool", "ceil_mode"): (22, (1,)),  # drops windows that lie in the padding
    ("MaxPool", "ceil_mode"): (22, (1,)),
    ("GridSample", "mode"): (20, (b"linear", b"cubic")),
    ("Pad", "mode"): (19, (b"wrap",)),
    ("Resize", "coordinate_transformation_mode"): (19, (b"half_pixel_symmetric",)),
    ("ScatterElements", "reduction"): (18, (b"max", b"min")),
    ("ScatterND", "reduction"): (18, (b"max", b"min")),
}
"""Values of attributes that an older operator lacks, or takes otherwise."""

_FLOAT8 = ("saturate", "round_mode")
"""Attributes that are without effect but on types that the older operators lack."""


def adapt(site: Site, old: Schema, new: Schema, version: int) -> tuple[int, str | None]:
    """Make a node one of an older schema, of `version`. The opset that it needs, and why it cannot be."""
    node = site.node
    since, adapter = _ADAPTERS.get(node.op_type, (0, None))
    if adapter is not None and old.since_version < since <= new.since_version and (why := adapter(site)):
        return since, why
    if node.op_type != old.name:
        return 0, None
    for a in list(node.attribute):
        since, values = _LATER.get((node.op_type, a.name), (0, ()))
        if old.since_version < since <= new.since_version and helper.get_attribute_value(a) in values:
            return since, f"it has {helper.printable_attribute(a)}"
        if a.name not in old.attributes and (a.name in _FLOAT8 or is_default(a, new)):
            set_attribute(node, a.name, None)
    while len(node.input) > 1 and not node.input[-1]:
        node.input.pop()
    why = unlike(node, site.scope, old)
    later = range(version, new.since_version + 1) if why else ()
    fit = (v for v in later if unlike(node, site.scope, schema_of(node.op_type, v)) is None)
    return next(fit, new.since_version), why


def _cast_like(site: Site) -> None:
    if dtype := site.scope.type(site.node.input[1]).tensor_type.elem_type:
        site.node.op_type = "Cast"
        del site.node.input[1:]
        set_attribute(site.node, "to", dtype)


def _constant(site: Site) -> None:
    value = site.scope.constant(site.node.output[0])
    if value is not None and site.node.attribute[0].name != "value":
        hold(site.node, value)


def _shape(site: Site) -> None:
    node, start, end = site.node, get_attribute(site.node, "start") or 0, get_attribute(site.node, "end")
    if start or end is not None:
        site.scope.constant(node.output[0])  # is remembered there
        whole = site.add("Shape", node.input[0])
        bounds = [site.add_integers([b]) for b in (start, np.iinfo(np.int32).max if end is None else end)]
        node.op_type, node.input[:] = "Slice", [whole, *bounds]
        del node.attribute[:]


def _reduce_sum(site: Site) -> None:
    """Its axes are an input at opset 13 already, but that none may mean "nothing" is overlooked."""
    node = site.node
    if get_attribute(node, "noop_with_empty_axes") and (axes := site.scope.integers(node, 1)) is not None:
        set_attribute(node, "noop_with_empty_axes", None)
        if not axes:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]


def _quantization(site: Site) -> None:
    """Its parser wants a zero point, and takes no axis for axis 0 where ONNX means 1."""
    node, dims = site.node, site.scope.dims(site.node.input[1])
    if not has_input(node, 2) and dims is not None and None not in dims and _integers_of(site) == TensorProto.INT8:
        zero = site.add("Constant", value=numpy_helper.from_array(np.zeros([d or 0 for d in dims], np.int8)))
        node.input[:] = [*node.input[:2], zero]
        set_attribute(node, "output_dtype", None)
    if dims not in ([], [1]) and get_attribute(node, "axis") is None:
        set_attribute(node, "axis", 1)


def _integers_of(site: Site) -> int:
    """The type of a QuantizeLinear's output or DequantizeLinear's input; 0 where it is not known."""
    node = site.node
    if has_input(node, 2):
        return int(site.scope.type(node.input[2]).tensor_type.elem_type)
    if node.op_type == "QuantizeLinear":
        return get_attribute(node, "output_dtype") or TensorProto.UINT8
    return int(site.scope.type(node.input[0]).tensor_type.elem_type)


SPELLINGS: dict[str, Callable[[Site], None]] = {
    "CastLike": _cast_like,  # not known to it
    "Constant": _constant,  # value_int and value_ints are read as zeros
    "DequantizeLinear": _quantization,
    "QuantizeLinear": _quantization,
    "ReduceSum": _reduce_sum,
    "Shape": _shape,  # start and end are overlooked
}
"""What TensorRT 8.6's parser reads wrongly at opset 17, in words that it knows."""


MISREAD: dict[tuple[str, str], Sequence[bytes | int]] = {
    ("ScatterElements", "reduction"): (b"none",),
    ("ScatterND", "reduction"): (b"none",),
    ("GRU", "layout"): (0,),
    ("LSTM", "layout"): (0,),
    ("RNN", "layout"): (0,),
}
"""Attributes that the parser overlooks, with the values that this changes nothing of."""


def misread(site: Site) -> str | None:
    """What TensorRT 8.6's parser would take for something else, and say nothing; None where there is no such thing."""
    node = site.node
    for a in node.attribute:
        harmless = MISREAD.get((node.op_type, a.name))
        if harmless is not None and helper.get_attribute_value(a) not in harmless:
            return f"overlooks {helper.printable_attribute(a)} of {node.op_type}"
    if node.op_type == "QuantizeLinear" and _integers_of(site) == TensorProto.UINT8:
        return "takes the uint8 of QuantizeLinear for int8"
    return None


def hold(node: NodeProto, value: NDArray[Any]) -> None:
    """Make a node the constant that it is equal to."""
    node.op_type = "Constant"
    del node.input[:], node.attribute[:]
    set_attribute(node, "value", numpy_helper.from_array(value))


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set an attribute, or leave it out where the value is None."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))
