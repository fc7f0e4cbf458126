"""The Linears around an activation, which make it an MLP."""

from __future__ import annotations

from dataclasses import dataclass

from qpass.graph import Node, Value
from qpass.rewriter import LIFTED, View
from qpass.rewriter.view import producer
from qpass.rules.activations import keeps_leading

_ROUNDS = frozenset({"QuantizeLinear", "DequantizeLinear"})

ACTIVATIONS = frozenset({"Activation", "GatedActivation"})


@dataclass(frozen=True)
class Mlp:
    """fc → activation → projection, or gate and up → activation · → projection."""

    columns: tuple[Node, ...]
    """The lifted Linears that the inputs come from, whole or as parts of a Split: the column-parallel ones."""
    rows: tuple[Node, ...]
    """The lifted Linears that read the result: the row-parallel ones."""
    whole: bool
    """Whether every input of the activation comes from a Linear."""

    @staticmethod
    def around(node: Node, view: View) -> Mlp:
        """What is around a lifted activation."""
        before = [_linear_behind(v, view) for v in node.inputs]
        columns = dict.fromkeys(n for n in before if n is not None)
        users = dict.fromkeys(n for n, v in view.uses(node.outputs[0]) if _is_linear(n) and n.inputs[0] is v)
        return Mlp(tuple(columns), tuple(users), None not in before)

    @property
    def kind(self) -> str:
        """What the ledger calls it."""
        return "mlp" if self.whole and self.rows else "activation"

    @property
    def linears(self) -> tuple[Node, ...]:
        return (*self.columns, *self.rows) if self.kind == "mlp" else ()


def _is_linear(node: Node) -> bool:
    return node.domain == LIFTED and node.op == "Linear"


def _linear_behind(v: Value, view: View) -> Node | None:
    """The Linear that a value comes from, seen through views of its rows, parts of them, Q/DQ and a bias behind it."""
    while (node := producer(v)) is not None:
        if _is_linear(node):
            return node
        if node.op == "Add":
            computed = [i for i in node.inputs if view.constant(i) is None]
            if len(computed) != 1:
                return None
            v = computed[0]
            continue
        if node.domain == LIFTED or not (view.keeps_rows(node) or keeps_leading(node) or node.op in _ROUNDS):
            return None
        v = node.inputs[0]
    return None
