"""What the tests of the language share: a pattern, and ways to match and apply in a model given as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from qpass.graph import Const, Model, Value
from qpass.rewriter import (
    Outcome,
    Pattern,
    Rewriter,
    Rule,
    View,
    cast,
    const,
    match,
    op,
    others,
    scalar,
    uses,
    val,
)
from qpass.testing import model

HEAD = '<ir_version: 10, opset_import: ["" : 18]>\n'


class Linear(Pattern):
    x: Value = val("... K")
    w: Const = const("K N")
    b: Const | None = const("N")
    mm = op.MatMul(x, w)
    y = mm + b | mm


class Square(Pattern):
    x: Value = val()
    y = op.Mul(x, x)


class Root(Pattern):
    x: Value = val()
    eps: float = scalar(0, 1e-2)
    y = op.Sqrt(cast(x) + eps)


class Fanout(Pattern):
    x: Value = val()
    y = op.Relu(x)
    heads: list[Linear] = uses(y)
    rest: bool = others(y)


def load(proto: onnx.ModelProto, tmp_path: Path) -> Model:
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return Model.load(path)


def find(pattern: type[Pattern], text: str, tmp_path: Path, at: str, **weights: Any) -> tuple[Any, Any]:
    m = load(model(HEAD + text, **weights), tmp_path)
    node = next(n for n in m.graph.nodes if any(v.name == at for v in n.outputs))
    return match(pattern, node, View(m, m.graph))


FAN = """g (float[B, 8] x) => (float[B, 4] p, float[B, 4] q) <float[8, 4] v, float[8, 4] w, float[4] b> {{
    r = Relu(x)
    p = MatMul(r, v)
    t = MatMul(r, w)
    q = Add(t, b)
    {} }}"""
LINEAR = "g (float[B, 8] x) => (float[B, 4] y) <float[8, 4] w, float[4] b> {{ {} }}"


def run(r: Rule[Any, Any], text: str, tmp_path: Path) -> tuple[Model, Outcome]:
    m = load(model(HEAD + text), tmp_path)
    rewriter = Rewriter(m, m.graph)
    rewriter.run([r], None)
    return m, rewriter.outcome
