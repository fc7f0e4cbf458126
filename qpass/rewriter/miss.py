"""Why a pattern did not match: the nearest miss of a search, in the words of the user."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from qpass.graph import Node
from qpass.rewriter.pattern import Pat, size
from qpass.rewriter.view import named


class Kind(IntEnum):
    """What stopped a match, the most telling last: near misses are ranked by it."""

    OP = 1
    COMPUTED = 2  # where a constant is wanted
    DETAIL = 3  # a constant, a shape, an attribute
    LEAK = 4
    FANOUT = 5
    GUARD = 6


@dataclass(frozen=True)
class Miss:
    """Why a pattern did not match at a node, or why its rule declined."""

    root: Node
    pattern: str
    nodes: tuple[Node, ...]
    """The nodes that did match."""
    at: str
    why: str
    kind: Kind
    rule: str = ""
    op: str = ""
    """The operator at which it stopped, where it was one."""
    unmet: tuple[Pat, ...] = ()
    """What of the pattern was still to be found, where it stopped first."""
    bound: frozenset[Pat] = frozenset()
    """And what had been found."""
    label: str = ""
    """What the ledger calls the root: its name, or one made of its op and output, with the path of its subgraph."""
    labels: frozenset[str] = frozenset()
    """And what it calls the root and the nodes that did match."""

    @property
    def matched(self) -> int:
        return len(self.nodes)

    @cached_property
    def total(self) -> int:
        """Nodes that the match would have had, at least."""
        if not self.unmet:
            return self.matched
        todo, bound = size(self.unmet[0], self.bound), self.bound | {self.unmet[0]}
        todo += sum(size(p, bound) for p in self.unmet[1:])
        return self.matched + max(1 if self.kind is Kind.OP else 0, todo)

    @property
    def rank(self) -> tuple[float, int, int]:
        """Larger is nearer."""
        return (self.matched / max(self.total, 1), int(self.kind), self.matched)

    def __str__(self) -> str:
        where = f"{self.root.op} '{self.label}'" if self.label else named(self.root)
        if self.kind is Kind.GUARD:
            return f"{where}: {self.rule or self.pattern} declined at {self.at}: {self.why}"
        return f"{where}: {self.pattern} matched {self.matched} of {self.total} nodes; stopped at {self.at}: {self.why}"
