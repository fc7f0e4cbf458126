"""Op: the one declaration of a plugin op, from which its node, its ONNX body and its NumPy reference come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, helper

from qpass.ops.body import FLOATS, Body, Value
from qpass.ops.shapes import Case, Shape, ShapeError, Unifier

DOMAIN = "qpass"
OPSET_VERSION = 1
PLUGIN = {"plugin_version": "1", "plugin_namespace": "qpass"}
"""String attributes of every node, by which TensorRT's parser finds the plugin."""

X = TypeVar("X")
Array = NDArray[Any]
Attr = int | float | str
Kind = Literal["T", "int8", "float32", "output_type"]
"""What a tensor holds. "T": float32, float16 or bfloat16, the same for every T of a node. "output_type": the
one of those three that the attribute of this name gives."""


@dataclass(frozen=True)
class When:
    """Makes a tensor optional: it is there if `mask` is set in an attribute (or, with on=False, is not)."""

    attribute: str
    mask: int = 1
    on: bool = True

    def holds(self, attrs: Mapping[str, Attr]) -> bool:
        return bool(int(attrs[self.attribute]) & self.mask) == self.on


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Args:
        shape: dims by name, `...` for any leading ones; see `qpass.ops.shapes`.
        when: None for a tensor that is always there. An optional one is left out, never an empty name.
        tag: what its presence is called in the function's overload, if not by its name.
        needs: an optional input without which it cannot be there.
    """

    name: str
    kind: Kind
    shape: str | Case
    when: When | None = None
    tag: str = ""
    needs: str = ""

    @property
    def optional(self) -> bool:
        return self.when is not None

    def present(self, attrs: Mapping[str, Attr]) -> bool:
        return self.when is None or self.when.holds(attrs)


class Input(Tensor):
    """An input; always in the order of the declaration."""


class Output(Tensor):
    """An output; always in the order of the declaration."""


@dataclass(frozen=True)
class Attribute:
    """An attribute of the node, and a field of the plugin's creator.

    Args:
        default: None where it must be given, or follows from which optional tensors are there.
        allowed: the values it may have, or None for any.
        tags: value → what it is called in the function's overload; for attributes that shape the body.
    """

    name: str
    type: type[int] | type[float]
    doc: str
    default: Attr | None = None
    allowed: tuple[Attr, ...] | None = None
    tags: Mapping[Attr, str] = field(default_factory=dict)


def flag(name: str, doc: str) -> Attribute:
    """A 0/1 attribute that follows from which optional tensors are there."""
    return Attribute(name, int, doc, allowed=(0, 1))


_OUTPUT_TYPES: Mapping[Attr, np.dtype[Any]] = {helper.np_dtype_to_tensor_dtype(d): d for d in FLOATS}
OUTPUT_TYPE = Attribute(
    "output_type",
    int,
    "TensorProto type of the output: 1 float32, 10 float16, 16 bfloat16",
    allowed=tuple(_OUTPUT_TYPES),
    tags={t: FLOATS[d] for t, d in _OUTPUT_TYPES.items()},
)
EPSILON = Attribute("epsilon", float, "added to the variance", default=1e-5)


class Tensors(dict[str, Array]):
    """The present inputs of an op by name, floats in float32; `t` is the dtype that its T has on the node."""

    t: np.dtype[Any] | None = None


class Op(ABC):
    """A plugin op. Subclasses declare it and give its meaning twice: as ONNX nodes and as NumPy."""

    doc: ClassVar[str]
    inputs: ClassVar[tuple[Input, ...]]
    outputs: ClassVar[tuple[Output, ...]]
    attributes: ClassVar[tuple[Attribute, ...]]

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def build(self, b: Body) -> Sequence[Value]:
        """The present outputs, in order and in float32 where they are floats: `body` adds the Casts."""

    @abstractmethod
    def compute(self, given: Tensors, attrs: Mapping[str, Attr]) -> Sequence[Array]:
        """The present outputs, in order, from the present inputs, floats in float32 on both sides."""

    def attributes_for(
        self, present_inputs: Collection[str], present_outputs: Collection[str], given: Mapping[str, Attr]
    ) -> dict[str, Attr]:
        """Every attribute of a node that has these tensors.

        Args:
            present_outputs: may leave out one that the inputs imply (`scale`, where it is no input).
            given: attributes that tensors do not settle; may repeat those that they do.

        Raises:
            ValueError: a name that the op does not have, a tensor or attribute missing, or a contradiction.
        """
        declared = {a.name: a for a in self.attributes}
        self._known("input", present_inputs, [i.name for i in self.inputs])
        self._known("output", present_outputs, [o.name for o in self.outputs])
        self._known("attribute", given, declared)
        missing = [i.name for i in self.inputs if not i.optional and i.name not in present_inputs]
        if missing:
            raise ValueError(f"{self.name} needs its input '{missing[0]}'")
        for tensor in (*self.inputs, *self.outputs):
            there = tensor.name in (present_inputs if isinstance(tensor, Input) else present_outputs)
            if there and tensor.needs and tensor.needs not in present_inputs:
                raise ValueError(f"{self.name}: '{tensor.name}' needs the input '{tensor.needs}' too")
        settled = self._settled(present_inputs, present_outputs)
        attrs: dict[str, Attr] = {}
        for name, attribute in declared.items():
            value = given.get(name, settled.get(name, attribute.default))
            if value is None:
                raise ValueError(f"{self.name} needs its attribute '{name}': {attribute.doc}")
            if name in settled and value != settled[name]:
                raise ValueError(f"{self.name}: {name}={value}, but the tensors make it {settled[name]}")
            if attribute.allowed is not None and value not in attribute.allowed:
                raise ValueError(f"{self.name}: {name}={value}, wants one of {list(attribute.allowed)}")
            attrs[name] = attribute.type(value)
        return attrs | PLUGIN

    def infer(
        self, inputs: Sequence[tuple[np.dtype[Any], Shape] | None], attrs: Mapping[str, Attr]
    ) -> list[tuple[np.dtype[Any], Shape]]:
        """Dtype and shape of each output of a node.

        Args:
            inputs: dtype and shape of every input in the declaration's order, None for an absent one.

        Raises:
            ValueError: an input is missing or too many, or its dtype or shape does not fit.
        """
        t = self._activation(inputs, attrs)
        dims = Unifier(attrs)
        for tensor, actual in self._present(inputs, attrs):
            wants = self._dtype(tensor, t, attrs)
            if actual[0] != wants:
                raise ValueError(f"{self.name}: {tensor.name} is {actual[0]}, wants {wants}")
            try:
                dims.check(tensor.shape, actual[1])
            except ShapeError as e:
                raise ValueError(f"{self.name}: {tensor.name} {e}") from None
        return [(self._dtype(o, t, attrs), dims.solve(o.shape)) for o in self.outputs if o.present(attrs)]

    def body(
        self, attrs: Mapping[str, Attr], input_dtypes: Sequence[np.dtype[Any] | None], opset: int
    ) -> FunctionProto:
        """The op's meaning for one signature, as a model-local function.

        Args:
            input_dtypes: of every input in the declaration's order, None for an absent one.
            opset: the model's version of the default domain; the function is valid at this one.

        Raises:
            ValueError: the dtypes do not fit, or qpass has no bodies for this opset.
        """
        unshaped = [None if d is None else (np.dtype(d), None) for d in input_dtypes]
        self.infer(unshaped, attrs)
        t = self._activation(unshaped, attrs)
        b = Body([i.name for i in self.inputs if i.present(attrs)], attrs, opset, t)
        outputs = {}
        for output, value in zip((o for o in self.outputs if o.present(attrs)), self.build(b), strict=True):
            cast = output.kind in ("T", "output_type")
            to = helper.np_dtype_to_tensor_dtype(self._dtype(output, t, attrs))
            outputs[output.name] = b.node("Cast", value, to=to) if cast else value
        declared = [*(a.name for a in self.attributes), *PLUGIN]
        return b.function(DOMAIN, self.name, self._overload(t, attrs, opset), self.doc, declared, outputs)

    def reference(self, inputs: Sequence[Array | None], attrs: Mapping[str, Attr]) -> list[Array]:
        """The op in NumPy: what body and kernel are measured by.

        Args:
            inputs: every input in the declaration's order, None for an absent one.

        Returns:
            The present outputs.

        Raises:
            ValueError: as `infer`.
        """
        results = self.infer([None if x is None else (x.dtype, x.shape) for x in inputs], attrs)
        with np.errstate(over="ignore"):  # float16 overflows to infinity, as everywhere
            computed = self.compute(self.tensors(inputs, attrs), attrs)
            return [y.astype(d, copy=False) for y, (d, _) in zip(computed, results, strict=True)]

    def tensors(self, inputs: Sequence[Array | None], attrs: Mapping[str, Attr]) -> Tensors:
        """The inputs of a node as `compute` wants them."""
        given = Tensors(
            (i.name, x.astype(np.float32, copy=False) if i.kind in ("T", "output_type") else x)
            for i, x in self._present(inputs, attrs)
        )
        given.t = self._activation([None if x is None else (x.dtype, x.shape) for x in inputs], attrs)
        return given

    def _known(self, what: str, names: Collection[str], declared: Collection[str]) -> None:
        unknown = sorted(set(names) - set(declared))
        if unknown:
            raise ValueError(f"{self.name} has no {what} '{unknown[0]}'; it has {', '.join(declared)}")

    def _settled(self, inputs: Collection[str], outputs: Collection[str]) -> dict[str, int]:
        """The values of attributes that follow from which optional tensors are there."""
        bits: dict[tuple[str, int], bool] = {}
        for i in self.inputs:
            if i.when is not None:
                bits[i.when.attribute, i.when.mask] = (i.name in inputs) == i.when.on
        for o in self.outputs:
            if o.when is None:
                if o.name not in outputs:
                    raise ValueError(f"{self.name} needs its output '{o.name}'")
                continue
            bit = o.when.attribute, o.when.mask
            by_inputs = bits.setdefault(bit, (o.name in outputs) == o.when.on)
            if o.name in outputs and by_inputs != o.when.on:
                raise ValueError(f"{self.name}: '{o.name}' cannot be an output here: it is given as an input")
        settled: dict[str, int] = {}
        for (attribute, mask), on in bits.items():
            settled[attribute] = settled.get(attribute, 0) | mask * on
        return settled

    def _present(self, inputs: Sequence[X | None], attrs: Mapping[str, Attr]) -> list[tuple[Input, X]]:
        """The inputs that the attributes say are there, each with its entry of `inputs`."""
        if len(inputs) != len(self.inputs):
            wants = f"{len(self.inputs)} inputs, None for those that are not there"
            raise ValueError(f"{self.name} takes {wants}; got {len(inputs)}")
        present = []
        for tensor, actual in zip(self.inputs, inputs, strict=True):
            if (actual is not None) != tensor.present(attrs):
                expected = "missing" if actual is None else "given, but the attributes say it is not there"
                raise ValueError(f"{self.name}: input '{tensor.name}' is {expected}")
            if actual is not None:
                present.append((tensor, actual))
        return present

    def _activation(
        self, inputs: Sequence[tuple[np.dtype[Any], Shape] | None], attrs: Mapping[str, Attr]
    ) -> np.dtype[Any] | None:
        """The dtype T of a node; None for an op that has none."""
        for tensor, (dtype, _) in self._present(inputs, attrs):
            if tensor.kind == "T":
                if dtype not in FLOATS:
                    wants = "float32, float16 or bfloat16"
                    raise ValueError(f"{self.name}: {tensor.name} is {dtype}, wants {wants}")
                return dtype
        return None

    @staticmethod
    def _dtype(tensor: Tensor, t: np.dtype[Any] | None, attrs: Mapping[str, Attr]) -> np.dtype[Any]:
        if tensor.kind == "output_type":
            return _OUTPUT_TYPES[attrs["output_type"]]
        if tensor.kind == "T":
            assert t is not None
            return t
        return np.dtype(tensor.kind)

    def _overload(self, t: np.dtype[Any] | None, attrs: Mapping[str, Attr], opset: int) -> str:
        """What tells this body from the op's others, such as "f16.g128.zero.bias.o17"."""
        parts = [] if t is None else [FLOATS[t]]
        parts += [a.tags[attrs[a.name]] for a in self.attributes if a.tags]
        tensors: list[Tensor] = [*self.inputs, *self.outputs]
        parts += [x.tag or x.name for x in tensors if x.optional and x.present(attrs)]
        return ".".join([*parts, f"o{opset}"])
