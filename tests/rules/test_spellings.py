"""Random spellings of a norm and the Linear that reads it, many in one model: all are found, and compute the same.

The other half of an MLP, its activation, is in test_activations.py, in the same manner.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

from qpass.testing import feeds
from tests.rules.kit import Graph, check_lift, error, lifted, run, spell_linear, spell_norm
from tests.rules.spelling import CHOICES, HALF, SLIPS, Spelling, dtypes, relevant, write

K, N = 8, 12
BATCH = 50
OPSETS = (17, 18, 20, 21, 23)

LINEARS: dict[str, tuple[str, ...]] = {
    "form": ("matmul", "flat_matmul", "gemm", "gemm_transposed", "gemm_scaled"),
    "bias": ("none", "right", "left", "lead", "gemm"),
    "weight": ("plain", "identity", "transposed", "cast", "reshaped", "node", "squeezed", "shared"),
    "unfold": ("constant", "minus_one", "shape"),
}
"""Part of a Linear → the ways to write it."""

LINEAR_SLIPS = ("row_bias", "subtracted", "computed", "transposed_input", "scaled_after")
"""Ways to miss being a Linear, or to be one without what stands beside it."""

STILL_NORMS = {"subtracted_bias", "number_weight", "two_plus", "other_mean", "mean_axis", "reversed_difference"}
"""Slips that may leave a norm: without the weight or bias that is none, or the RMSNorm of another difference."""


@dataclass(frozen=True)
class LinearSpelling:
    """One way to write x [4, 5, K] · W [K, N] + b [N]."""

    form: str = "matmul"
    bias: str = "none"
    weight: str = "plain"
    unfold: str = "constant"


def pick(r: random.Random, table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {part: r.choice(ways) for part, ways in table.items()}


def weight(g: Graph, how: str, dtype: Any, transposed: bool, shared: dict[Any, str]) -> str:
    """W [K, N] (or [N, K]) behind nodes that only move or convert it."""
    values = g.random.standard_normal((N, K) if transposed else (K, N)) / K**0.5
    match how:
        case "identity":
            return g.op("Identity", g.op("Identity", g.const(values, dtype)))
        case "transposed":
            return g.op("Transpose", g.const(values.T, dtype), perm=[1, 0])
        case "cast":
            stored = np.float16 if dtype == np.float32 else np.float32
            return g.op("Cast", g.const(values, stored), to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        case "reshaped":
            return g.op("Reshape", g.const(values.reshape(2, -1), dtype), g.const(values.shape, np.int64))
        case "node":
            return g.op("Constant", value=onnx.numpy_helper.from_array(values.astype(dtype)))
        case "squeezed":
            return g.op("Squeeze", g.const(values[None], dtype), g.const([0], np.int64))
        case "shared":
            return shared.setdefault((dtype, transposed), g.const(values, dtype))
    return g.const(values, dtype)


def linear(g: Graph, x: str, s: LinearSpelling, dtype: Any, shared: dict[Any, str], slip: str = "") -> str:
    """Write the Linear of x [4, 5, K] into the graph."""
    flat = s.form != "matmul" or slip == "transposed_input"
    x = g.op("Reshape", x, g.const([-1, K], np.int64)) if flat else x
    w = weight(g, s.weight, dtype, s.form == "gemm_transposed", shared)
    bias = g.gain(N, dtype)
    if slip == "row_bias":
        bias = g.weight(20 if flat else 5, N, dtype=dtype)
    elif s.bias == "lead":
        bias = g.op("Unsqueeze", bias, g.const([0], np.int64))
    if slip == "computed":
        w = g.op("Tanh", w)
    if s.form.startswith("gemm"):
        more = [bias] if s.bias == "gemm" else []
        options: dict[str, Any] = {"alpha": 0.5, "beta": 2.0} if s.form == "gemm_scaled" else {}
        if slip == "transposed_input":
            x = g.op("Transpose", x, perm=[1, 0])
        options |= {"transA": int(slip == "transposed_input"), "transB": int(s.form == "gemm_transposed")}
        y = g.op("Gemm", x, w, *more, **options)
    else:
        y = g.op("MatMul", x, w)
    if slip == "scaled_after":
        y = g.op("Mul", y, g.const(3, dtype))
    if s.bias in ("right", "left", "lead"):
        op = "Sub" if slip == "subtracted" else "Add"
        y = g.op(op, bias, y) if s.bias == "left" else g.op(op, y, bias)
    if not flat:
        return y
    match s.unfold:
        case "minus_one":
            target = g.const([4, -1, N], np.int64)
        case "shape":
            lead = g.op("Slice", g.op("Shape", "x32"), g.const([0], np.int64), g.const([2], np.int64))
            target = g.op("Concat", lead, g.const([N], np.int64), axis=0)
        case _:
            target = g.const([4, 5, N], np.int64)
    return g.op("Reshape", y, target)


def inputs(g: Graph) -> None:
    g.input("x32", [4, 5, K])
    g.input("x16", [4, 5, K], HALF)


def block(g: Graph, norm: Spelling, s: LinearSpelling, shared: dict[Any, str], slip: str = "", how: str = "") -> None:
    """A norm of an input, and the Linear behind it; `slip` is the norm's, `how` the Linear's."""
    before, after = dtypes(norm)
    x, z = ("x16", "z16") if before == HALF else ("x32", "z32")
    h = write(g, x, norm, k=K, slip=slip, other=z if slip else "")
    g.op("Identity", linear(g, h, s, np.float16 if after == HALF else np.float32, shared, how))


def ends(g: Graph) -> list[str]:
    used = {i for n in g.nodes for i in n.input}
    return [o for n in g.nodes for o in n.output if o not in used]


def slack(norms: list[Spelling]) -> float:
    return 2e-6 if all(s.casts == "none" for s in norms) else 4e-3


def batch(seed: int) -> None:
    """BATCH blocks, those without float16 in a model of their own, where they must be exact."""
    r = random.Random(seed)
    norms = [Spelling(**pick(r, CHOICES)) for _ in range(BATCH)]
    linears = [LinearSpelling(**pick(r, LINEARS)) for _ in range(BATCH)]
    for exact in (True, False):
        some = [(a, b) for a, b in zip(norms, linears, strict=True) if (a.casts == "none") == exact]
        if not some:
            continue
        g, shared = Graph(r.choice(OPSETS), seed), dict[Any, str]()
        inputs(g)
        for a, b in some:
            block(g, a, b, shared)
        proto = g.model(*ends(g))
        check_lift(proto, norms=len(some), linears=len(some), rtol=slack([a for a, _ in some]))


@pytest.mark.parametrize("seed", range(20))
def test_random_spellings(seed: int) -> None:
    """20 × 50 of the combinations."""
    batch(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_more(seed: int) -> None:
    batch(seed)


@pytest.mark.parametrize("seed", range(12))
def test_random_near_spellings(seed: int) -> None:
    """12 × 40 slips: none is lifted as what it is not, so that spelling everything out again changes no number."""
    r = random.Random(seed)
    g, shared = Graph(r.choice(OPSETS), seed), dict[Any, str]()
    inputs(g)
    g.input("z32", [4, 5, K])
    g.input("z16", [4, 5, K], HALF)
    wrong = still = 0
    for _ in range(40):
        norm, s = Spelling(**pick(r, CHOICES)), LinearSpelling(**pick(r, LINEARS))
        slip = r.choice(SLIPS)
        if slip in ("keepdims", "row_weight", "full_weight") or not relevant(norm, slip):
            slip = ""  # those change shapes; they have tests of their own
        how = r.choice(LINEAR_SLIPS) if not slip else ""
        if norm.casts != "none" or (how == "row_bias" and s.bias in ("gemm", "lead", "none")):
            norm, how = Spelling(**pick(r, CHOICES | {"casts": ("none",)})), ""
            slip = slip if relevant(norm, slip or "cube") else ""
        wrong, still = wrong + bool(slip), still + (slip in STILL_NORMS)
        block(g, norm, s, shared, slip, how)
    proto = g.model(*ends(g))
    done, result = run(proto, rules=[spell_norm, spell_linear], only_rules=True)
    assert error(proto, result, feeds(proto)) <= 2e-6
    assert 40 - wrong <= done.outcome.stats["spell_norm"].hits <= 40 - wrong + still


def test_slips_of_a_linear_stay_what_they_are() -> None:
    """Each alone: what is lifted of it is the product at most, never what stands beside it."""
    kinds = {"row_bias": 1, "subtracted": 1, "computed": 0, "scaled_after": 1, "transposed_input": 0}
    for how, linears in kinds.items():
        for form in ("matmul", "flat_matmul", "gemm", "gemm_transposed"):
            if how == "transposed_input" and not form.startswith("gemm"):
                continue
            g = Graph(18)
            inputs(g)
            linear(g, "x32", LinearSpelling(form, "right"), np.float32, {}, how)
            proto = g.model(*ends(g))
            found = [n for n in lifted(proto) if n.op == "Linear"]
            assert len(found) == linears, (how, form)
            assert all(len(n.inputs) == 2 for n in found), "without the bias"
            check_lift(proto, linears=linears)
