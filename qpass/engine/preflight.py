"""What can be known before a build: whether every plugin node of a model is one that the compiled library can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qpass.errors import QpassError
from qpass.graph import Model, Node
from qpass.ops import DOMAIN, REGISTRY
from qpass.plugins import Library, runs_on
from qpass.plugins.library import OpInfo


def plugin_nodes(model: Model) -> list[Node]:
    """The nodes of a model, its subgraphs included, that are to become plugins."""
    return [n for n in model.nodes() if n.domain == DOMAIN]


def preflight(model: Model, path: Path, library: Library, capability: str | None) -> None:
    """Check every plugin node against a library.

    Args:
        capability: of the GPU that the engine is for, such as "89"; None where it is this machine's, and unknown.

    Raises:
        QpassError: lists all that the library cannot do.
    """
    nodes = plugin_nodes(model)
    failures = [f"{n.name}: {why}" for n in nodes for why in _failures(n, library.ops)]
    if nodes and capability is not None and not runs_on(library.architectures, capability):
        made = ", ".join(library.architectures)
        failures.insert(0, f"{library.path.name} is compiled for {made}, which does not run on {capability}")
    if failures:
        shown = "; ".join(failures[:20]) + (f"; and {len(failures) - 20} more" if len(failures) > 20 else "")
        raise QpassError(f"{path.name} cannot be built with {library.path}: {shown}. {_mend(failures, capability)}")


def _mend(failures: list[str], capability: str | None) -> str:
    if "does not run on" in failures[0]:
        return f"Compile for it with `qpass plugins build --arch {capability}`, or choose another --target-arch"
    return "Compile the plugins of this version with `qpass plugins build`, or rewrite the model again"


def _failures(node: Node, ops: dict[str, OpInfo]) -> list[str]:
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
