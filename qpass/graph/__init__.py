"""The model: load, lazy weights, constants seen through their helpers, streaming atomic save."""

from qpass.graph.constants import rows_of
from qpass.graph.functions import every_call
from qpass.graph.ir import Const, Node, Value
from qpass.graph.lazy import Given, Joined, Kept, Lazy
from qpass.graph.model import Model
from qpass.graph.promise import Blockwise, Promised
from qpass.graph.save import SaveResult
from qpass.graph.scaled import Dequantized
from qpass.graph.stored import Stored

__all__ = [
    "Blockwise",
    "Const",
    "Dequantized",
    "Given",
    "Joined",
    "Kept",
    "Lazy",
    "Model",
    "Node",
    "Promised",
    "SaveResult",
    "Stored",
    "Value",
    "every_call",
    "rows_of",
]
