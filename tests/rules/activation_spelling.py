"""Activations in every spelling that the tests know: a `Spelling` says which, `write` writes it into a graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from tests.rules.kit import Graph

HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT
ROOT = math.sqrt(2 / math.pi)
CUBIC = 0.044715

COMMON: dict[str, tuple[str, ...]] = {
    "gate": ("none", "right", "left"),
    "side": ("right", "left"),
    "casts": ("none", "float16", "around", "before_gate", "only_out"),
}
HALVES = ("x_first", "last", "inner", "affine", "x_by_two", "last_by_two")
SIGMOIDS = ("node", "one_over", "reciprocal", "x_over")
OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "gelu": {"half": HALVES, "inner": ("div", "mul", "div_sqrt", "erfc", "erfc_outer")},
    "gelu_tanh": {
        "half": (*HALVES, "sigmoid", "sigmoid_folded"),
        "cube": ("pow", "mul", "square", "part_first", "in_turn", "late"),
        "inner": ("sum", "rising", "rising_scaled", "expanded", "folded"),
    },
    "silu": {"sigmoid": SIGMOIDS},
    "quick_gelu": {"sigmoid": SIGMOIDS},
    "relu": {"sigmoid": ("node", "max", "clip")},
    "relu2": {"sigmoid": ("node", "max", "clip"), "cube": ("mul", "pow")},
    "sigmoid": {"sigmoid": SIGMOIDS},
}
"""Kind → field → the ways to write it, the plainest first; a field that is not there says nothing."""


@dataclass(frozen=True)
class Spelling:
    """One way to write an activation, and its product with `up`."""

    kind: str
    gate: str = "none"
    side: str = "right"
    """Of constants in sums and products."""
    casts: str = "none"
    """Where float16 meets float32: nowhere, float16 throughout, around all of it, before the gate, behind it all. And
    bfloat16 throughout, which ONNX Runtime does not run."""
    half: str = "x_first"
    inner: str = ""
    cube: str = ""
    sigmoid: str = "node"


def every() -> Iterator[Spelling]:
    """All spellings, none twice."""
    for kind, own in OWN.items():
        table = COMMON | own
        for ways in itertools.product(*table.values()):
            s = Spelling(kind, **dict(zip(table, ways, strict=True)))
            if kind == "sigmoid" and (s.gate == "none" or s.casts == "before_gate"):
                continue  # a sigmoid alone is no activation of an MLP
            if s.casts == "before_gate" and s.gate == "none":
                continue
            if s.inner in ("rising", "rising_scaled", "folded") and s.cube not in ("pow", "mul"):
                continue  # those have a square, and no cube
            if s.inner == "expanded" and s.cube not in ("pow", "mul", "square"):
                continue
            if s.half == "sigmoid_folded" and s.inner not in ("sum", "rising"):
                continue
            yield s


SLIPS: dict[str, tuple[str, ...]] = {
    "gelu": ("constant", "half", "one", "other", "minus", "leak", "other_function"),
    "gelu_tanh": ("constant", "half", "one", "other", "minus", "leak", "other_function", "cubic", "other_inside"),
    "silu": ("constant", "leak", "other_function"),
    "quick_gelu": ("constant", "leak", "other_function"),
    "relu": ("constant", "other_function"),
    "relu2": ("exponent", "leak"),
    "sigmoid": ("other_function",),
}
"""Kind → ways to miss being it."""


def relevant(s: Spelling, slip: str) -> bool:
    """Whether a slip changes this spelling at all."""
    if slip in ("half", "one", "minus"):
        return not s.half.startswith("sigmoid") and not (slip == "minus" and s.inner.startswith("erfc"))
    if slip == "other":
        return not s.half.startswith("sigmoid")  # a GLU
    if slip == "leak" and s.kind in ("silu", "quick_gelu"):
        return True
    if slip == "constant":
        return not (s.kind == "relu" and s.sigmoid == "node")
    if slip == "exponent":
        return s.cube == "pow"
    if slip == "other_function":
        return s.sigmoid == "node"
    if slip == "other_inside":
        return s.inner in ("sum", "rising")
    return True


def write(g: Graph, x: str, up: str, s: Spelling, *, slip: str = "", other: str = "") -> str:
    """Write the activation of `x` into the graph, times `up` where it is gated; returns its result.

    `x`, `up` and `other`, a second value like x for slips, are float16 for casts other than none and only_out.
    """
    if s.casts in ("around", "before_gate"):
        x = g.op("Cast", x, to=FULL)
        other = g.op("Cast", other, to=FULL) if other else ""
        up = g.op("Cast", up, to=FULL) if up and s.casts == "around" else up
    writer = _Writer(g, s, slip, x, other or x)
    y = writer.activation()
    if slip == "leak":
        g.op("Tanh", writer.inside, out=g.fresh("leak"))
    if s.casts == "before_gate":
        y = g.op("Cast", y, to=HALF)
    if s.gate != "none":
        y = g.op("Mul", y, up) if s.gate == "right" else g.op("Mul", up, y)
    return g.op("Cast", y, to=HALF) if s.casts in ("around", "only_out") else y


@dataclass
class _Writer:
    g: Graph
    s: Spelling
    slip: str
    x: str
    other: str
    inside: str = ""
    """A value that nothing but the activation may need."""

    def const(self, value: float) -> str:
        narrow: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
        return self.g.const(value, narrow.get(self.s.casts, np.float32))

    def times(self, v: str, value: float) -> str:
        return self.product(v, self.const(value))

    def plus(self, v: str, value: float) -> str:
        return self.g.op("Add", *self.turned(v, self.const(value)))

    def product(self, a: str, b: str) -> str:
        return self.g.op("Mul", *self.turned(a, b))

    def turned(self, a: str, b: str) -> tuple[str, str]:
        return (a, b) if self.s.side == "right" else (b, a)

    def activation(self) -> str:
        if self.s.kind in ("gelu", "gelu_tanh"):
            return self.gelu()
        if self.s.kind in ("relu", "relu2"):
            return self.relu()
        return self.swish()

    def gelu(self) -> str:
        g, s, slip = self.g, self.s, self.slip
        erfc = ""
        if s.kind == "gelu":
            t, erfc = self.erf()
        else:
            z = self.inner(2 if s.half.startswith("sigmoid") else 1)
            if s.half.startswith("sigmoid"):
                self.inside = g.op("Tanh" if slip == "other_function" else "Sigmoid", z)
                return self.product(self.other if slip == "other" else self.x, self.inside)
            t = g.op("Sigmoid" if slip == "other_function" else "Tanh", z)
        self.inside = t
        if s.half == "affine" and not erfc and slip not in ("one", "minus"):
            x = self.other if slip == "other" else self.x
            return self.product(x, self.plus(self.times(t, 0.4 if slip == "half" else 0.5), 0.5))
        one = 1.5 if slip == "one" else 1
        return self.halved(erfc or (g.op("Sub", t, self.const(one)) if slip == "minus" else self.plus(t, one)))

    def erf(self) -> tuple[str, str]:
        """erf(x / √2), and 1 + it where that is written as erfc."""
        g, s, x = self.g, self.s, self.x
        root = 1.5 if self.slip == "constant" else math.sqrt(2)
        function = "Tanh" if self.slip == "other_function" else "Erf"
        if s.inner.startswith("erfc"):
            v = self.times(x, -1 / root) if s.inner == "erfc_outer" else g.op("Div", g.op("Neg", x), self.const(root))
            t = g.op(function, v)
            return t, g.op("Sub", self.const(1.5 if self.slip == "one" else 1), t)
        if s.inner == "mul":
            return g.op(function, self.times(x, 1 / root)), ""
        by = self.const(root) if s.inner == "div" else g.op("Sqrt", self.const(root**2))
        return g.op(function, g.op("Div", x, by)), ""

    def inner(self, factor: float) -> str:
        """What the tanh is of, times a factor."""
        g, s, x = self.g, self.s, self.x
        root, cubic = (0.8 if self.slip == "constant" else ROOT), (0.05 if self.slip == "cubic" else CUBIC)
        base = self.other if self.slip == "other_inside" else x
        if s.inner in ("sum", "rising"):
            if s.inner == "sum":
                z = g.op("Add", *self.turned(base, self.cubed(cubic)))
            else:
                z = self.product(base, self.plus(self.times(self.square(), cubic), 1))
            if s.half == "sigmoid_folded":
                return self.times(z, factor * root)
            z = self.times(z, root)
        elif s.inner == "expanded":
            z = g.op("Add", self.times(x, root), self.times(self.cube(), cubic * root))
        elif s.inner == "folded":
            z = self.product(x, self.plus(self.times(self.square(), cubic * root), root))
        else:
            z = self.product(self.times(x, root), self.plus(self.times(self.square(), cubic), 1))
        return z if factor == 1 else self.times(z, factor)

    def square(self) -> str:
        by_pow = self.s.cube in ("pow", "square")
        return self.g.op("Pow", self.x, self.const(2)) if by_pow else self.g.op("Mul", self.x, self.x)

    def cube(self) -> str:
        return self.g.op("Pow", self.x, self.const(3)) if self.s.cube == "pow" else self.product(self.square(), self.x)

    def cubed(self, cubic: float) -> str:
        """0.044715 · x³"""
        x = self.x
        if self.s.cube == "part_first":
            return self.product(self.times(x, cubic), self.g.op("Mul", x, x))
        if self.s.cube == "in_turn":
            return self.product(self.product(self.times(x, cubic), x), x)
        if self.s.cube == "late":
            return self.product(self.times(self.g.op("Mul", x, x), cubic), x)
        return self.times(self.cube(), cubic)

    def halved(self, one_plus: str) -> str:
        """x · (1 + t) / 2."""
        s, slip = self.s, self.slip
        x = self.other if slip == "other" else self.x
        value = 0.4 if slip == "half" else 0.5
        if s.half == "x_first":
            return self.product(self.times(x, value), one_plus)
        if s.half == "last":
            return self.times(self.product(x, one_plus), value)
        if s.half in ("inner", "affine"):
            return self.product(x, self.times(one_plus, value))
        by = self.const(1 / value)
        if s.half == "x_by_two":
            return self.product(self.g.op("Div", x, by), one_plus)
        return self.g.op("Div", self.product(x, one_plus), by)

    def relu(self) -> str:
        g, s, x = self.g, self.s, self.x
        low = 0.5 if self.slip == "constant" else 0
        if s.sigmoid == "node":
            r = g.op("Softplus" if self.slip == "other_function" else "Relu", x)
        elif s.sigmoid == "max":
            r = g.op("Max", *self.turned(x, self.const(low)))
        else:
            r = g.op("Clip", x, self.const(low))
        self.inside = r
        if s.kind == "relu":
            return r
        return g.op("Mul", r, r) if s.cube == "mul" else g.op("Pow", r, self.const(3 if self.slip == "exponent" else 2))

    def swish(self) -> str:
        g, s, x = self.g, self.s, self.x
        slope = 1.6 if self.slip == "constant" else 1.702 if s.kind == "quick_gelu" else 1
        v = x if slope == 1 else self.times(x, slope)
        if s.sigmoid == "node":
            self.inside = g.op("Softplus" if self.slip == "other_function" else "Sigmoid", v)
        else:
            below = self.plus(g.op("Exp", g.op("Neg", v) if s.side == "right" else self.times(v, -1)), 1)
            if s.sigmoid == "x_over" and s.kind != "sigmoid":
                self.inside = below
                return g.op("Div", x, below)
            self.inside = g.op("Reciprocal", below) if s.sigmoid == "reciprocal" else g.op("Div", self.const(1), below)
        return self.inside if s.kind == "sigmoid" else self.product(x, self.inside)


def dtypes(s: Spelling) -> tuple[int, int]:
    """TensorProto types of x and of the result."""
    return (FULL if s.casts in ("none", "only_out") else HALF), (FULL if s.casts == "none" else HALF)


def as_text(s: Spelling, slip: str = "") -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(s).items() if v) + (f" slip={slip}" if slip else "")
