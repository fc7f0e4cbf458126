"""The kit that rule authors test with: it must fail where a rule is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from qpass import Const, Emit, Pattern, Quantizer, Replacement, Value, const, ir, op, rule, val
from qpass.testing import check_rule, feeds, model

HEAD = '<ir_version: 10, opset_import: ["" : 18]>\n'
LINEAR = HEAD + "g (float[B, 64] x) => (float[B, 32] y) <float[64, 32] w> { y = MatMul(x, w) }"
COMPUTED = HEAD + "g (float[B, 64] x, float[64, 32] w) => (float[B, 32] y) { y = MatMul(x, w) }"


class Plain(Pattern):
    x: Value = val("... K")
    w: Const = const("K N")
    y = ir.Linear(x, w)


@rule
def right(m: Plain, new: Emit, cfg: Quantizer) -> Replacement:
    q = cfg.int8(m.w)
    return new.WeightOnlyQuantMatmul(m.x, q.weight, q.scale, weight_type_id=1)


@rule
def halved(m: Plain, new: Emit, cfg: Quantizer) -> Replacement:
    q = cfg.int8(m.w)
    return new.WeightOnlyQuantMatmul(m.x, q.weight, q.scale / 2, weight_type_id=1)


class Product(Pattern):
    a: Value = val()
    b: Value = val()
    y = op.MatMul(a, b)


@rule
def greedy(m: Product, new: Emit, cfg: Quantizer) -> Replacement:
    return new.onnx("Gemm", m.a, m.b, dtype=m.y.dtype, shape=m.y.shape)


def test_a_right_rule_passes() -> None:
    done = check_rule(
        right,
        model(LINEAR),
        emits={"WeightOnlyQuantMatmul": 1},
        removes={"MatMul": 1},
        twin=model(COMPUTED),
        rtol=0.02,
    )
    assert done.ledger.coverage() == 1


def test_wrong_numbers_are_told() -> None:
    with pytest.raises(AssertionError, match=r"y: relative error 0\.5.*, allowed 0\.02"):
        check_rule(halved, model(LINEAR), emits={"WeightOnlyQuantMatmul": 1}, rtol=0.02)


def test_wrong_structure_is_told() -> None:
    with pytest.raises(AssertionError, match="right emitted 1 WeightOnlyQuantMatmul, expected 2"):
        check_rule(right, model(LINEAR), emits={"WeightOnlyQuantMatmul": 2}, rtol=0.02)


def test_a_rule_that_does_not_fire_is_told_why() -> None:
    with pytest.raises(AssertionError, match="right did not fire"):
        check_rule(right, model(COMPUTED), emits={})


def test_a_twin_that_is_rewritten_is_told() -> None:
    with pytest.raises(AssertionError, match="greedy fired on the twin"):
        check_rule(greedy, model(LINEAR), emits={"Gemm": 1}, removes={"MatMul": 1}, twin=model(COMPUTED), rtol=1e-5)


def test_model_fills_weights_and_takes_given_ones() -> None:
    a, b = model(LINEAR), model(LINEAR, w=np.ones((64, 32)))
    assert a.graph.initializer[0].name == "w"
    assert a.graph.initializer[0].raw_data != b.graph.initializer[0].raw_data
    assert model(LINEAR) == a  # the same numbers every time


def test_feeds_follow_the_inputs() -> None:
    given = feeds(model(COMPUTED), B=5)
    assert {k: v.shape for k, v in given.items()} == {"x": (5, 64), "w": (64, 32)}
