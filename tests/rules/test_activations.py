"""Lifting activations: every spelling, with the numbers of the reference, and near-spellings that are none."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qpass.ops.activation_quantization import Activation, activate
from qpass.testing import feeds
from tests.rules.activation_spelling import SLIPS, Spelling, as_text, dtypes, every, relevant, write
from tests.rules.kit import Graph, lifted, outputs

ALL = list(every())


def graph(spellings: Sequence[tuple[Spelling, str]]) -> tuple[onnx.ModelProto, list[str]]:
    """A model of many activations, each of inputs of its own, and the names of their results."""
    g = Graph(18)
    made = []
    for i, (s, slip) in enumerate(spellings):
        before, _ = dtypes(s)
        up_type = TensorProto.FLOAT if s.casts in ("none", "only_out") else TensorProto.FLOAT16
        x, other = (g.input(f"{name}{i}", [2, 8], before) for name in ("x", "o"))
        up = g.input(f"u{i}", [2, 8], up_type)
        made.append(write(g, x, up, s, slip=slip, other=other if slip else ""))
    leaks = [n.output[0] for n in g.nodes if n.output[0].startswith("leak")]
    return g.model(*made, *leaks), made


def batches(spellings: Iterable[tuple[Spelling, str]], size: int = 60) -> list[list[tuple[Spelling, str]]]:
    whole = list(spellings)
    return [whole[i : i + size] for i in range(0, len(whole), size)]


def check(spellings: Sequence[tuple[Spelling, str]]) -> None:
    """All are lifted, as what they are, and compute what the reference says."""
    proto, made = graph(spellings)
    found = {n.outputs[0].name: n for n in lifted(proto)}
    given = feeds(proto)
    for x in given.values():
        x *= 3
    for i, ((s, _), name, got) in enumerate(zip(spellings, made, outputs(proto, given), strict=True)):
        assert name in found, as_text(s)
        node = found[name]
        assert (node.op, node.attrs["kind"]) == ("Activation" if s.gate == "none" else "GatedActivation", s.kind)
        assert [v.name for v in node.inputs] == [f"x{i}", *([f"u{i}"] if s.gate != "none" else [])], as_text(s)
        want = activate(given[f"x{i}"].astype(np.float32), Activation[s.kind.upper()])
        if s.gate != "none":
            want = want * given[f"u{i}"].astype(np.float32)
        slack = 2e-6 if s.casts == "none" else 2e-3 if s.casts != "float16" else 1e-2
        assert np.max(np.abs(got - want)) <= slack * np.max(np.abs(want)), as_text(s)


def test_random_spellings() -> None:
    chosen = random.Random(0).sample(ALL, 1200)
    for batch in batches((s, "") for s in chosen):
        check(batch)


@pytest.mark.slow
def test_all_spellings() -> None:
    for batch in batches((s, "") for s in ALL):
        check(batch)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "quick_gelu"])
def test_constants_rounded_to_bfloat16(kind: str) -> None:
    chosen = [s for s in ALL if s.kind == kind and s.casts == "float16"]
    for s in random.Random(2).sample(chosen, 20):
        g = Graph(18)
        x, up = (g.input(name, [2, 8], TensorProto.BFLOAT16) for name in ("x", "up"))
        made = write(g, x, up, replace(s, casts="bfloat16"))
        assert [n.outputs[0].name for n in lifted(g.model(made))] == [made], as_text(s)


def test_constants_that_were_float16() -> None:
    """A constant is as exact as the least exact dtype that it has had."""
    for stored, found in ((np.float16, 1), (np.float32, 0)):
        g = Graph(18)
        x = g.input("x", [2, 8])
        slope = g.op("Cast", g.const(np.float16(1.702), stored), to=TensorProto.FLOAT)
        g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, slope)), out="y")
        assert len(lifted(g.model("y"))) == found


def test_near_spellings() -> None:
    """None is lifted: a part of it may be, such as the ReLU in a cube of it."""
    pairs = [(s, slip) for s in ALL for slip in SLIPS[s.kind] if relevant(s, slip)]
    for batch in batches(random.Random(1).sample(pairs, 600)):
        proto, made = graph(batch)
        found = {n.outputs[0].name for n in lifted(proto)}
        assert [as_text(*pair) for pair, name in zip(batch, made, strict=True) if name in found] == []
