"""Walks over protos: the graphs inside attributes, and every name of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import AttributeProto, GraphProto, NodeProto


def graphs_of(attribute: AttributeProto) -> Iterable[GraphProto]:
    """The graphs that an attribute holds."""
    if attribute.type == AttributeProto.GRAPH:
        return [attribute.g]
    return attribute.graphs if attribute.type == AttributeProto.GRAPHS else ()


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Every node, each followed by those in its subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in graphs_of(attribute):
                yield from all_nodes(inner.node)


def names(graph: GraphProto) -> Iterator[str]:
    """Every name of a node or tensor in a graph and its subgraphs."""
    yield from (t.name for t in graph.initializer)
    yield from (t.values.name for t in graph.sparse_initializer)
    yield from (v.name for v in (*graph.input, *graph.output, *graph.value_info))
    for node in graph.node:
        yield node.name
        yield from node.input
        yield from node.output
        for attribute in node.attribute:
            for inner in graphs_of(attribute):
                yield from names(inner)
