"""A model in memory: its proto as it came, the graph that rules change, and promises in place of weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from qpass.graph.constants import Constants
from qpass.graph.functions import Wanted, expand
from qpass.graph.importing import import_model
from qpass.graph.ir import Const, Node, Value
from qpass.graph.load import Weights, default_opset, is_external, read, tensors
from qpass.graph.order import sort_nodes
from qpass.graph.save import SaveResult, save
from qpass.graph.stream import Progress
from qpass.graph.walk import names


class Model:
    """A model whose weights stay on disk.

    `proto` is the original with large weights left out (external data; in the file itself where they are
    inside it) and is not to be changed. `graph` is what rules change. `functions` are the model-local
    functions: the original ones, then those that the rewriter appends.
    """

    def __init__(self, path: Path, proto: onnx.ModelProto, inside: dict[str, onnx.TensorProto]) -> None:
        self.path = path
        self.proto = proto
        self.inside = inside
        self.weights = Weights(path)
        for tensor in filter(is_external, tensors(proto)):
            self.weights.of(tensor)  # tells now what is missing, in functions too
        self.graph: gs.Graph = import_model(path, proto, self.weights)
        self.functions: list[onnx.FunctionProto] = list(proto.functions)
        self.expanded: list[str] = []
        self._constants = Constants()
        self._names: set[str] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], calls: Wanted | None = None) -> Model:
        """Read a model. Raises QpassError for whatever is wrong with its file, its versions or its external data.

        `calls` says which calls of local functions, by their paths, to put into the graph in full (see
        `qpass.graph.functions`); `expanded` are then those that were.
        """
        where = Path(path)
        proto, inside = read(where)
        expanded = [] if calls is None else expand(proto, calls)
        model = cls(where, proto, inside)
        model.expanded = expanded
        return model

    @property
    def opset(self) -> int:
        """The version of the default ONNX domain."""
        opset = default_opset(self.proto)
        assert opset is not None  # read() checked it
        return opset

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants of the graph as it is now: initializers that something uses, and promised ones."""
        constants = {t for node in self.nodes() for t in node.inputs if isinstance(t, Const)}
        return sum(t.array.nbytes for t in constants)

    def nodes(self) -> Iterator[Node]:
        """Every node, each followed by those in its subgraphs."""
        return walk(self.graph)

    def constant(self, tensor: Value | Const) -> Const | None:
        """The tensor as a constant seen through Identity, Transpose, Cast, Reshape, Squeeze and Unsqueeze, or
        None.

        An initializer comes back as itself. Else the result is not in the graph: `array` streams the viewed
        values, `root` is the initializer or the Constant node's output, `via` the nodes between. An
        initializer that is a graph input too is a default that callers may replace, hence not constant.
        """
        return self._constants.of(tensor)

    def unique(self, name: str) -> str:
        """A name that no node and no tensor has, made from `name`; it is taken from now on. The same at every run."""
        if self._names is None:
            self._names = set(names(self.proto.graph))
        number, found = 0, name
        while not found or found in self._names:
            number += 1
            found = f"{name}_{number}"
        self._names.add(found)
        return found

    def sort(self) -> None:
        """Put nodes after what they read. Where the order is right already nothing moves. ValueError for a cycle."""
        sort_nodes(self.graph)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        sidecars: Mapping[Path, bytes] | None = None,
        progress: Progress | None = None,
        max_memory: int | None = None,
    ) -> SaveResult:
        """Write the model: all of it or nothing, weights computed on the way.

        `sidecars` are small files that appear together with it (paths in the same folder). `progress(done, total)`
        is called in this thread, with bytes of weights. `max_memory` bounds, in bytes, what the writer holds of
        weights, by fewer threads; one takes about 64 MB at most. Weights are inside the file where there are few or
        the input had them inside, else in `<stem>.<hash>.data` beside it.

        Raises QpassError where the output cannot be written, and what a promise raises; the old output is then
        untouched, as it is by Ctrl-C and by a kill at any moment.
        """
        return save(self, Path(path), sidecars or {}, progress, max_memory)


def walk(graph: gs.Graph) -> Iterator[Node]:
    """Every node of a graph, each followed by those in its subgraphs."""
    for node in graph.nodes:
        yield node
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                yield from walk(attribute)
