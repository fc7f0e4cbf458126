"""The pattern language and the matcher, one behaviour a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.graph import Const, Value
from qpass.rewriter import (
    LAST,
    Decline,
    Emit,
    Kind,
    Pattern,
    PatternError,
    View,
    attr,
    const,
    emitting,
    every,
    match,
    need,
    op,
    rule,
    val,
)
from qpass.testing import model
from tests.rewriter.finding import FAN, HEAD, LINEAR, Fanout, Linear, Root, Square, find, load, run


class Mean(Pattern):
    x: Value = val("... K")
    keep: int = attr()
    y = op.ReduceMean(x, axes=LAST, keepdims=keep)


class TestCaptures:
    def test_optional_part_is_there(self, tmp_path: Path) -> None:
        m, _ = find(Linear, LINEAR.format("t = MatMul(x, w)\n y = Add(t, b)"), tmp_path, "y")
        assert (m.x.name, m.w.name, m.b.name, m.mm.name) == ("x", "w", "b", "t")
        assert [n.op for n in m.nodes] == ["Add", "MatMul"]

    def test_commutes(self, tmp_path: Path) -> None:
        m, _ = find(Linear, LINEAR.format("t = MatMul(x, w)\n y = Add(b, t)"), tmp_path, "y")
        assert m.b.name == "b"

    def test_matmul_does_not_commute(self, tmp_path: Path) -> None:
        m, miss = find(
            Linear, "g (float[4, 8] x) => (float[8, 8] y) <float[8, 4] w> { y = MatMul(w, x) }", tmp_path, "y"
        )
        assert m is None
        assert "wants a constant, got 'x', a graph input" in str(miss)

    def test_absent_part_is_none(self, tmp_path: Path) -> None:
        m, _ = find(Linear, LINEAR.format("y = MatMul(x, w)"), tmp_path, "y")
        assert m.b is None

    def test_dims_must_agree(self, tmp_path: Path) -> None:
        text = "g (float[B, 8] x) => (float[B, 4] y) <float[8, 4] w, float[1] b> { t = MatMul(x, w)\n y = Add(t, b) }"
        m, miss = find(Linear, text, tmp_path, "y")
        assert m is None
        assert "wants N=4, got 1" in str(miss)
        assert "finding.py:" in str(miss)

    def test_constant_is_seen_through_views(self, tmp_path: Path) -> None:
        text = """g (float[B, 8] x) => (float[B, 4] y) <float16[4, 8] w> {
            a = Identity(w)
            c = Cast<to = 1>(a)
            t = Transpose<perm = [1, 0]>(c)
            y = MatMul(x, t) }"""
        m, _ = find(Linear, text, tmp_path, "y", w=np.arange(32).reshape(4, 8))
        assert m.w.shape == (8, 4)
        assert m.w.origin == "w"
        assert m.w.dtype == np.float32
        assert np.array_equal(m.w.load(), np.arange(32, dtype=np.float32).reshape(4, 8).T)
        assert [n.op for n in m.w.via] == ["Identity", "Cast", "Transpose"]

    def test_same_expression_is_the_same_value(self, tmp_path: Path) -> None:
        text = "g (float[B, 8] x, float[B, 8] z) => (float[B, 8] y) { y = Mul(x, z) }"
        m, miss = find(Square, text, tmp_path, "y")
        assert m is None
        assert "must be 'x' again" in str(miss)

    def test_twins_are_one_value(self, tmp_path: Path) -> None:
        text = """g (float[B, 8] x) => (float[B, 8] y) {
            a = Exp(x)
            b = Exp(x)
            y = Mul(a, b) }"""
        m, _ = find(Square, text, tmp_path, "y")
        assert m is not None
        assert sorted(n.op for n in m.nodes) == ["Exp", "Mul"]  # the twin is claimed too

    def test_noops_are_looked_through(self, tmp_path: Path) -> None:
        text = """g (float[B, 8] x) => (float[B, 8] y) {
            a = Identity(x)
            b = Cast<to = 1>(x)
            y = Mul(a, b) }"""
        m, _ = find(Square, text, tmp_path, "y")
        assert m is not None


class TestAttributes:
    @pytest.mark.parametrize("axes", ["{-1}", "{1}"])
    def test_last_axis_by_input(self, axes: str, tmp_path: Path) -> None:
        text = f"g (float[B, 8] x) => (float[B, 1] y) <int64[1] a = {axes}> {{ y = ReduceMean(x, a) }}"
        m, _ = find(Mean, text, tmp_path, "y")
        assert m.keep == 1  # the default of an attribute left out

    def test_last_axis_by_attribute_of_older_opsets(self, tmp_path: Path) -> None:
        text = "g (float[B, 8] x) => (float[B] y) { y = ReduceMean<axes = [1], keepdims = 0>(x) }"
        m = load(model(HEAD.replace("18", "13") + text), tmp_path)
        found, _ = match(Mean, m.graph.nodes[0], View(m, m.graph))
        assert found is not None
        assert found.keep == 0

    def test_wrong_axis_is_the_reason(self, tmp_path: Path) -> None:
        text = "g (float[B, 8] x) => (float[1, 8] y) <int64[1] a = {0}> { y = ReduceMean(x, a) }"
        _, miss = find(Mean, text, tmp_path, "y")
        assert "axes is [0], wants the last axis" in str(miss)

    def test_unmentioned_attribute_must_be_the_default(self, tmp_path: Path) -> None:
        text = """g (float[B, 8] x) => (float[B, 1] y) <int64[1] a = {-1}> {
            y = ReduceMean<noop_with_empty_axes = 1>(x, a) }"""
        _, miss = find(Mean, text, tmp_path, "y")
        assert "noop_with_empty_axes=1 is not in the pattern" in str(miss)


class TestScalars:
    def test_within_bounds(self, tmp_path: Path) -> None:
        text = "g (float[B] x) => (float[B] y) <float e = {0.001}> { t = Add(e, x)\n y = Sqrt(t) }"
        m, _ = find(Root, text, tmp_path, "y")
        assert m.eps == pytest.approx(1e-3)

    def test_out_of_bounds(self, tmp_path: Path) -> None:
        text = "g (float[B] x) => (float[B] y) <float e = {0.5}> { t = Add(x, e)\n y = Sqrt(t) }"
        _, miss = find(Root, text, tmp_path, "y")
        assert "a number in [0, 0.01], got 0.5" in str(miss)

    def test_input_is_no_number(self, tmp_path: Path) -> None:
        text = "g (float[B] x, float[1] e) => (float[B] y) { t = Add(x, e)\n y = Sqrt(t) }"
        _, miss = find(Root, text, tmp_path, "y")
        assert "'e', a graph input" in str(miss)


class All(Pattern):
    x: Value = val()
    y = op.Relu(x)
    heads: list[Linear] = every(y)


class TestFanout:
    def test_uses_finds_the_largest_form_of_each(self, tmp_path: Path) -> None:
        m, _ = find(Fanout, FAN.format(""), tmp_path, "r")
        assert [(h.y.name, h.b is not None) for h in m.heads] == [("p", False), ("q", True)]
        assert m.rest is False

    def test_shape_is_no_use(self, tmp_path: Path) -> None:
        text = FAN.format("s = Shape(r)").replace("=> (", "=> (int64[2] s, ")
        m, _ = find(Fanout, text, tmp_path, "r")
        assert m.rest is False

    def test_others(self, tmp_path: Path) -> None:
        text = FAN.format("s = Exp(r)").replace("=> (", "=> (float[B, 8] s, ")
        m, _ = find(Fanout, text, tmp_path, "r")
        assert len(m.heads) == 2
        assert m.rest is True

    def test_graph_output_is_another_use(self, tmp_path: Path) -> None:
        m, _ = find(Fanout, FAN.format("").replace("=> (", "=> (float[B, 8] r, "), tmp_path, "r")
        assert m.rest is True

    def test_looks_through_views_that_keep_rows(self, tmp_path: Path) -> None:
        text = """g (float[2, 3, 8] x) => (float[6, 4] p) <float[8, 4] w, int64[2] s = {-1, 8}> {
            r = Relu(x)
            f = Reshape(r, s)
            p = MatMul(f, w) }"""
        m, _ = find(Fanout, text, tmp_path, "r")
        assert [h.x.name for h in m.heads] == ["f"]
        assert m.rest is False

    def test_reshape_that_cuts_rows_is_another_use(self, tmp_path: Path) -> None:
        text = """g (float[2, 3, 8] x) => (float[12, 5] p) <float[4, 5] w, int64[2] s = {-1, 4}> {
            r = Relu(x)
            f = Reshape(r, s)
            p = MatMul(f, w) }"""
        m, _ = find(Fanout, text, tmp_path, "r")
        assert m.heads == []
        assert m.rest is True

    def test_every_names_the_use_that_is_none(self, tmp_path: Path) -> None:
        text = FAN.format("s = Exp(r)").replace("=> (", "=> (float[B, 8] s, ")
        m, miss = find(All, text, tmp_path, "r")
        assert m is None
        assert "every use must be a Linear, but Exp" in str(miss)
        assert miss.kind is Kind.FANOUT


class TestSafety:
    def test_leak_declines(self, tmp_path: Path) -> None:
        text = LINEAR.format("t = MatMul(x, w)\n y = Add(t, b)").replace("=> (", "=> (float[B, 4] t, ")
        m, miss = find(Linear, text, tmp_path, "y")
        assert m is None
        assert "'t' is also used by a graph output" in str(miss)

    def test_capture_that_is_not_in_y(self) -> None:
        with pytest.raises(PatternError, match=r"test_language\.py:\d+: capture 'w' of Bad is not part of `y`"):

            class Bad(Pattern):
                x: Value = val()
                w: Const = const()
                y = op.Relu(x)

    def test_root_must_be_an_op(self) -> None:
        with pytest.raises(PatternError, match=r"test_language\.py:\d+: the root of a pattern must be an op"):

            class Bare(Pattern):
                x: Value = val()
                y = x

    def test_step_budget_names_the_pattern(self, tmp_path: Path) -> None:
        # a full tree of Adds whose last leaf is wrong: every order of every Add is tried in vain
        leaves = [f"e{i} = Exp(x)" for i in range(15)] + ["e15 = Neg(x)"]
        adds = [f"e{16 + i} = Add(e{2 * i}, e{2 * i + 1})" for i in range(15)]
        text = "g (float[B] x) => (float[B] e30) {" + "\n".join(leaves + adds) + "}"
        with pytest.raises(PatternError, match=r"Ambiguous took more than \d+ steps"):
            find(Ambiguous, text, tmp_path, "e30")

    def test_no_truth_value(self) -> None:
        with pytest.raises(PatternError, match="not `or`"):
            _ = op.Relu(val()) or op.Exp(val())


def _tree(depth: int) -> Any:
    return op.Exp(val()) if depth == 0 else _tree(depth - 1) + _tree(depth - 1)


class Ambiguous(Pattern):
    y = _tree(4)


@rule
def relu_to_clip(m: Fanout, new: Emit, cfg: object) -> Value:
    """Relu as Clip."""
    need(len(m.heads) == 2, f"{len(m.heads)} heads, wants 2")
    return new.onnx("Clip", m.x, np.float32(0), dtype=m.y.dtype, shape=m.y.shape)


class TestRules:
    def test_replaces_and_keeps_names(self, tmp_path: Path) -> None:
        m, outcome = run(relu_to_clip, FAN.format(""), tmp_path)
        assert [n.op for n in m.graph.nodes] == ["Clip", "MatMul", "MatMul", "Add"]
        assert m.graph.nodes[0].outputs[0].name == "r"
        assert [e.status for e in outcome.events] == ["rewritten"]

    def test_decline_leaves_no_trace(self, tmp_path: Path) -> None:
        text = "g (float[B, 8] x) => (float[B, 8] r) { r = Relu(x) }"
        m, outcome = run(relu_to_clip, text, tmp_path)
        assert [n.op for n in m.graph.nodes] == ["Relu"]
        assert len(m.graph.inputs[0].outputs) == 1
        assert [(e.status, e.why) for e in outcome.events] == [("declined", "0 heads, wants 2")]
        assert outcome.misses[0].kind is Kind.GUARD

    def test_emitting_a_root_of_the_stage_is_an_error(self, tmp_path: Path) -> None:
        @rule
        def forever(m: Fanout, new: Emit, cfg: object) -> Value:
            return new.onnx("Relu", m.x)

        with pytest.raises(PatternError, match="forever emits Relu, which roots forever of the same stage"):
            run(forever, "g (float[B, 8] x) => (float[B, 8] r) { r = Relu(x) }", tmp_path)

    def test_emitting_says_that_it_may(self, tmp_path: Path) -> None:
        """What a rule emits is not matched in the same stage: once more is enough."""

        @emitting("Relu")
        @rule
        def once(m: Fanout, new: Emit, cfg: object) -> Value:
            return new.onnx("Relu", m.x, like=m.y)

        m, outcome = run(once, "g (float[B, 8] x) => (float[B, 8] r) { r = Relu(x) }", tmp_path)
        assert [n.op for n in m.graph.nodes] == ["Relu"]
        assert outcome.stats["once"].hits == 1

    def test_a_shape_is_read_elsewhere_only_where_nothing_else_is(self, tmp_path: Path) -> None:
        @rule
        def move(m: Fanout, new: Emit, cfg: object) -> dict[Value, Value]:
            new.same_shape(m.y, m.x)
            return {h.y: new.onnx("Gemm", m.x, h.w, h.b) for h in m.heads}

        text = """g (float[B, 8] x) => (float[B, 4] p, int64[2] s, float[B, 8] z) <float[8, 4] w> {
            r = Relu(x)
            p = MatMul(r, w)
            a = Identity(r)
            s = Shape(a)
            b = Identity(r)
            z = Exp(b) }"""
        m, _ = run(move, text, tmp_path)
        reads = {n.outputs[0].name: n.inputs[0].name for n in m.graph.nodes}
        assert reads == {"r": "x", "p": "x", "a": "x", "s": "a", "b": "r", "z": "b"}

    @pytest.mark.parametrize("reads", ["p", "x"])
    def test_a_cycle_is_declined(self, reads: str, tmp_path: Path) -> None:
        """Siblings made one: where one of them reads what comes of the other, that node would read itself."""

        class Sibling(Pattern):
            r: Value = val()
            z: Value = val()
            y = op.Add(r, z)

        class Siblings(Pattern):
            x: Value = val()
            y = op.Relu(x)
            heads: list[Sibling] = every(y)

        @rule
        def merge(m: Siblings, new: Emit, cfg: object) -> dict[Value, Value]:
            both = new.onnx("Sum", m.y, *(h.z for h in m.heads))
            return {h.y: both for h in m.heads}

        text = f"""g (float[B] x, float[B] u) => (float[B] q, float[B] e) {{
            r = Relu(x)
            p = Add(r, u)
            e = Exp({reads})
            q = Add(r, e) }}"""
        m, outcome = run(merge, text.replace("e) {", "e, float[B] p) {"), tmp_path)
        (event,) = outcome.events
        if reads == "p":
            assert (event.status, event.why) == ("declined", "the rewrite would make 'p' depend on itself")
            assert [n.op for n in m.graph.nodes] == ["Relu", "Add", "Exp", "Add"]
        else:
            assert [n.op for n in m.graph.nodes] == ["Relu", "Exp", "Sum", "Identity"]

    def test_new_nodes_stand_behind_what_they_read(self, tmp_path: Path) -> None:
        """The first node of a match may be replaced by one that reads what is computed after it."""

        class Two(Pattern):
            x: Value = val()
            late: Value = val()
            first = op.Relu(x)
            y = op.Add(first, late)

        @rule
        def swap(m: Two, new: Emit, cfg: object) -> dict[Value, Value]:
            return {m.first: new.onnx("Mul", m.x, m.late), m.y: new.onnx("Neg", m.first)}

        text = """g (float[B] x) => (float[B] y, float[B] z) {
            a = Relu(x)
            c = Relu(x)
            b = Exp(x)
            d = Exp(b)
            y = Add(a, b)
            z = Add(c, d) }"""
        m, outcome = run(swap, text, tmp_path)
        assert [e.status for e in outcome.events] == ["rewritten", "rewritten"]
        assert [n.op for n in m.graph.nodes] == ["Exp", "Mul", "Exp", "Mul", "Neg", "Neg"]
        made = {v for n in m.graph.nodes for v in n.outputs}
        seen = set(m.graph.inputs)
        for n in m.graph.nodes:
            assert seen.issuperset(v for v in n.inputs if v in made)
            seen.update(n.outputs)

    def test_unannotated_rule(self) -> None:
        with pytest.raises(PatternError, match="annotate the first parameter of bad with a Pattern class"):

            @rule
            def bad(m, new, cfg):  # type: ignore[no-untyped-def]
                return m.y

    def test_dead_helpers_go_with_the_claimed_site(self, tmp_path: Path) -> None:
        @rule
        def drop(m: Linear, new: Emit, cfg: object) -> Value:
            return new.onnx("Gemm", m.x, m.w.array, m.b)

        text = """g (float[B, 8] x) => (float[B, 4] y) <float[4, 8] w, float[4] b> {
            t = Transpose<perm = [1, 0]>(w)
            mm = MatMul(x, t)
            y = Add(mm, b) }"""
        m, _ = run(drop, text, tmp_path)
        assert [n.op for n in m.graph.nodes] == ["Gemm"]


def test_decline_carries_the_line() -> None:
    with pytest.raises(Decline) as error:
        need(False, "no")
    assert "test_language.py:" in str(error.value.at)
