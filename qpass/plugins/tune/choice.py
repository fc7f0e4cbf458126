"""What times say: the variant to take, by numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qpass.plugins.tune.table import RULE, Entry

HYSTERESIS = 1.02
"""How many times as fast as the rule's variant another must be: less is within what two runs differ by."""


@dataclass(frozen=True)
class Row:
    """What the variants of one product took at one number of tokens: µs by their names; `rule` is the rule's."""

    kind: str
    n: int
    k: int
    m: int
    rule: str
    us: Mapping[str, float]

    @property
    def variant(self) -> str:
        """The fastest, or the rule's where none is faster by more than the hysteresis."""
        best = min(self.us, key=lambda name: self.us[name])
        return best if self.us[best] * HYSTERESIS < self.us[self.rule] else self.rule

    @property
    def gain(self) -> float:
        """The rule's time over the chosen one's."""
        return self.us[self.rule] / self.us[self.variant]


def entries(rows: Iterable[Row]) -> list[Entry]:
    """The table's entries of products.

    A measured number of tokens speaks for those below it that no smaller one speaks for: tiles are filled up, so that
    their time is that of the next full one. It speaks for no fewer than half of it, unless the next smaller one says
    the same; what lies between is the rule's, as is what lies beyond the largest.
    """
    found: list[Entry] = []
    for row in sorted(rows, key=lambda r: (r.kind, r.n, r.k, r.m)):
        variant = RULE if row.variant == row.rule else row.variant
        before = found[-1] if found and found[-1].product == (row.kind, row.n, row.k) else None
        if before is None or before.variant != variant:
            half = (row.m - 1) // 2
            if half > (before.m if before else 0):
                _extend(found, Entry(row.kind, row.n, row.k, half, RULE))
        _extend(found, Entry(row.kind, row.n, row.k, row.m, variant))
    return found


def _extend(found: list[Entry], entry: Entry) -> None:
    """Append an entry; one of the same product and variant before it is part of it."""
    if found and (found[-1].product, found[-1].variant) == (entry.product, entry.variant):
        found.pop()
    found.append(entry)
