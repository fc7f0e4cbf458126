"""Calls of model-local functions, expanded in memory: what one nn.Module each does, in the graph where rules see it.

A function's body is shared by its calls, each with weights of its own, so a rule could not rewrite it. Nodes of an
expanded call are named by the way to them, `<call>/<node>`, and so are their tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from qpass.graph.walk import all_nodes, graphs_of, names

Key = tuple[str, str, str]
Wanted = Callable[[str], bool]
Fresh = Callable[[str], str]

OWN = "qpass"
"""Domain of functions that are the bodies of plugin ops: never expanded."""


def expand(proto: ModelProto, wanted: Wanted) -> list[str]:
    """Put the bodies of calls in their place, those within them too; returns the paths of these calls.

    Functions that nothing calls any more go. A call stays where its function's operators mean something else at the
    model's opset.

    Args:
        wanted: whether to expand the call with this path.
    """
    expander = _Expander(proto, wanted)
    if not expander.functions:
        return []
    called = _called(proto)
    expander.graph(proto.graph, "")
    gone = called - _called(proto)
    kept = [f for f in proto.functions if _key_of(f) not in gone]
    if len(kept) != len(proto.functions):
        del proto.functions[:]
        proto.functions.extend(kept)
    return expander.expanded


def every_call(path: str) -> bool:
    """As what to expand: all."""
    return True


def labels(nodes: Sequence[NodeProto]) -> list[str]:
    """Unique names: a node's own, or `<op>@<first output>` where it has none or shares it."""
    count = Counter(n.name for n in nodes)
    return [
        n.name if n.name and count[n.name] == 1 else f"{n.op_type}@{next(filter(None, n.output), '')}" for n in nodes
    ]


class _Expander:
    def __init__(self, proto: ModelProto, wanted: Wanted) -> None:
        self.proto = proto
        self.wanted = wanted
        self.opsets = {_domain(o.domain): o.version for o in proto.opset_import}
        self.functions = {_key_of(f): f for f in proto.functions if f.domain != OWN and self._means_the_same(f)}
        self.expanded: list[str] = []
        self._taken = set(names(proto.graph)) if self.functions else set()
        self._nodes = {n.name for n in all_nodes(proto.graph.node)} if self.functions else set()

    def graph(self, graph: GraphProto, prefix: str) -> None:
        """Expand the calls in a graph and in those inside it."""
        nodes: list[NodeProto] = []
        for node, label in zip(graph.node, labels(graph.node), strict=True):
            nodes += self._node(node, prefix, label, (), graph)
        if len(nodes) != len(graph.node) or any(a is not b for a, b in zip(nodes, graph.node, strict=True)):
            copies = [_copy(n) for n in nodes]
            del graph.node[:]
            graph.node.extend(copies)
        for node, label in zip(graph.node, labels(graph.node), strict=True):
            for a in node.attribute:
                if a.type == AttributeProto.GRAPH:
                    self.graph(a.g, f"{prefix}{label}/{a.name}/")

    def _node(
        self, node: NodeProto, prefix: str, label: str, above: tuple[Key, ...], graph: GraphProto
    ) -> Iterator[NodeProto]:
        """The node, or what its function has in its place. Calls in its subgraphs are left to those."""
        key = _key(node)
        function = self.functions.get(key)
        if function is None or key in above or not self.wanted(prefix + label):
            yield node
            return
        self.expanded.append(prefix + label)
        body = _Body(node, function, label, self._fresh, self._fresh_node)
        for domain, version in ((_domain(o.domain), o.version) for o in function.opset_import):
            if domain not in self.opsets:
                self.opsets[domain] = version
                self.proto.opset_import.add(domain=domain, version=version)
        inner = labels(function.node)
        for n, inner_label in zip(body.nodes(inner), inner, strict=False):
            yield from self._node(n, prefix, f"{label}/{inner_label}", (*above, key), graph)
        yield from body.passed_on()
        graph.value_info.extend(body.value_infos())

    def _fresh(self, name: str) -> str:
        return _unlike(self._taken, name)

    def _fresh_node(self, name: str) -> str:
        return _unlike(self._nodes, name)

    def _means_the_same(self, f: FunctionProto) -> bool:
        """Whether the body's operators are the same at the versions that the model imports."""
        own = {_domain(o.domain): o.version for o in f.opset_import}
        for op, domain in {(n.op_type, _domain(n.domain)) for n in all_nodes(f.node)}:
            mine, models = own.get(domain), self.opsets.get(domain)
            if mine != models and models is not None and mine is not None:
                versions = [_since(op, v, domain) for v in (mine, models)]
                if versions[0] is None or versions[0] != versions[1]:
                    return False
        return True


class _Body:
    """One call's copy of a function's body."""

    def __init__(self, call: NodeProto, f: FunctionProto, label: str, fresh: Fresh, fresh_node: Fresh) -> None:
        self.function, self.label, self._fresh, self._fresh_node = f, label, fresh, fresh_node
        self.attributes = {a.name: a for a in (*f.attribute_proto, *call.attribute)}
        given = [*call.input, *[""] * (len(f.input) - len(call.input))]
        self.names: dict[str, str] = dict(zip(f.input, given, strict=False))
        self._copies: list[tuple[str, str]] = []  # outputs of the function that are its inputs, or come twice
        self._own: set[str] = set()
        for name, out in zip(f.output, call.output, strict=False):
            if not out:
                continue
            if name in self.names:
                self._copies.append((self.names[name], out))
            else:
                self.names[name] = out

    def nodes(self, inner: Sequence[str]) -> Iterator[NodeProto]:
        for name in (o for n in self.function.node for o in n.output if o):
            if name not in self.names:
                self.names[name] = self._fresh(f"{self.label}/{name}")
                self._own.add(name)
        for node, label in zip(self.function.node, inner, strict=True):
            out = self._renamed(node, self.names)
            out.name = self._fresh_node(f"{self.label}/{label}")
            yield out

    def passed_on(self) -> Iterator[NodeProto]:
        for i, (source, out) in enumerate(self._copies):
            name = self._fresh_node(f"{self.label}/output_{i}")
            yield NodeProto(op_type="Identity", name=name, input=[source], output=[out])

    def value_infos(self) -> Iterator[onnx.ValueInfoProto]:
        for info in self.function.value_info:
            if info.name in self._own:
                out = onnx.ValueInfoProto()
                out.CopyFrom(info)
                out.name = self.names[info.name]
                yield out

    def _renamed(self, node: NodeProto, scope: Mapping[str, str]) -> NodeProto:
        out = _copy(node)
        out.input[:] = [scope.get(n, n) if n else "" for n in node.input]
        out.output[:] = [scope.get(n, n) if n else "" for n in node.output]
        del out.attribute[:]
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                if (given := self.attributes.get(attribute.ref_attr_name)) is None:
                    continue  # the call leaves it out: the operator's default holds
                out.attribute.add().CopyFrom(given)
                out.attribute[-1].name = attribute.name
                continue
            out.attribute.add().CopyFrom(attribute)
            for inner in graphs_of(out.attribute[-1]):
                self._rename_graph(inner, scope)
        return out

    def _rename_graph(self, graph: GraphProto, outer: Mapping[str, str]) -> None:
        """A graph inside the body: what it defines gets names of its own too."""
        own = [t.name for t in graph.initializer] + [v.name for v in graph.input]
        own += [o for n in graph.node for o in n.output if o]
        scope = {**outer, **{name: self._fresh(f"{self.label}/{name}") for name in own}}
        for named in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            named.name = scope.get(named.name, named.name)
        for sparse in graph.sparse_initializer:
            sparse.values.name = scope.get(sparse.values.name, sparse.values.name)
        nodes = [self._renamed(n, scope) for n in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)


def _called(proto: ModelProto) -> set[Key]:
    """The functions that the graph calls, by way of others too."""
    functions = {_key_of(f): f for f in proto.functions}
    found: set[Key] = set()
    todo = [_key(n) for n in all_nodes(proto.graph.node)]
    while todo:
        key = todo.pop()
        if key in functions and key not in found:
            found.add(key)
            todo += (_key(n) for n in all_nodes(functions[key].node))
    return found


def _unlike(taken: set[str], name: str) -> str:
    """The name, or one made from it that is not taken; it is from now on."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def _since(op: str, version: int, domain: str) -> int | None:
    try:
        since: int = onnx.defs.get_schema(op, version, domain).since_version
    except onnx.defs.SchemaError:
        return None
    return since


def _copy(node: NodeProto) -> NodeProto:
    out = NodeProto()
    out.CopyFrom(node)
    return out


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _key(node: NodeProto) -> Key:
    return _domain(node.domain), node.op_type, node.overload


def _key_of(f: FunctionProto) -> Key:
    return _domain(f.domain), f.name, f.overload
