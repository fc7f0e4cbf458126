"""Near misses: nine ways to break a spelling, each of which must be named first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from qpass import op, val
from qpass.graph import Node
from qpass.pipeline import Rewritten
from qpass.rewriter import Kind, Miss, Rule
from qpass.spec import QuantSpec
from tests.rewriter.only_linears import needs_only_linears
from tests.rules.kit import Graph, recipe, run
from tests.rules.spelling import Spelling, write

K = 64


@dataclass
class Case:
    """A model, how it is rewritten, and where the cause is told: by the nearest miss, by the ledger, or by both."""

    build: Any
    says: str
    miss: bool = True
    ledger: bool = True
    spec: str | QuantSpec = "w8a8"
    rules: tuple[Rule[Any, Any], ...] = ()


def norm_with(slip: str = "", **spelling: str) -> Any:
    def build(g: Graph) -> str:
        x, z = g.input("x", [4, 8, K]), g.input("z", [4, 8, K])
        return g.op("MatMul", write(g, x, Spelling(**spelling), slip=slip, other=z, k=K), g.weight(K, 8))

    return build


def leaked(g: Graph) -> str:
    h = write(g, g.input("x", ["B", 3, K]), Spelling(), k=K)
    deviation = next(n.output[0] for n in g.nodes if n.op_type == "Sqrt")
    return g.op("Add", g.op("MatMul", h, g.weight(K, 8)), deviation)


def computed_weight(g: Graph) -> str:
    return g.op("MatMul", g.input("x", ["B", 3, K]), g.op("Tanh", g.weight(K, 8), out="tanh"))


def fed_epsilon(g: Graph) -> str:
    x, eps = g.input("x", ["B", 3, K]), g.input("eps", [])
    variance = g.op("Add", g.reduce("ReduceMean", g.op("Mul", x, x), -1), eps)
    h = g.op("Mul", g.op("Mul", x, g.op("Reciprocal", g.op("Sqrt", variance))), g.gain(K))
    return g.op("MatMul", h, g.weight(K, 8))


def two_readers(g: Graph) -> str:
    h = g.op("LayerNormalization", g.input("x", ["B", 3, K]), g.gain(K))
    g.op("MatMul", h, g.weight(K, K), out="m")
    return g.op("Mul", "m", g.op("Softmax", h, out="soft"))


def other_bias(g: Graph) -> str:
    """The bias is of one row each: [3, 1] beside a product [.., 3, 8]."""
    return g.op("Add", g.op("MatMul", g.input("x", ["B", 3, K]), g.weight(K, 8)), g.weight(3, 1), out="sum")


def other_gamma(g: Graph) -> str:
    return g.op("LayerNormalization", g.input("x", ["B", 4, K]), g.weight(4, K), axis=-1)


def odd_k(g: Graph) -> str:
    return g.op("MatMul", g.input("x", ["B", 3, 48]), g.weight(48, 8))


def plain(g: Graph) -> str:
    return g.op("MatMul", g.input("x", ["B", 3, K]), g.weight(K, 8), name="layer.fc")


CASES = {
    "wrong axis": Case(norm_with("variance_axis"), "axes is [-2], wants the last axis of 3"),
    "wrong axis of an RMSNorm": Case(norm_with("variance_axis", kind="rms"), "axes is [-2], wants the last axis of 3"),
    "leaked interior value": Case(leaked, "'sqrt_10' is also used by Add"),
    "non-constant weight": Case(computed_weight, "wants a constant, got 'tanh' from Tanh 'n_tanh'", ledger=False),
    "epsilon as a graph input": Case(fed_epsilon, "wants a number in [0, 0.1], got 'eps', a graph input"),
    "unexpected consumer": Case(
        two_readers,
        "every use must be a Linear, but Softmax 'n_soft' is not",
        ledger=False,
        rules=(needs_only_linears,),
    ),
    "dims that disagree": Case(other_bias, "b wants [N=8], got [3, 1]", ledger=False),
    "dims of a norm that disagree": Case(other_gamma, "w wants [K=64], got [4, 64]"),
    "K not a multiple of the group": Case(odd_k, "K=48 is not a multiple of the group size 128", spec="w4a16-g128"),
    "excluded": Case(
        plain, "exclude[0] 'layer.*'", miss=False, spec=recipe(QuantSpec.preset("w8a16").mode, exclude=["layer.*"])
    ),
}


def outcome(case: Case) -> Rewritten:
    g = Graph()
    proto = g.model(case.build(g))
    done, _ = run(proto, case.spec, rules=case.rules)
    return done


def test_what_another_rule_took_is_no_near_miss() -> None:
    """x · w + r is no Linear with a bias, but x · w was lifted: nothing is left to explain."""
    g = Graph()
    x = g.input("x", ["B", 3, K])
    proto = g.model(g.op("Add", g.op("MatMul", x, g.weight(K, K)), x))
    done, _ = run(proto)
    assert done.outcome.misses == []


def test_ranks() -> None:
    """Share of nodes matched first, then what stopped it."""
    near = Miss(ROOT, "P", (ROOT, ROOT), "here", "why", Kind.DETAIL)
    assert near.rank > Miss(ROOT, "P", (ROOT,), "here", "why", Kind.OP, unmet=(op.Relu(val()),)).rank
    assert Miss(ROOT, "P", (ROOT, ROOT), "here", "why", Kind.LEAK).rank > near.rank
    assert str(near) == "Relu 'r': P matched 2 of 2 nodes; stopped at here: why"


ROOT = Node("Relu", name="r")


@pytest.mark.parametrize("name", CASES)
def test_the_cause_comes_first(name: str) -> None:
    case = CASES[name]
    done = outcome(case)
    if case.miss:
        near = sorted(done.outcome.misses, key=lambda m: m.rank, reverse=True)
        assert case.says in str(near[0]), [str(m) for m in near]
    if case.ledger:
        told = [s.reason for s in done.ledger.sites if s.status in ("near_miss", "declined", "excluded")]
        assert any(case.says in (r or "") for r in told), told
