"""The rule language and the machine that applies it.

`pattern.py`, `domains.py` and `contrib.py` declare, `view.py` is the graph as patterns see it, `match.py`, `fanout.py`
and `inputs.py` match, `miss.py` tells why not, `rule.py` emits, `apply.py` runs rules, `edit.py` changes the graph,
`ledger.py` accounts.
"""

from qpass.rewriter.apply import Event, Outcome, Rewriter, RuleStats, Stage
from qpass.rewriter.domains import Domain, ir, ms, op
from qpass.rewriter.edit import Pool
from qpass.rewriter.ledger import Ledger, Site, Weight
from qpass.rewriter.location import Location, PatternError
from qpass.rewriter.match import match
from qpass.rewriter.miss import Kind, Miss
from qpass.rewriter.pattern import (
    FLOAT,
    LAST,
    LIFTED,
    Pattern,
    absent,
    attr,
    cast,
    const,
    every,
    others,
    output,
    scalar,
    uses,
    val,
)
from qpass.rewriter.rule import (
    Decline,
    Emit,
    Exclude,
    Keep,
    Replacement,
    Rule,
    derived,
    emitting,
    exclude,
    keep,
    need,
    respelling,
    rule,
    transposed,
)
from qpass.rewriter.view import View

__all__ = [
    "FLOAT",
    "LAST",
    "LIFTED",
    "Decline",
    "Domain",
    "Emit",
    "Event",
    "Exclude",
    "Keep",
    "Kind",
    "Ledger",
    "Location",
    "Miss",
    "Outcome",
    "Pattern",
    "PatternError",
    "Pool",
    "Replacement",
    "Rewriter",
    "Rule",
    "RuleStats",
    "Site",
    "Stage",
    "View",
    "Weight",
    "absent",
    "attr",
    "cast",
    "const",
    "derived",
    "emitting",
    "every",
    "exclude",
    "ir",
    "keep",
    "match",
    "ms",
    "need",
    "op",
    "others",
    "output",
    "respelling",
    "rule",
    "scalar",
    "transposed",
    "uses",
    "val",
]
