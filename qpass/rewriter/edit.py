"""Surgery on one graph: nodes are taken out, put in, and put back; order and names are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qpass.graph import Const, Lazy, Model, Node, Value
from qpass.graph.order import sort_nodes
from qpass.rewriter.location import Location
from qpass.rewriter.pattern import LIFTED
from qpass.rewriter.rule import Decline, Draft
from qpass.rewriter.view import View, producer, reads_shape

Place = tuple[int, ...]
"""Where a node stands: its index in the original graph, or the index it was put at and a serial number."""


class Editor:
    """Changes one graph. A node that leaves is remembered, so that it can come back as it was."""

    def __init__(self, model: Model, graph: Any, view: View) -> None:
        self.model = model
        self.graph = graph
        self.view = view
        self.labels = _labels(graph.nodes)
        self.position: dict[Node, Place] = {n: (i,) for i, n in enumerate(graph.nodes)}
        self.sorted = True  # whether every node stands behind what it reads
        self._gone: dict[Node, tuple[list[Value], list[Value], Place]] = {}
        self._buried: dict[Value, Node] = {}  # value nobody needed → the node that computed it
        self._serial = 0
        self._read = [n for n in graph.nodes if any(v.outputs for v in n.outputs)]

    def label(self, node: Node) -> str:
        """A name for messages and new nodes: the original's where the node stands for one."""
        return self.labels.get(node) or node.name

    def refuse_cycle(self, drafts: Iterable[Draft], first: Place, at: Location) -> None:
        """Decline where a new node would feed itself; only nodes behind the first replaced one can close a cycle."""
        made_by = {v: d for d in drafts for v in d.outputs}
        for start in drafts:
            seen: set[object] = set()
            todo = list(start.inputs)
            while todo:
                v = todo.pop()
                source = made_by.get(v) or producer(v)
                if source is None or source in seen:
                    continue
                if source is start:
                    raise Decline(f"the rewrite would make '{v.name or start.op}' depend on itself", at)
                seen.add(source)
                if isinstance(source, Draft) or not self.sorted or self.position.get(source, first) >= first:
                    todo += source.inputs

    def add(self, d: Draft, place: Place) -> Node:
        """Put a new node in, at or right behind a place."""
        origin = self.label(d.site)
        name = origin if d.domain == LIFTED else self.model.unique(f"{origin}.{d.op}")
        for k, v in enumerate(d.outputs):
            if not v.name and v not in d.absent:
                v.name = self.model.unique(f"{name}_output_{k}")
        node = Node(d.op, name=name, attrs=d.attrs, inputs=d.inputs, outputs=d.outputs, domain=d.domain)
        self._serial += 1
        self.position[node] = here = (*place[:1], self._serial)
        before = (self.position.get(p, here) for v in d.inputs if (p := producer(v)) is not None)
        self.sorted = self.sorted and all(p <= here for p in before)
        return node

    def detach(self, node: Node) -> None:
        """Take a node out; what it computed has no producer then."""
        self._gone[node] = (list(node.inputs), list(node.outputs), self.position.pop(node))
        node.inputs.clear()
        node.outputs.clear()

    def bury_unused(self, values: Sequence[Value]) -> None:
        """Take out the producers of values that nothing needs any more, and theirs."""
        todo = list(values)
        while todo:
            node = producer(todo.pop())
            if node is None or node not in self.position:
                continue
            if any(out.outputs or self.view.is_output(out) for out in node.outputs):
                continue
            todo += node.inputs
            self._buried |= dict.fromkeys(node.outputs, node)
            self.detach(node)

    def sweep(self) -> None:
        """Take out what only graphs inside this one read, and read no more; what nothing read from the first stays."""
        before = len(self.position)
        self.bury_unused([v for n in self._read if n in self.position for v in n.outputs])
        if len(self.position) != before:
            self.settle()

    def restore(self, node: Node) -> None:
        """Put a node back with its inputs and outputs, and before it what was buried and it needs."""
        todo = [node]
        while todo:
            back = todo.pop()
            inputs, outputs, self.position[back] = self._gone.pop(back)
            back.inputs, back.outputs = inputs, outputs
            todo += [self._buried.pop(v) for v in dict.fromkeys(inputs) if not v.inputs and v in self._buried]

    def read_shape_of(self, like: Value, old: Value) -> None:
        """What reads but the shape of `old`, itself or behind a view of its rows, reads `like` instead."""
        for user in [u for u in old.outputs if self._wants_shape(u)]:
            user.inputs[0] = like

    def _wants_shape(self, node: Node) -> bool:
        if reads_shape(node):
            return True
        out = node.outputs[0]
        return self.view.keeps_rows(node) and not self.view.is_output(out) and all(map(self._wants_shape, out.outputs))

    def settle(self) -> None:
        """Write the node order back: replaced nodes in their place, new ones where their root was, then sorted."""
        self.graph.nodes[:] = sorted(self.position, key=self.position.__getitem__)
        sort_nodes(self.graph)


class Pool:
    """The initializers that rules of one run made, over all graphs of a model: one for each lazy array."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._made: dict[int, tuple[Lazy, Const]] = {}

    def constant(self, array: Lazy, name: str) -> Const:
        """The initializer of a lazy array; asked twice for the same array it gives the same one."""
        key = id(array)
        if key not in self._made:  # keeps the array too, so that its id stays its own
            self._made[key] = (array, Const(self._model.unique(name), array))
        return self._made[key][1]


def take_over(drafts: Sequence[Draft], mapping: Mapping[Value, Value], site: Node) -> list[Draft]:
    """Drafts rewired so that each drafted value takes the place and the name of the graph value it replaces.

    A draft that nothing needs is left out.
    """
    out = list(drafts)
    made = {v for d in drafts for v in d.outputs}
    takes_over: dict[Value, Value] = {}
    for old, new in mapping.items():
        if new not in made or new in takes_over:  # an existing value, or one that takes over twice
            copy = Value("", dtype=old.dtype, shape=old.shape)
            out.append(Draft("Identity", "", [new], {}, [copy], site))
            new = copy
        takes_over[new] = old
    needed = set(takes_over)
    kept = []
    for d in reversed(out):
        if needed.intersection(d.outputs):
            needed.update(d.inputs)
            kept.append(d)
    for d in kept:
        d.inputs = [takes_over.get(v, v) for v in d.inputs]
        d.outputs = [takes_over.get(v, v) for v in d.outputs]
    return kept[::-1]


def _labels(nodes: Sequence[Node]) -> dict[Node, str]:
    """Unique names: a node's own, or `<op>@<first output>` where it has none or shares it."""
    count = Counter(n.name for n in nodes)
    return {n: n.name if n.name and count[n.name] == 1 else f"{n.op}@{first_output(n)}" for n in nodes}


def first_output(node: Node) -> str:
    """The name of the first output that a node has."""
    return next((v.name for v in node.outputs if v.name), "")
