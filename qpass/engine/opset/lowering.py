"""The walk that lowers a model's graphs node by node, and expands what the older opset lacks into functions."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from qpass.engine.opset.adapters import SPELLINGS, Site, adapt, hold, misread
from qpass.engine.opset.schemas import Schema, function_of, schema_of
from qpass.engine.opset.scope import DEFAULT, FOLDED, Scope, get_attribute, infer_types, inferred_of
from qpass.errors import QpassError
from qpass.graph.functions import every_call, expand
from qpass.graph.load import default_opset, tensors
from qpass.graph.walk import graphs_of, names

OLDEST = 17
"""Changes of operators before it are not known here."""

BODIES = "qpass.opset"
"""Domain of the functions that operators are expanded into, while a model is worked on."""


def lower(model: ModelProto, version: int = 17) -> ModelProto:
    """The model at opset `version` or lower.

    It is changed in place, its weights are not copied and, where they are external, not read. Only the default domain
    is lowered, in subgraphs too. Nodes keep their names; those of an expanded one are named `<node>/…`. What
    TensorRT 8.6's parser reads wrongly at its own opset is spelled in other ways (`SPELLINGS`), and small integers that
    are the same in every run are constants: it wants to know axes and computes nothing to that end. Local functions
    should be inlined before; what is left of them, is.

    Raises:
        QpassError: a node has no equivalent there; names it, its operator and the opset it needs. The model is then
            lowered in part.
    """
    if version < OLDEST:
        raise ValueError(f"opset {version}: models are lowered to {OLDEST} or later")
    opset = default_opset(model)
    if opset is None:
        return model
    for f in model.functions:
        if (default_opset(f) or 0) > version:
            raise QpassError(f"the function {f.name} needs opset {default_opset(f)}; inline it first (onnx.inliner)")
    infer_types(model)
    lowering = _Lowering(min(version, opset), names(model.graph))
    lowering.graph(model.graph, opset)
    for entry in model.opset_import:
        if entry.domain in DEFAULT:
            entry.version = min(version, opset)
    model.functions.extend(lowering.bodies)
    expand(model, every_call)
    if all(t.data_type <= TensorProto.BFLOAT16 for t in tensors(model)):  # later types need a later file format
        least = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
        model.ir_version = min(model.ir_version, least)
    return model


class _Lowering:
    def __init__(self, version: int, taken: Iterable[str]) -> None:
        self.version = version
        self.bodies: list[FunctionProto] = []
        self._taken = set(taken)

    def graph(self, graph: GraphProto, opset: int, scope: Scope | None = None, path: str = "") -> None:
        """Lower the nodes of a graph and of those in it."""
        scope = scope or Scope(graph)
        place = 0
        for node in list(graph.node):
            site = Site(node, scope, path, self._fresh)
            for inner in (g for a in node.attribute for g in graphs_of(a)):
                self.graph(inner, opset, Scope(inner, scope, scope.own), f"{site.path}/")
            if node.domain in DEFAULT:
                self._node(site, opset)
                if wrong := misread(site):
                    raise QpassError(f"node {site.path}: TensorRT 8.6 {wrong}; export the model without it")
            for new in site.before:
                graph.node.insert(place, new)
                place += 1
            place += 1

    def _node(self, site: Site, opset: int) -> None:
        node = site.node
        if node.op_type in SPELLINGS:
            SPELLINGS[node.op_type](site)
        if node.op_type in FOLDED | {"Shape", "Size"}:
            value = site.scope.constant(node.output[0])
            if value is not None and value.dtype.kind == "i":
                hold(node, value)
        op = node.op_type
        old, new = schema_of(op, self.version), schema_of(op, opset)
        if new is None or (old is not None and old.since_version == new.since_version):
            return
        if old is None:
            why: str | None = "there is no such operator before"
            needs = next(v for v in range(self.version, opset + 1) if schema_of(op, v))
        else:
            needs, why = adapt(site, old, new, self.version)
        if why is None or self._expand(site, new, opset):
            return
        if new.has_context_dependent_function:
            why += ", and the types of its inputs, which tell how to expand it, are not known"
        raise QpassError(
            f"node {site.path}: {op} needs opset {needs}, and is wanted at {self.version}: {why}; "
            f"export the model with opset {self.version} or lower"
        )

    def _expand(self, site: Site, schema: Schema, opset: int) -> bool:
        """Make a node the call of a function in older operators; False where its schema has none."""
        node, call = site.node, NodeProto()
        call.CopyFrom(node)
        defaults = (s.default_value for s in schema.attributes.values())
        call.attribute.extend(d for d in defaults if d.name and get_attribute(node, d.name) is None)
        types = [site.scope.type(i) for i in node.input]
        body = function_of(call, schema, opset, types)
        if not body.node:
            return False
        outputs = [name for name, used in zip(body.output, node.output, strict=False) if used]
        graph = GraphProto(
            name=node.op_type,
            node=body.node,
            input=[ValueInfoProto(name=n, type=t) for n, t in zip(body.input, types, strict=False) if t.ByteSize()],
            output=[ValueInfoProto(name=name) for name in outputs],
        )
        graph = inferred_of(graph, list(body.opset_import))
        scope = Scope(graph, own=True)
        for inner in graph.node:
            if (value := scope.constant(inner.output[0])) is not None:
                hold(inner, value)
        _prune(graph, outputs)
        self._taken.update(names(graph))
        self.graph(graph, default_opset(body) or opset, scope, f"{site.path}/")
        _prune(graph, outputs)
        node.domain, node.overload = BODIES, str(len(self.bodies))
        del node.attribute[:]
        done = FunctionProto(domain=BODIES, name=node.op_type, overload=node.overload, node=graph.node)
        done.input.extend(body.input)
        done.output.extend(body.output)
        done.opset_import.add(version=self.version)
        self.bodies.append(done)
        return True

    def _fresh(self, name: str) -> str:
        found, number = name, 0
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        self._taken.add(found)
        return found


def _prune(graph: GraphProto, outputs: Iterable[str]) -> None:
    """Take out the nodes that no output comes of."""
    used = set(outputs)
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
            continue
        used.update(node.input, *(names(g) for a in node.attribute for g in graphs_of(a)))
