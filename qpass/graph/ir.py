"""What rules see: graphsurgeon's nodes and tensors, compared and hashed by identity.

graphsurgeon compares by content and so cannot be put in a set; with identity a node is itself, whatever it is
called, and taking it out of a tensor's list of uses is a scan of pointers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qpass.graph.dtypes import Array, DType
from qpass.graph.lazy import Given, Lazy
from qpass.graph.promise import Promised

Shape = tuple[int | str | None, ...]


class Node(gs.Node):  # type: ignore[misc] # gs has no type hints
    """A node of the graph. `proto` is its original, None for a new one.

    The writer re-emits `proto`, with names of inputs and outputs as they are now; attributes of an original
    are its proto's, so a rule that wants others makes a new node.
    """

    name: str
    op: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: list[Value | Const]
    outputs: list[Value]
    overload: str = ""  # which of several functions of one name this calls
    proto: onnx.NodeProto | None = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def detach(self) -> None:
        """Take the node off its tensors: it uses and makes nothing any more."""
        self.inputs.clear()
        self.outputs.clear()

    def __repr__(self) -> str:
        return f"{self.op} '{self.name}'"


class _Symbolic:
    """The operators that patterns are written with; a pattern's captures have them, the graph's tensors do not."""

    if TYPE_CHECKING:

        def __add__(self, other: object) -> Value: ...
        def __radd__(self, other: object) -> Value: ...
        def __sub__(self, other: object) -> Value: ...
        def __rsub__(self, other: object) -> Value: ...
        def __mul__(self, other: object) -> Value: ...
        def __rmul__(self, other: object) -> Value: ...
        def __truediv__(self, other: object) -> Value: ...
        def __rtruediv__(self, other: object) -> Value: ...
        def __pow__(self, other: object) -> Value: ...
        def __neg__(self) -> Value: ...
        def __or__(self, other: object) -> Value: ...
        def __ror__(self, other: object) -> Value: ...


class Value(_Symbolic, gs.Variable):  # type: ignore[misc] # gs has no type hints
    """A tensor that is computed or fed in. `shape` is None where the rank is unknown, `dtype` where the type is."""

    name: str
    shape: Shape | None
    dtype: DType | None
    type: str | None
    inputs: list[Node]
    outputs: list[Node]
    default: Lazy | None = None  # of a graph input that an initializer backs: callers may feed another value

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def producer(self) -> Node | None:
        """The node that makes it; None for graph inputs and names from outside."""
        return self.inputs[0] if self.inputs else None

    @property
    def uses(self) -> list[Node]:
        """The nodes that read it, in order, one that reads it twice listed once; nodes in subgraphs too."""
        return list(dict.fromkeys(self.outputs))

    def __repr__(self) -> str:
        return f"'{self.name}' {self.dtype}{'?' if self.shape is None else list(self.shape)}"


class Const(_Symbolic, gs.Constant):  # type: ignore[misc] # gs has no type hints
    """A tensor whose values are known: an initializer, a new weight, or a view of one (see `Model.constant`).

    `origin` names the initializer or Constant-node output that the values come from, `root` is that tensor in
    the graph and `via` the nodes between it and this view, root first; an initializer is its own root.
    """

    name: str
    inputs: list[Node]
    outputs: list[Node]

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        name: str,
        values: Lazy | Array | Promised,
        *,
        root: Value | Const | None = None,
        via: tuple[Node, ...] = (),
        proto: onnx.TensorProto | None = None,
    ) -> None:
        if not isinstance(values, Promised):
            values = Promised(values if isinstance(values, Lazy) else Given(values))
        super().__init__(name, values)
        self.root: Value | Const = self if root is None else root
        self.via = via
        self.proto = proto

    @property
    def origin(self) -> str:
        return self.root.name

    @property
    def array(self) -> Lazy:
        values = self._values
        if isinstance(values, Promised):
            return values.array
        return Given(values if isinstance(values, np.ndarray) else values.load())

    @property
    def values(self) -> Array:
        """graphsurgeon's name for `load()`. Unlike there, reading it keeps the promise a promise."""
        return self.array.load()

    @values.setter
    def values(self, values: Lazy | Array) -> None:
        self.proto = None  # it is no longer what the model came with
        self._values = Promised(values if isinstance(values, Lazy) else Given(values))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._values.shape)

    @property
    def dtype(self) -> DType:
        return np.dtype(self._values.dtype)

    def load(self) -> Array:
        return self.array.load()

    @property
    def producer(self) -> None:
        return None

    @property
    def uses(self) -> list[Node]:
        """The nodes that read it, in order, one that reads it twice listed once; nodes in subgraphs too."""
        return list(dict.fromkeys(self.outputs))

    def __repr__(self) -> str:
        return f"'{self.name}' {self.dtype}{list(self.shape)}"
