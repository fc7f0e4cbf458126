"""Which values are the same to a pattern: twins, Casts, constants of more dims or less precision, views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpass.graph import Const, Value
from qpass.rewriter import (
    Pattern,
    View,
    cast,
    const,
    op,
    others,
    uses,
    val,
)
from qpass.testing import model
from tests.rewriter.finding import FAN, HEAD, Fanout, Linear, Root, Square, find, load


class Either(Pattern):
    x: Value = val()
    a = op.Exp(x) | op.Neg(x)
    y = a * a


class Halves(Pattern):
    x: Value = val()
    xf = cast(x)
    y = op.Exp(xf) * xf


class Free(Pattern, free_casts=True):
    x: Value = val()
    y = op.Exp(op.Neg(x)) * x


class TestSameValue:
    def test_an_alternative_used_twice_is_spelt_in_one_way(self, tmp_path: Path) -> None:
        text = "g (float[B] x) => (float[B] y) {{ a = Exp(x)\n b = {}(x)\n y = Mul(a, b) }}"
        m, _ = find(Either, text.format("Exp"), tmp_path, "y")
        assert m is not None
        m, miss = find(Either, text.format("Neg"), tmp_path, "y")
        assert m is None
        assert "must be 'a' again, got 'b' from Neg" in str(miss)

    @pytest.mark.parametrize("other", ["x", "f", "h"])
    def test_a_cast_may_be_on_one_use_alone(self, other: str, tmp_path: Path) -> None:
        text = f"""g (float[B] x) => (float[B] y) {{
            f = Cast<to = 1>(x)
            h = Cast<to = 11>(x)
            b = Cast<to = 1>({other})
            e = Exp(f)
            y = Mul(e, b) }}"""
        m, _ = find(Halves, text, tmp_path, "y")
        assert (m is not None) == (other != "h")  # through float64 and back is two Casts

    def test_random_numbers_are_no_twins(self, tmp_path: Path) -> None:
        text = """g (float[B, 8] x) => (float[B, 8] y) {
            a = RandomNormalLike(x)
            b = RandomNormalLike(x)
            y = Mul(a, b) }"""
        m, _ = find(Square, text, tmp_path, "y")
        assert m is None

    def test_twins_whose_inputs_differ_are_none(self, tmp_path: Path) -> None:
        text = """g (float[B, 8] x) => (float[B, 8] y) <float[8] u, float[8] v> {
            a = Add(x, u)
            b = Add(x, v)
            y = Mul(a, b) }"""
        m, _ = find(Square, text, tmp_path, "y")
        assert m is None

    def test_small_constants_of_equal_values_are_the_same(self, tmp_path: Path) -> None:
        text = """g (float[B, 8] x) => (float[B, 8] y) <float[8] u, float[8] v> {
            a = Add(x, u)
            b = Add(x, v)
            y = Mul(a, b) }"""
        m, _ = find(Square, text, tmp_path, "y", u=np.ones(8), v=np.ones(8))
        assert m is not None


class TestFreeCasts:
    @pytest.mark.parametrize("at", [(), (0,), (1,), (2,), (3,), (0, 1, 2, 3)])
    def test_anywhere(self, at: tuple[int, ...], tmp_path: Path) -> None:
        def cast_at(i: int, v: str) -> tuple[str, str]:
            return (f"{v}_h = Cast<to = 10>({v})\n {v}_c = Cast<to = 1>({v}_h)\n", f"{v}_c") if i in at else ("", v)

        first, x = cast_at(0, "x")
        second, n = cast_at(1, "n")
        third, e = cast_at(2, "e")
        last, y = cast_at(3, "y")
        body = f"{first} n = Neg({x})\n {second} e = Exp({n})\n {third} y = Mul({e}, x)\n {last}"
        text = f"g (float[B] x) => (float[B] {y}) {{ {body} }}"
        m, miss = find(Free, text, tmp_path, y)
        assert m is not None, miss
        assert {n.op for n in m.nodes} - {"Cast"} == {"Neg", "Exp", "Mul"}
        assert m.root.outputs[0].name == y

    def test_casts_to_integers_stay_in_the_way(self, tmp_path: Path) -> None:
        text = """g (float[B] x) => (float[B] y) {
            n = Neg(x)
            i = Cast<to = 7>(n)
            f = Cast<to = 1>(i)
            e = Exp(f)
            y = Mul(e, x) }"""
        m, miss = find(Free, text, tmp_path, "y")
        assert m is None
        assert "wants Neg, got 'f' from Cast" in str(miss)


class Biased(Pattern):
    x: Value = val("... N")
    b: Const = const("N")
    y = op.Relu(x) + b


class TestDimsOfConstants:
    """A constant that the rule sees with fewer dims may not have given the result more of them."""

    @pytest.mark.parametrize(
        ("x", "b", "fits"), [("B, 3, 4", "1, 4", True), ("B, 4", "1, 4", True), ("4", "1, 4", False)]
    )
    def test_leading_ones(self, x: str, b: str, fits: bool, tmp_path: Path) -> None:
        out = x if fits else "1, 4"
        text = f"g (float[{x}] x) => (float[{out}] y) <float[{b}] b> {{ r = Relu(x)\n y = Add(r, b) }}"
        m, miss = find(Biased, text, tmp_path, "y")
        assert (m is not None) == fits
        assert fits or "a constant of Add 'y' has 2 dims, which may be more than its input has" in str(miss)

    def test_a_number_of_many_dims(self, tmp_path: Path) -> None:
        text = "g (float[B] x) => (float[1, B] y) <float[1, 1] e = {0.001}> { t = Add(x, e)\n y = Sqrt(t) }"
        m, _ = find(Root, text, tmp_path, "y")
        assert m is None


class Power(Pattern):
    x: Value = val()
    y = x**0.1


class TestPrecision:
    @pytest.mark.parametrize(
        ("dtype", "value", "fits"), [("float", 0.1, True), ("float", 0.1001, False), ("float16", 0.1, True)]
    )
    def test_numbers_are_as_close_as_their_dtype_allows(
        self, dtype: str, value: float, fits: bool, tmp_path: Path
    ) -> None:
        text = f"g ({dtype}[B] x) => ({dtype}[B] y) <{dtype} p> {{ y = Pow(x, p) }}"
        m, _ = find(Power, text, tmp_path, "y", p=value)
        assert (m is not None) == fits


class Both(Pattern):
    x: Value = val()
    inner = op.Relu(x)
    y = op.Exp(inner) | op.Exp(x)
    heads: list[Linear] = uses(inner)
    rest: bool = others(inner)


class TestViews:
    def test_uses_of_an_absent_part(self, tmp_path: Path) -> None:
        m, _ = find(Both, "g (float[B] x) => (float[B] y) { y = Exp(x) }", tmp_path, "y")
        assert (m.heads, m.rest) == ([], False)

    def test_an_output_within_the_views_is_another_use(self, tmp_path: Path) -> None:
        text = (
            FAN.format("")
            .replace("r = Relu(x)", "s = Relu(x)\n r = Identity(s)")
            .replace("=> (", "=> (float[B, 8] r, ")
        )
        m, _ = find(Fanout, text, tmp_path, "s")
        assert [h.y.name for h in m.heads] == ["p", "q"]
        assert m.rest is True

    @pytest.mark.parametrize(
        ("node", "noop"),
        [
            ("Identity(x)", True),
            ("Cast<to = 1>(x)", True),
            ("Cast<to = 10>(x)", False),
            ("Dropout(x)", True),
            ("Dropout(x, ratio, on)", False),
            ("Dropout(x, ratio, off)", True),
            ("Slice(x, zero, all)", True),
            ("Slice(x, zero, all, zero, one)", True),
            ("Slice(x, zero, one)", False),
            ("Slice(x, zero, eight, one)", False),  # B is not known
            ("Slice(x, one, all)", False),
            ("Expand(x, one)", True),
        ],
    )
    def test_noops(self, node: str, noop: bool, tmp_path: Path) -> None:
        result = "float16[B, 8]" if "10" in node else "float[P, Q]" if "one)" in node and not noop else "float[B, 8]"
        text = f"""g (float[B, 8] x) => ({result} y)
            <float ratio = {{0.5}}, bool on = {{1}}, bool off = {{0}},
             int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] all = {{9223372036854775807}},
             int64[1] eight = {{8}}, int64[1] most = {{-1}}, int64[1] back = {{-1}}> {{ y = {node} }}"""
        m = load(model(HEAD + text), tmp_path)
        assert View(m, m.graph).is_noop(m.graph.nodes[0]) == noop
