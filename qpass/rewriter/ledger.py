"""The ledger: one entry for every norm, Linear, constant MatMul and MLP of the original model, whatever became of
it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = 1

WEIGHTED_KINDS = ("linear", "experts")
"""Kinds of sites that have a weight, of which a spec says what becomes of it."""


@dataclass
class Weight:
    """A site's weight: the original's name, shape and dtype, and its bytes before and after (scales included)."""

    name: str
    shape: list[int]
    dtype: str
    bytes_before: int
    bytes_after: int


@dataclass
class Site:
    """One entry. `nodes` are names in the original model, `new_nodes` names in the output."""

    kind: str  # "linear" | "norm" | "mlp" | "activation"
    nodes: list[str]
    status: str = "kept"  # "rewritten" | "kept" | "declined" | "near_miss" | "excluded"
    rule: str | None = None
    op: str | None = None
    reason: str | None = None
    new_nodes: list[str] = field(default_factory=list)
    fed_by: int | None = None
    """Of a Linear: the index of the norm that hands it its quantized input."""
    parts: list[int] = field(default_factory=list)
    """Of an MLP: the indices of its Linears, the column-parallel ones (fc, or gate and up) before the row-parallel."""
    weight: Weight | None = None

    @property
    def name(self) -> str:
        """The node that a table names the site by: the MatMul or Gemm of a Linear, the last node of a norm."""
        return self.nodes[-1] if self.nodes else ""


@dataclass
class Ledger:
    """All sites in the order of the original graph, with the totals."""

    model: str
    spec: dict[str, Any]
    qpass: str
    sites: list[Site]
    bytes_before: int = 0
    bytes_after: int = 0

    def of(self, kind: str) -> list[Site]:
        """The sites of one kind."""
        return [s for s in self.sites if s.kind == kind]

    def coverage(self, *kinds: str) -> float:
        """Rewritten ÷ (sites − excluded), of sites with weights unless kinds are given; 1 where there are none."""
        counts = Counter(s.status for s in self.sites if s.kind in (kinds or WEIGHTED_KINDS))
        asked = sum(counts.values()) - counts["excluded"]
        return counts["rewritten"] / asked if asked else 1.0

    def totals(self) -> dict[str, Any]:
        """Counts per kind, and the weight bytes of the whole model before and after."""
        kinds = dict.fromkeys(["linear", "norm", *(s.kind for s in self.sites)])
        per_kind: dict[str, Any] = {
            k: {"sites": len(self.of(k)), "rewritten": sum(s.status == "rewritten" for s in self.of(k))} for k in kinds
        }
        return per_kind | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def to_json(self) -> str:
        """The ledger file: schema version 1, keys and sites in a fixed order."""
        sites = []
        for s in self.sites:
            d = asdict(s)
            sites.append({k: d[k] for k in _ORDER})
        document = {
            "version": VERSION,
            "model": self.model,
            "spec": self.spec,
            "qpass": self.qpass,
            "sites": sites,
            "totals": self.totals(),
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Ledger:
        """Read a ledger file back.

        Raises:
            ValueError: not a ledger, or one of another schema version.
        """
        d = json.loads(text)
        if not isinstance(d, dict) or d.get("version") != VERSION:
            raise ValueError(f"not a qpass ledger of schema version {VERSION}")
        sites = [Site(**(s | {"weight": Weight(**s["weight"]) if s["weight"] else None})) for s in d["sites"]]
        totals = d["totals"]
        return Ledger(d["model"], d["spec"], d["qpass"], sites, totals["bytes_before"], totals["bytes_after"])


_ORDER = ("kind", "status", "rule", "op", "reason", "nodes", "new_nodes", "fed_by", "parts", "weight")
