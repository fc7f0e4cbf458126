"""qpass: a declarative pass that quantizes ONNX transformers into plugin nodes.

    import qpass
    done = qpass.rewrite("model.onnx", spec="w4a16-g128")
    print(done.ledger.coverage())

Rules of your own are written with `Pattern`, `rule`, `op`, `val`, `const` and the other names below; see the README.
"""

from qpass.calibrate import Stats, calibrate
from qpass.errors import QpassError
from qpass.graph import Const, Lazy, Value
from qpass.pipeline import Rewritten, load_rules, rewrite
from qpass.quant_mode import QuantMode
from qpass.rewriter import (
    FLOAT,
    LAST,
    Decline,
    Domain,
    Emit,
    Ledger,
    Pattern,
    PatternError,
    Replacement,
    Rule,
    Site,
    attr,
    cast,
    const,
    every,
    exclude,
    ir,
    keep,
    need,
    op,
    others,
    output,
    respelling,
    rule,
    scalar,
    uses,
    val,
)
from qpass.rules.quantizer import Quantizer
from qpass.spec import QuantSpec
from qpass.verify import verify

__all__ = [
    "FLOAT",
    "LAST",
    "Const",
    "Decline",
    "Domain",
    "Emit",
    "Lazy",
    "Ledger",
    "Pattern",
    "PatternError",
    "QpassError",
    "QuantMode",
    "QuantSpec",
    "Quantizer",
    "Replacement",
    "Rewritten",
    "Rule",
    "Site",
    "Stats",
    "Value",
    "attr",
    "calibrate",
    "cast",
    "const",
    "every",
    "exclude",
    "ir",
    "keep",
    "load_rules",
    "need",
    "op",
    "others",
    "output",
    "respelling",
    "rewrite",
    "rule",
    "scalar",
    "uses",
    "val",
    "verify",
]
