"""Topological order that leaves alone what is in order."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from qpass.graph.ir import Node


def sort_nodes(graph: gs.Graph) -> None:
    """Sort a graph's nodes, and those of its subgraphs, so that each stands after what it reads.

    A node that stands too late moves up to just before the first that needs it; all others keep their order,
    and a sorted list stays as it is. A node reads what its subgraphs read. ValueError names the nodes of a
    cycle.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    order: list[Node] = []
    done: set[Node] = set()
    for first in graph.nodes:
        path = [] if first in done else [first]
        while path:
            node = path[-1]
            waits = [p for p in _producers(node) if p in position and p not in done]
            if not waits:
                done.add(path.pop())
                order.append(node)
                continue
            earliest = min(waits, key=position.__getitem__)
            if earliest in path:
                loop = [*path[path.index(earliest) :], earliest]
                raise ValueError(f"the graph has a cycle: {' → '.join(map(repr, loop))}")
            path.append(earliest)
    for node in order:
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                sort_nodes(attribute)
    graph.nodes[:] = order


def _producers(node: Node) -> set[Node]:
    """The nodes that make what a node or its subgraphs read."""
    found = {p for tensor in node.inputs for p in tensor.inputs}
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            for inner in attribute.nodes:
                found |= _producers(inner)
            found |= {p for tensor in attribute.outputs for p in tensor.inputs}
    return found
