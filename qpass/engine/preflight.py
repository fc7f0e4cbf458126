"""What can be known before a build: whether every plugin node of a model is one that library and backend can take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpass.engine.backends import Backend
from qpass.errors import QpassError
from qpass.graph import Const, Model, Node
from qpass.ops import DOMAIN, REGISTRY
from qpass.plugins import INTERFACES, Library, compiled_for, runs_on
from qpass.plugins.library import OpInfo
from qpass.rewriter import Ledger


def plugin_nodes(model: Model) -> list[Node]:
    """The nodes of a model, its subgraphs included, that are to become plugins."""
    return [n for n in model.nodes() if n.domain == DOMAIN]


def preflight(model: Model, path: Path, library: Library | None, backend: Backend, targets: Sequence[str]) -> None:
    """Check every plugin node against a library and a backend.

    Args:
        library: None for a build without plugins.
        targets: compute capabilities that the engine is for; it may run on one of them.

    Raises:
        QpassError: lists all that cannot be built, with the mends.
    """
    nodes = plugin_nodes(model)
    failures = list(_gathered_integers(model))
    mends = ["exclude these weights from quantization"] if failures else []
    if library is not None:
        unfit = [f"{n.name}: {why}" for n in nodes for why in _failures(n, library.ops)]
        if unfit:
            mends.append("compile the plugins of this version with `qpass plugins build`, or rewrite the model again")
        wrong = unfit_library(library, backend, targets)
        failures += [*wrong, *unfit]
        mends = [*wrong.values(), *mends]
        if backend.refuses_subgraphs and (inner := _in_subgraphs(model, nodes)):
            failures += [f"{n.name}: {backend.name} builds no plugins within If or Loop" for n in inner]
            mends.append("exclude these layers, or build with --no-plugins")
    if failures:
        shown = "; ".join(failures[:20]) + (f"; and {len(failures) - 20} more" if len(failures) > 20 else "")
        where = f" with {library.path}" if library is not None else ""
        raise QpassError(f"{path.name} cannot be built{where}: {shown}. The mend: {'; '.join(mends)}")


def unfit_library(library: Library, backend: Backend, targets: Sequence[str]) -> dict[str, str]:
    """What keeps a library from a backend and its targets, whatever the model, each with its mend."""
    found = {}
    if library.interface != backend.interface:
        major = next(m for m, i in INTERFACES.items() if i == backend.interface)
        who = f"{backend.name} {backend.version()}"
        why = f"{library.path.name} has plugins of {library.interface}, {who} wants {backend.interface}"
        found[why] = f"compile them for it with `qpass plugins build --tensorrt {major}`"
    if targets and not any(runs_on(library.architectures, t) for t in targets):
        made, on = ", ".join(library.architectures), ", ".join(targets)
        found[f"{library.path.name} is compiled for {made}, which does not run on {on}"] = _arch_mend(targets)
    return found


def check_ledger(path: Path, nodes: Sequence[Node]) -> None:
    """Raise QpassError where a ledger promises plugin nodes that its model does not have; no ledger, no promise."""
    if not path.is_file():
        return
    try:
        sites = Ledger.from_json(path.read_text()).sites
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QpassError(f"{path}: not a ledger: {error}; rewrite the model again") from error
    promised = [n for s in sites if s.status == "rewritten" for n in s.new_nodes if n.rpartition(".")[2] in REGISTRY]
    there = {n.name.rpartition("/")[2] for n in nodes}  # of a node in a subgraph a ledger has the path, too
    if gone := [n for n in promised if n.rpartition("/")[2] not in there]:
        raise QpassError(f"{path} is not of this model, which has no {gone[0]}; rewrite the model again")


def _arch_mend(targets: Sequence[str]) -> str:
    wanted = {compiled_for(t) for t in targets} - {""}
    if not wanted:
        return f"there are no kernels for {', '.join(targets)}; choose another --target-arch"
    return f"compile for it with `qpass plugins build {' '.join(f'--arch {a}' for a in sorted(wanted))}`"


def _in_subgraphs(model: Model, nodes: Sequence[Node]) -> list[Node]:
    outer = set(map(id, model.graph.nodes))
    return [n for n in nodes if id(n) not in outer]


def _gathered_integers(model: Model) -> Iterator[str]:
    """Integer weights that no plugin reads directly: TensorRT takes int8 constants nowhere else but before a
    DequantizeLinear."""
    for node in model.nodes():
        if node.domain or node.op == "DequantizeLinear":
            continue
        for value in node.inputs:
            constant = value if isinstance(value, Const) else None
            if constant is not None and constant.dtype == np.dtype(np.int8) and len(constant.shape) > 1:
                yield f"{constant.name}: TensorRT takes an int8 weight only where a plugin reads it, not a {node.op}"


def _failures(node: Node, ops: Mapping[str, OpInfo]) -> list[str]:
    if node.op not in ops:
        return [f"the library has no op {node.op}"]
    compiled = ops[node.op]
    missing = [f for f in compiled.fields if f not in node.attrs]
    if missing:
        return [f"{node.op} wants the attribute {', '.join(missing)}"]
    for field, kind in compiled.fields.items():
        if not isinstance(node.attrs[field], int if kind == "int" else int | float):
            return [f"the attribute {field} of {node.op} is {node.attrs[field]!r}, wants {kind}"]
    for key, has in (("version", compiled.version), ("namespace", compiled.namespace)):
        wants = str(node.attrs.get(f"plugin_{key}", "")) or "none"
        if wants != has:
            return [f"{node.op} is of {key} {wants}, the library has {has}"]
    op = REGISTRY.get(node.op)
    if op is None:
        return []  # an op that only the library knows
    wanted = [i for i in op.inputs if i.present(node.attrs)]
    if len(wanted) != len(node.inputs):
        return [f"{node.op} has {len(node.inputs)} inputs, its attributes say {len(wanted)}"]
    kinds: dict[str, tuple[np.dtype[Any], Any]] = {}
    for tensor, value in zip(wanted, node.inputs, strict=True):
        if value.dtype is None:
            return []  # nothing to check by; TensorRT's parser will
        dtype = np.dtype(value.dtype)
        if tensor.kind == "T" and dtype.name not in compiled.types:
            return [f"{tensor.name} is {dtype}, the library has {', '.join(compiled.types)}"]
        kinds[tensor.name] = dtype, None if value.shape is None else tuple(value.shape)
    try:
        op.infer([kinds.get(i.name) for i in op.inputs], node.attrs)
    except ValueError as error:
        return [str(error)]
    return []
