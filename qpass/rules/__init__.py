"""The rule families, and the order in which they run: unfuse and lift, then quantize, then put back what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qpass.graph import Model, Node
from qpass.rewriter import Outcome, Pool, Rewriter, Rule, Stage
from qpass.rules.activations import LIFT_ACTIVATIONS, LIFT_GATES, telling
from qpass.rules.added_norms import NORM_PLUGINS
from qpass.rules.experts import EXPERTS, LIFT_EXPERTS
from qpass.rules.linears import LIFT_LINEARS, LIFT_VIEWS
from qpass.rules.mlp import quantize_activation
from qpass.rules.norms import LIFT_NORMS
from qpass.rules.quantized_linears import LIFT_QUANTIZED, LIFT_STATIC
from qpass.rules.siblings import MERGE
from qpass.rules.sites import Found, Survey
from qpass.rules.smooth_quant import quantize_input, quantize_norm
from qpass.rules.unfused import UNFUSE
from qpass.rules.weight_only import WEIGHT_ONLY

LIFT: tuple[Stage, ...] = (
    *UNFUSE,
    (*LIFT_NORMS, *LIFT_LINEARS, *LIFT_QUANTIZED),
    (*LIFT_VIEWS, *LIFT_EXPERTS),
    LIFT_STATIC,
    LIFT_ACTIVATIONS,
    LIFT_GATES,
)
SMOOTH_QUANT: tuple[Stage, ...] = ((quantize_norm,), (quantize_activation,), (quantize_input,))
RULES: tuple[Stage, ...] = (*SMOOTH_QUANT, (*WEIGHT_ONLY, *EXPERTS))

__all__ = ["LIFT", "MERGE", "NORM_PLUGINS", "RULES", "Found", "Lifted", "Survey"]


class Lifted:
    """A model with its norms, Linears and activations lifted, and the survey of its sites.

    `early` are rules that see the graph before lifting.
    """

    def __init__(self, model: Model, early: Sequence[Rule[Any, Any]] = (), config: object = None) -> None:
        self.model = model
        self.outcome = Outcome()
        self.graphs = list(_rewriters(model, model.graph, "", self.outcome, Pool(model)))
        for stage in ((early,) if early else ()) + LIFT:
            self.run(stage, config)
        self.outcome.misses[:] = telling(self.outcome.misses)
        self.survey = Survey(self.graphs, self.outcome)

    def run(self, stage: Stage, config: object) -> None:
        """One stage over every graph of the model."""
        for _, rewriter in self.graphs:
            rewriter.run(stage, config)

    def unlift(self) -> None:
        """Put back what no rule claimed."""
        for _, rewriter in self.graphs:
            rewriter.unlift()
        for _, rewriter in reversed(self.graphs):  # inner ones first: they read what outer ones make
            rewriter.edit.sweep()


def _rewriters(model: Model, graph: Any, prefix: str, outcome: Outcome, pool: Pool) -> Iterator[tuple[str, Rewriter]]:
    """One for the graph and for every subgraph in it, each with the path that names its nodes in the ledger."""
    rewriter = Rewriter(model, graph, outcome, pool, prefix)
    yield prefix, rewriter
    node: Node
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if type(value) is type(graph):
                inner = f"{prefix}{rewriter.edit.label(node)}/{name}/"
                yield from _rewriters(model, value, inner, outcome, pool)
