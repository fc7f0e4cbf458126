"""Proof that an engine holds what a model promises: a plugin layer for every plugin node.

TensorRT is silent where it has no plugin for a node with a function body: it builds the body from its own layers. So
the layers are compared with the nodes twice: those of the parsed network by name and type, and those of the finished
engine by the inspector where the engine can be loaded, else (an engine for a GPU that is not here) by the names that it
holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A layer of a network or an engine. `origin` is the ONNX node that it came from, "" where that is not known."""

    name: str
    kind: str
    origin: str = ""

    @property
    def is_plugin(self) -> bool:
        return "plugin" in self.kind.lower()


def missing(nodes: Mapping[str, str], layers: Iterable[Layer]) -> list[str]:
    """The nodes (name → op) that did not become plugin layers, each with what it became."""
    plugins: set[str] = set()
    others: dict[str, str] = {}
    for layer in layers:
        for name in {layer.name, layer.origin} - {""}:
            if layer.is_plugin:
                plugins.add(name)
            else:
                others.setdefault(name, layer.kind)
    gone = []
    for name, op in nodes.items():
        if name not in plugins:
            inlined = others.get(name) or next((k for n, k in others.items() if n.startswith(f"{name}/")), None)
            gone.append(f"{name} ({op}{f', became {inlined}' if inlined else ''})")
    return gone


def unnamed(nodes: Iterable[str], engine: bytes) -> list[str]:
    """The nodes whose names a serialized engine does not hold."""
    return [n for n in nodes if n.encode() not in engine]


def inspected(text: str) -> list[Layer]:
    """The layers of an engine inspector's JSON, made with detailed verbosity."""
    found = []
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, str):  # of an engine built without details: a name and nothing else
            found.append(Layer(layer, ""))
            continue
        origin = re.search(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
        kind = str(layer.get("LayerType", ""))
        found.append(Layer(str(layer.get("Name", "")), kind, origin[1] if origin else ""))
    return found


def summary(layers: Sequence[Layer]) -> dict[str, int]:
    """Layers counted by kind."""
    counts: dict[str, int] = {}
    for layer in layers:
        counts[layer.kind] = counts.get(layer.kind, 0) + 1
    return dict(sorted(counts.items()))
