"""Nodes that only say the same, values of the interior that are needed elsewhere, further outputs of a node."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpass import Const, Emit, Pattern, PatternError, Value, const, op, others, output, respelling, rule, val
from qpass.graph import Model
from qpass.rewriter import Outcome, Rewriter, Rule, emitting
from qpass.testing import model
from tests.rules.kit import error, ops, run

HEAD = '<ir_version: 10, opset_import: ["" : 18]>\n'
GEMM = HEAD + "g (float[B, 8] x) => (float[B, 4] y) <float[8, 4] w, float[4] b> { y = Gemm(x, w, b) }"


class BiasedGemm(Pattern):
    x: Value = val("M K")
    w: Const = const("K N")
    b: Const = const("N")
    y = op.Gemm(x, w, b)


@respelling
@rule
def spell_gemm(m: BiasedGemm, new: Emit, cfg: object) -> Value:
    product = new.onnx("MatMul", m.x, m.w, like=m.y)
    return new.onnx("Add", product, m.b, like=m.y)


class Product(Pattern):
    x: Value = val()
    w: Const = const("K N")
    y = op.MatMul(x, w)


class Sum(Pattern):
    a: Value = val()
    b: Const = const()
    y = op.Add(a, b)


@rule
def take_product(m: Product, new: Emit, cfg: object) -> Value:
    return new.onnx("Gemm", m.x, m.w, like=m.y)


@rule
def take_sum(m: Sum, new: Emit, cfg: object) -> Value:
    return new.onnx("Sub", m.a, m.b.array * -1.0, like=m.y)


def stages(proto: onnx.ModelProto, *rules: Rule[Any, Any]) -> tuple[Outcome, onnx.ModelProto]:
    """Each rule in a stage of its own, none of the built-in ones, nothing lifted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        onnx.save(proto, path)
        loaded = Model.load(path)
        rewriter = Rewriter(loaded, loaded.graph)
        for r in rules:
            rewriter.run([r], None)
        rewriter.unlift()
        loaded.save(Path(folder) / "out.onnx")
        return rewriter.outcome, onnx.load(Path(folder) / "out.onnx")


class TestRespelling:
    def test_what_nobody_claims_goes_back(self) -> None:
        proto = model(GEMM)
        _, result = stages(proto, spell_gemm)
        assert result.graph == proto.graph

    @pytest.mark.parametrize(("takes", "left"), [(take_product, ["Gemm", "Add"]), (take_sum, ["MatMul", "Sub"])])
    def test_what_somebody_claims_a_part_of_stays(self, takes: Any, left: list[str]) -> None:
        proto = model(GEMM)
        _, result = stages(proto, spell_gemm, takes)
        assert ops(result) == left
        assert error(proto, result) <= 1e-6

    def test_twice_over(self) -> None:
        """A respelling of what was respelt: the last goes back first."""

        @respelling
        @rule
        def again(m: Sum, new: Emit, cfg: object) -> Value:
            return new.onnx("Sub", m.a, m.b.array * -1.0, like=m.y)

        proto = model(GEMM)
        assert stages(proto, spell_gemm, again)[1].graph == proto.graph
        assert ops(stages(proto, spell_gemm, again, take_product)[1]) == ["Gemm", "Add"], "the second went back alone"

    def test_by_the_pipeline(self) -> None:
        """A user's rule that respells before the built-in ones."""
        proto = model(GEMM.replace("Gemm(x, w, b)", "Gemm <alpha = 1.0> (x, w, b)"))
        done, result = run(proto, "w8a16", [spell_gemm])
        assert ops(result) == ["WeightOnlyQuantMatmul"]
        (site,) = done.ledger.sites
        assert (site.kind, site.nodes) == ("linear", ["Gemm@y"])
        assert run(proto, "w8a16", [spell_gemm], only_rules=True)[1].graph == proto.graph


class Shifted(Pattern):
    x: Value = val()
    s: Value = op.Neg(x)
    y = op.Relu(s)
    needed: bool = others(s)


class Strict(Pattern):
    x: Value = val()
    s: Value = op.Neg(x)
    y = op.Relu(s)


class TestInterior:
    text = HEAD + "g (float[B, 8] x) => (float[B, 8] y, float[B, 8] z) { s = Neg(x)\n y = Relu(s)\n z = Tanh(s) }"

    def test_a_pattern_may_ask_after_other_uses(self) -> None:
        seen = []

        @rule
        def both(m: Shifted, new: Emit, cfg: object) -> dict[Value, Value]:
            seen.append(m.needed)
            s = new.onnx("Mul", m.x, np.float32(-1), like=m.s)
            y = new.onnx("Max", s, np.float32(0), like=m.y)
            return {m.y: y, m.s: s} if m.needed else {m.y: y}

        proto = model(self.text)
        _, result = stages(proto, both)
        assert sorted(ops(result)) == ["Max", "Mul", "Tanh"]
        assert error(proto, result) == 0
        alone = model(self.text.replace("z = Tanh(s)", "z = Tanh(x)"))
        _, result = stages(alone, both)
        assert sorted(ops(result)) == ["Max", "Mul", "Tanh"]
        assert seen == [True, False]

    def test_a_rule_may_leave_the_value_to_its_node(self) -> None:
        @rule
        def one(m: Shifted, new: Emit, cfg: object) -> Value:
            return new.onnx("Max", new.onnx("Mul", m.x, np.float32(-1), like=m.s), np.float32(0), like=m.y)

        proto = model(self.text)
        _, result = stages(proto, one)
        assert sorted(ops(result)) == ["Max", "Mul", "Neg", "Tanh"]
        assert error(proto, result) == 0

    def test_without_asking_it_is_a_leak(self) -> None:
        @rule
        def one(m: Strict, new: Emit, cfg: object) -> Value:
            return new.onnx("Abs", m.x, like=m.y)

        outcome, result = stages(model(self.text), one)
        assert sorted(ops(result)) == ["Neg", "Relu", "Tanh"]
        assert "'s' is also used by Tanh" in str(outcome.misses[0])


class Halves(Pattern):
    x: Value = val()
    y = op.TopK(x, val(), axis=-1)
    indices: Value | None = output(y, 1)


class TestOutputs:
    text = (
        HEAD
        + """g (float[B, 8] x) => (float[B, 2] y, int64[B, 2] i) <int64[1] k = {2}> {
        v, i = TopK(x, k)
        y = Relu(v) }"""
    )

    def test_a_further_output_is_captured_and_must_be_replaced(self) -> None:
        seen: list[Any] = []

        @emitting("TopK")
        @rule
        def negated(m: Halves, new: Emit, cfg: object) -> Any:
            seen.append(m.indices)
            two = np.array([2], np.int64)
            values, places = new.nodes("TopK", [m.x, two], [(m.y.dtype, m.y.shape), (np.dtype(np.int64), m.y.shape)])
            return {m.y: values, m.indices: places} if m.indices is not None else values

        proto = model(self.text)
        _, result = stages(proto, negated)
        assert error(proto, result) == 0
        assert list(result.graph.node[0].output) == ["v", "i"]
        unused = model(self.text.replace(", int64[B, 2] i)", ")"))
        _, result = stages(unused, negated)
        assert error(unused, result) == 0
        assert seen[0].name == "i"
        assert seen[1] is None

    def test_one_that_is_left_behind(self) -> None:
        @rule
        def careless(m: Halves, new: Emit, cfg: object) -> Value:
            return new.onnx("Identity", m.x, dtype=m.y.dtype)

        with pytest.raises(PatternError, match="but not its output 'i', which is needed; replace both"):
            stages(model(self.text), careless)

    def test_a_second_output_is_no_first(self) -> None:
        class Indices(Pattern):
            x: Value = val()
            y = op.Cast(op.TopK(x, val(), axis=-1), to=1)

        @rule
        def cast(m: Indices, new: Emit, cfg: object) -> Value:
            raise AssertionError("it matched")

        text = self.text.replace("y = Relu(v)", "y = Cast <to = 1> (i)")
        outcome, _ = stages(model(text), cast)
        assert "'i' is not the first output of TopK" in str(outcome.misses[0])

    def test_of_a_value_that_is_not_there(self) -> None:
        with pytest.raises(PatternError, match="is of a value that is not part of `y`"):

            class Wrong(Pattern):
                x: Value = val()
                y = op.Relu(x)
                more: Value | None = output(val(), 1)
