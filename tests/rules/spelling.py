"""Norms in every spelling that the tests know: a `Spelling` says which, `write` writes it into a graph."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.rules.kit import Graph

CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("layer", "rms"),
    "square": ("mul", "pow", "pow_int"),
    "mean": ("reduce", "reduce_last_positive", "sum_over_k"),
    "spread": ("of_difference", "fast", "fast_clipped"),
    "eps_side": ("right", "left"),
    "root": ("sqrt_div", "reciprocal", "one_over", "pow_half", "pow_minus_half"),
    "weight": ("right", "left", "none", "plus_one", "one_plus", "on_root", "on_x"),
    "bias": ("right", "left", "none"),
    "twin": ("shared", "twin"),
    "casts": ("none", "around", "inside", "before_weight", "only_out", "only_in"),
    "lead": ("", "1", "1 1"),
}
"""Field → the ways to write it, the plainest first."""


@dataclass(frozen=True)
class Spelling:
    """One way to write a norm. For an RMSNorm `bias`, `twin` and `spread` say nothing."""

    kind: str = "layer"
    square: str = "mul"
    mean: str = "reduce"
    spread: str = "of_difference"
    eps_side: str = "right"
    root: str = "sqrt_div"
    weight: str = "right"
    bias: str = "right"
    twin: str = "shared"
    casts: str = "none"
    """Where float16 meets float32: around the norm, as torch computes it, only within the mean, before the weight."""
    lead: str = ""
    """Leading dims of 1 of weight and bias."""

    def __post_init__(self) -> None:
        for f in fields(self):
            assert getattr(self, f.name) in CHOICES[f.name], f"{f.name}={getattr(self, f.name)}"


@dataclass
class Slip:
    """What is wrong with a near-spelling; "" for nothing."""

    what: str = ""


SLIPS = (
    "mean_axis",
    "variance_axis",
    "eps_outside",
    "product_of_two",
    "keepdims",
    "other_mean",
    "other_variance",
    "cube",
    "exponent",
    "reversed_difference",
    "reversed_division",
    "subtracted_bias",
    "wrong_count",
    "row_weight",
    "full_weight",
    "number_weight",
    "two_plus",
    "tanh_inside",
)
"""Ways to miss being a norm over the last axis."""

K = 8
HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


def write(g: Graph, x: str, s: Spelling, *, rank: int = 3, slip: str = "", other: str = "", k: int = K) -> str:
    """Write the norm of `x` [.., k] into the graph; `other` is a second value like x, for slips. Returns its result.

    `x` is float16 for casts other than none and only_out; the result is float16 for casts other than none and only_in.
    """

    def cast(v: str, to: int) -> str:
        return g.op("Cast", v, to=to)

    raw = x
    if s.casts in ("around", "inside", "before_weight", "only_in"):
        x = cast(x, FULL)
        other = cast(other, FULL) if other else ""
    last = rank - 1 if s.mean == "reduce_last_positive" else -1

    def mean(v: str, axis: int = last, keepdims: int = 1) -> str:
        if s.mean != "sum_over_k":
            return g.reduce("ReduceMean", v, axis, keepdims)
        total = g.reduce("ReduceSum", v, axis, keepdims)
        return g.op("Div", total, g.const(k + 3 if slip == "wrong_count" else k))

    def squared(v: str) -> str:
        if slip == "product_of_two":
            return g.op("Mul", v, other)
        if slip == "tanh_inside":
            return g.op("Mul", v, g.op("Tanh", v))
        if slip == "cube":
            return g.op("Pow", v, g.const(3))
        if s.square == "mul":
            return g.op("Mul", v, v)
        return g.op("Pow", v, g.const(2, np.int64 if s.square == "pow_int" else np.float32))

    def difference() -> str:
        mu = mean(other if slip == "other_mean" else x, -2 if slip == "mean_axis" else last)
        return g.op("Sub", mu, x) if slip == "reversed_difference" else g.op("Sub", x, mu)

    layer = s.kind == "layer"
    d = difference() if layer else x
    again = difference() if layer and s.twin == "twin" else d
    axis = -2 if slip == "variance_axis" else last
    if layer and s.spread != "of_difference":
        mu = mean(x)
        variance = g.op("Sub", mean(squared(x), axis), g.op("Mul", mu, mu))
        if s.spread == "fast_clipped":
            variance = g.op("Max", variance, g.const(0))
    else:
        inner = other if slip == "other_variance" else again
        variance = mean(squared(inner), axis, 0 if slip == "keepdims" else 1)

    eps = g.const(1e-3)

    def plus(v: str) -> str:
        return g.op("Add", eps, v) if s.eps_side == "left" else g.op("Add", v, eps)

    if slip != "eps_outside":
        variance = plus(variance)

    def deviation() -> str:
        if s.root == "pow_half":
            return g.op("Pow", variance, g.const(0.4 if slip == "exponent" else 0.5))
        root = g.op("Sqrt", variance)
        return plus(root) if slip == "eps_outside" else root

    def inverse() -> str:
        if s.root == "pow_minus_half" or slip == "exponent":
            return g.op("Pow", variance, g.const(-0.4 if slip == "exponent" else -0.5))
        if s.root in ("reciprocal", "pow_half", "sqrt_div"):
            return g.op("Reciprocal", deviation())
        return g.op("Div", g.const(1), deviation())

    late = s.casts in ("inside", "before_weight")
    weight_dtype = np.float16 if late else np.float32
    dims = {"row_weight": (k, 1), "full_weight": (k, k), "number_weight": (1,)}.get(slip, (k,))
    lead = tuple(map(int, s.lead.split()))[: max(0, rank - len(dims))]
    random = 1 + 0.3 * g.random.standard_normal((*lead, *dims))
    gamma = "" if s.weight == "none" else g.const(random, weight_dtype)
    if s.weight in ("plus_one", "one_plus"):
        one = g.const(2 if slip == "two_plus" else 1, weight_dtype)
        gamma = g.op("Add", gamma, one) if s.weight == "plus_one" else g.op("Add", one, gamma)

    if s.casts == "inside":  # only the statistics are in float32
        d = cast(d, HALF) if layer else raw
    if s.weight in ("on_root", "on_x"):
        r = cast(inverse(), HALF) if late else inverse()
        d = cast(d, HALF) if s.casts == "before_weight" else d
        first, then = (r, d) if s.weight == "on_root" else (d, r)
        n = g.op("Mul", then, g.op("Mul", first, gamma))
    else:
        if s.root in ("sqrt_div", "pow_half"):
            root = cast(deviation(), HALF) if s.casts == "inside" else deviation()
            n = g.op("Div", root, d) if slip == "reversed_division" else g.op("Div", d, root)
        else:
            n = g.op("Mul", d, cast(inverse(), HALF) if s.casts == "inside" else inverse())
        if s.casts == "before_weight":
            n = cast(n, HALF)
        if gamma:
            n = g.op("Mul", gamma, n) if s.weight == "left" else g.op("Mul", n, gamma)
    if layer and s.bias != "none":
        beta = g.const(0.3 * g.random.standard_normal((*lead, k)), weight_dtype)
        if slip == "subtracted_bias":
            n = g.op("Sub", n, beta)
        else:
            n = g.op("Add", beta, n) if s.bias == "left" else g.op("Add", n, beta)
    return cast(n, HALF) if s.casts in ("around", "only_out") else n


def dtypes(s: Spelling) -> tuple[int, int]:
    """TensorProto types of x and of the result."""
    before = FULL if s.casts in ("none", "only_out") else HALF
    after = FULL if s.casts in ("none", "only_in") else HALF
    return before, after


def relevant(s: Spelling, slip: str) -> bool:
    """Whether a slip changes this spelling at all."""
    layer, needs = (
        s.kind == "layer",
        {
            "mean_axis": s.spread == "of_difference" and s.kind == "layer",
            "other_mean": s.kind == "layer",
            "other_variance": s.kind == "rms" or s.spread == "of_difference",
            "reversed_difference": s.kind == "layer" and s.spread == "of_difference",
            "keepdims": s.kind == "rms" or s.spread == "of_difference",
            "reversed_division": s.root in ("sqrt_div", "pow_half") and s.weight not in ("on_root", "on_x"),
            "subtracted_bias": s.kind == "layer" and s.bias != "none",
            "wrong_count": s.mean == "sum_over_k",
            "exponent": s.root in ("pow_half", "pow_minus_half"),
            "eps_outside": s.root != "pow_minus_half" and s.root != "pow_half",
            "row_weight": s.weight != "none",
            "full_weight": s.weight != "none",
            "number_weight": s.weight != "none",
            "two_plus": s.weight in ("plus_one", "one_plus"),
        },
    )
    return bool(needs.get(slip, layer or True))


def as_kwargs(s: Spelling) -> dict[str, Any]:
    return {f.name: getattr(s, f.name) for f in fields(s)}
