"""What an author of rules trips over: each mistake is told at once, with file and line and the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpass import (
    Const,
    Domain,
    Emit,
    Pattern,
    PatternError,
    Value,
    attr,
    const,
    every,
    ir,
    op,
    others,
    rule,
    scalar,
    uses,
    val,
)
from qpass.graph import Model
from qpass.rewriter import Rewriter, Rule
from qpass.testing import model

HEAD = '<ir_version: 10, opset_import: ["" : 18]>\n'
HERE = r"test_authors\.py:\d+: "
TEXT = HEAD + "g (float[B, 8] x) => (float[B, 4] y) <float[8, 4] w> { h = Relu(x)\n y = MatMul(h, w) }"


class Linear(Pattern):
    x: Value = val("... K")
    w: Const = const("K N")
    y = op.MatMul(x, w)


def run(r: Rule[Any, Any], tmp_path: Path, proto: onnx.ModelProto | None = None) -> Rewriter:
    onnx.save(proto or model(TEXT), tmp_path / "model.onnx")
    m = Model.load(tmp_path / "model.onnx")
    rewriter = Rewriter(m, m.graph)
    rewriter.run([r], None)
    return rewriter


class TestPatterns:
    """Patterns that cannot be meant are refused where they are defined."""

    def test_no_y(self) -> None:
        with pytest.raises(PatternError, match=HERE + "pattern Bad has no `y`"):

            class Bad(Pattern):
                x: Value = val()

    def test_unused_expression(self) -> None:
        with pytest.raises(PatternError, match=HERE + "expression 'square' of Bad is not part of `y`"):

            class Bad(Pattern):
                x: Value = val()
                square = x * x
                y = op.Sqrt(x)

    @pytest.mark.parametrize("fan", [uses, every, others])
    def test_uses_of_a_value_that_is_not_in_y(self, fan: Any) -> None:
        with pytest.raises(PatternError, match=HERE + "'heads' of Bad is of a value that is not part of `y`"):

            class Bad(Pattern):
                x: Value = val()
                y = op.Relu(x)
                heads: list[Linear] = fan(op.Relu(x))

    def test_uses_without_an_element(self) -> None:
        with pytest.raises(PatternError, match=HERE + r"annotate Bad.heads as list\[SomePattern\]"):

            class Bad(Pattern):
                x: Value = val()
                y = op.Relu(x)
                heads: list[int] = uses(y)

    def test_uses_of_what_is_defined_further_down(self) -> None:
        with pytest.raises(PatternError, match=HERE + "Bad.heads: name 'Later' is not defined; define it above"):

            class Bad(Pattern):
                x: Value = val()
                y = op.Relu(x)
                heads: list[Later] = uses(y)  # type: ignore[name-defined] # noqa: F821

    def test_an_alternative_that_is_never_tried(self) -> None:
        with pytest.raises(PatternError, match=HERE + r"alternative 1 of .* is any value, so those behind it"):

            class Bad(Pattern):
                x: Value = val()
                y = op.Sqrt(x | op.Exp(val()))

    def test_an_alternative_that_another_use_may_refuse_is_fine(self) -> None:
        class Good(Pattern):
            x: Value = val()
            y = op.Sqrt(x | op.Exp(x)) * x

        assert Good.largest == 3

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda x: op.MatMull(x, x), "ONNX has no operator 'MatMull'; did you mean MatMul?"),
            (lambda x: op.Zzz(x), "ONNX has no operator 'Zzz' "),
            (lambda x: op.Relu("x"), "a pattern is built from captures, ops and numbers, not from 'x'"),
            (lambda x: op.Add(x, None), "not from None"),
            (
                lambda x: op.LayerNormalization(x, attr()),
                "attr.. captures an attribute; pass it to LayerNormalization by",
            ),
            (
                lambda x: op.LayerNormalization(x, epsilon=scalar()),
                "LayerNormalization's epsilon wants attr.. or the value",
            ),
            (lambda x: op.ReduceMean(x, axes=x), "ReduceMean's axes wants attr.. or the value it must have"),
            (lambda x: x + 1 or x, "a pattern has no truth value; write alternatives with |, not `or`"),
            (lambda x: val("K ..."), "'...' may only lead a shape, got 'K ...'"),
        ],
    )
    def test_expressions(self, build: Any, message: str) -> None:
        with pytest.raises(PatternError, match=HERE + ".*" + message):
            build(val())

    def test_other_domains_may_have_any_operator(self) -> None:
        assert Domain("com.microsoft").Whatever(val()).type == "Whatever"
        assert Domain("").SimplifiedLayerNormalization(val()).domain == ""
        assert ir.Anything(val()).type == "Anything"


def returns(result: Any) -> Rule[Any, Any]:
    @rule
    def subject(m: Linear, new: Emit, cfg: object) -> Any:
        return result(m, new)

    return subject


class TestResults:
    """What a rule returns must take the place of what it matched."""

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (lambda m, new: None, "subject returned None; return the value that replaces `y`, or a dict"),
            (lambda m, new: {}, "subject returned an empty dict; .* or decline with need"),
            (lambda m, new: {"y": m.x}, "subject returned a dict with the key 'y'; return"),
            (lambda m, new: {m.y: None}, "subject returned None for 'y'"),
            (lambda m, new: (m.x, m.x), "subject returned .* return the value"),
            (lambda m, new: new.QuantizePerToken(m.x), "subject returned .* return the value"),
            (lambda m, new: m.x, r"replaces 'y' of shape \['B', 4\] with a value of shape \['B', 8\]"),
            (
                lambda m, new: new.onnx("Cast", m.y, dtype=np.dtype(np.float16), to=10),
                "replaces 'y', which is float32, with a value that is float16",
            ),
            (lambda m, new: {m.w: m.x}, "returned a dict with the key 'w' float32"),
            (lambda m, new: {m.x.inputs[0].inputs[0]: m.x}, "replaces 'x', which no node of this graph computes"),
        ],
    )
    def test_results(self, result: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(PatternError, match=HERE + ".*" + message):
            run(returns(result), tmp_path)

    def test_an_output_may_not_be_left_behind(self, tmp_path: Path) -> None:
        class First(Pattern):
            x: Value = val()
            y = op.TopK(x, val())

        @rule
        def half(m: First, new: Emit, cfg: object) -> Value:
            return new.onnx("Relu", m.x)

        proto = model(
            HEAD + "g (float[B, 8] x) => (float[B, 3] v, int64[B, 3] i) <int64[1] k = {3}> { v, i = TopK(x, k) }"
        )
        rewriter = run(half, tmp_path, proto)  # that would be a leak, so it is no match
        assert [n.op for n in rewriter.edit.graph.nodes] == ["TopK"]
        assert "'i' is also used by a graph output" in str(rewriter.outcome.misses[0])


class TestEmitting:
    @pytest.mark.parametrize(
        ("emit", "message"),
        [
            (lambda m, new: new.SmoothQuantGemm(m.x, m.w.array), "SmoothQuantGemm needs its input 'scale_a'"),
            (lambda m, new: new.QuantizePerToken(m.x, foo=1), "QuantizePerToken has no attribute 'foo'; it has"),
            (lambda m, new: new.QuantizePerToken(m.x, 1, 2, 3), "QuantizePerToken takes 2 inputs, got 4"),
            (lambda m, new: new.QuantizePerToken(m.x, x=m.x), "QuantizePerToken got 'x' by position and by name"),
            (lambda m, new: new.QuantizePerToken(m.x, outputs="q zz"), "QuantizePerToken has no output 'zz'"),
            (
                lambda m, new: new.WeightOnlyQuantMatmul(m.x, m.w.array, np.ones(4, np.float32), weight_type_id=1),
                "WeightOnlyQuantMatmul: weight is float32, wants int8",
            ),
            (
                lambda m, new: new.WeightOnlyQuantMatmul(
                    m.x, np.ones((4, 7), np.int8), np.ones(4, np.float32), weight_type_id=1
                ),
                "WeightOnlyQuantMatmul: weight ",
            ),
            (
                lambda m, new: new.WeightOnlyQuantMatmul(
                    new.onnx("Loose", m.x), np.ones((4, 8), np.int8), np.ones(4, np.float32), weight_type_id=1
                ),
                "WeightOnlyQuantMatmul: x is '', whose dtype is not known; decline such a match",
            ),
        ],
    )
    def test_an_op_refuses(self, emit: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(PatternError, match=HERE + message):
            run(returns(emit), tmp_path)

    def test_what_nothing_needs_is_left_out(self, tmp_path: Path) -> None:
        @rule
        def wasteful(m: Linear, new: Emit, cfg: object) -> Value:
            new.onnx("Exp", m.x)
            return new.onnx("Gemm", m.x, m.w)

        assert [n.op for n in run(wasteful, tmp_path).edit.graph.nodes] == ["Relu", "Gemm"]


class TestRaising:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (lambda m, new: dict[str, str]()["gone"], "subject raised KeyError: 'gone'"),
            (
                lambda m, new: new.NoSuchOp(m.x),
                "subject raised AttributeError: qpass has no op 'NoSuchOp'; it has ActivationQuantization",
            ),
            (lambda m, new: m.ww, "subject raised AttributeError: 'Linear' object has no attribute 'ww'"),
            (lambda m, new: 1 / 0, "subject raised ZeroDivisionError"),
        ],
    )
    def test_a_mistake_in_a_rule(self, body: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(PatternError, match=HERE + message):
            run(returns(body), tmp_path)

    def test_the_line_is_that_of_the_mistake(self, tmp_path: Path) -> None:
        @rule
        def broken(m: Linear, new: Emit, cfg: object) -> Value:
            """Fails two lines further down."""
            k = m.w.shape[0]
            return new.onnx("Relu", m.x if k else None, k // 0)

        with pytest.raises(PatternError) as error:
            run(broken, tmp_path)
        first = broken.fn.__code__.co_firstlineno
        assert str(error.value).startswith(f"test_authors.py:{first + 4}: broken raised ZeroDivisionError")
        assert isinstance(error.value.__cause__, ZeroDivisionError)

    def test_the_graph_is_as_before(self, tmp_path: Path) -> None:
        onnx.save(model(TEXT), tmp_path / "model.onnx")
        m = Model.load(tmp_path / "model.onnx")
        rewriter = Rewriter(m, m.graph)
        with pytest.raises(PatternError):
            rewriter.run([returns(lambda m, new: new.onnx("Relu", m.zz))], None)
        assert [n.op for n in m.graph.nodes] == ["Relu", "MatMul"]


class TestRuleFiles:
    """`--rules FILE` on the way a user takes."""

    def test_a_broken_rule_is_the_users_mistake(self, tmp_path: Path) -> None:
        from qpass.pipeline import load_rules, rewrite

        (tmp_path / "mine.py").write_text(
            "from qpass import Const, Emit, Pattern, Value, const, ir, rule, val\n"
            "\n"
            "class P(Pattern):\n"
            "    x: Value = val()\n"
            "    w: Const = const()\n"
            "    y = ir.Linear(x, w)\n"
            "\n"
            "@rule\n"
            "def mine(m: P, new: Emit, cfg: object) -> Value:\n"
            "    return new.SmoothQuantGemm(m.x, m.w)\n"
        )
        onnx.save(model(TEXT), tmp_path / "model.onnx")
        with pytest.raises(PatternError, match=r"^mine\.py:10: SmoothQuantGemm needs its input 'scale_a'"):
            rewrite(tmp_path / "model.onnx", rules=load_rules(tmp_path / "mine.py"))
        assert not (tmp_path / "model.qpass.onnx").exists()


GOOD = '''
from qpass import Const, Emit, Pattern, Quantizer, Value, const, ir, need, rule, scalar, uses, val


class Linear(Pattern):
    x: Value = val("... K")
    w: Const = const("K N")
    b: Const | None = const("N")
    y = ir.Linear(x, w, b) | ir.Linear(x, w)


class Scaled(Pattern):
    x: Value = val("... K")
    factor: float = scalar()
    y = ir.Linear(x, const()) * factor
    heads: list[Linear] = uses(y)


@rule
def mine(m: Linear, new: Emit, cfg: Quantizer) -> Value:
    """A rule as one writes it."""
    need(m.b is not None and m.w.shape[0] > 1, "no bias")
    q = cfg.int8(m.w)
    return new.WeightOnlyQuantMatmul(m.x, q.weight, q.scale, bias=m.b, weight_type_id=1)


@rule
def several(m: Scaled, new: Emit, cfg: Quantizer) -> dict[Value, Value]:
    doubled = 2 * m.factor
    return {h.y: new.onnx("Mul", h.x, doubled) for h in m.heads}
'''


@pytest.mark.slow
def test_mypy_knows_the_captures(tmp_path: Path) -> None:
    from mypy import api

    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(
        GOOD.replace("cfg.int8(m.w)", "cfg.int8(m.weight)").replace("m.factor", "m.factor.shape")
    )
    said, _, _ = api.run(
        ["--strict", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "good.py"), str(tmp_path / "bad.py")]
    )
    errors = [line for line in said.splitlines() if ": error: " in line and str(tmp_path) in line]
    assert [e.rpartition("/")[2] for e in errors] == [
        'bad.py:23: error: "Linear" has no attribute "weight"  [attr-defined]',
        'bad.py:29: error: "float" has no attribute "shape"  [attr-defined]',
    ]
