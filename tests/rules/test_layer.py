"""Whole layers in w8a8: what SmoothQuant makes of them, op by op; nothing of norm, residual or activation is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qpass.spec import QuantSpec
from tests import zoo
from tests.rules.activation_spelling import Spelling as Activation
from tests.rules.activation_spelling import write as activate
from tests.rules.kit import Graph, error, ops, run
from tests.rules.spelling import Spelling, write

D, HEADS, SIZE, WIDE = 16, 2, 8, 24
LAYER = [
    "RmsnormQuantization", "SmoothQuantGemm", "SmoothQuantGemm", "SmoothQuantGemm",  # norm, q, k, v
    "QuantizePerToken", "SmoothQuantGemm",  # what attention gives, o
    "RmsnormQuantization", "SmoothQuantGemm", "SmoothQuantGemm",  # residual and norm, gate, up
    "ActivationQuantization", "SmoothQuantGemm",  # activation, down
]  # fmt: skip
MERGED = [LAYER[0], LAYER[1], *LAYER[4:7], LAYER[7], *LAYER[9:]]


def decoder(layers: int) -> onnx.ModelProto:
    """Layers as Llama has them, a final norm and a head."""
    g = Graph()
    x = g.input("x", ["B", "S", D])

    def heads(v: str) -> str:
        return g.op("Transpose", g.op("Reshape", v, g.const([0, 0, HEADS, SIZE], np.int64)), perm=[0, 2, 1, 3])

    for _ in range(layers):
        h = write(g, x, Spelling(kind="rms"), k=D)
        q, k, v = (heads(g.op("MatMul", h, g.weight(D, D))) for _ in "qkv")
        scores = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])))
        mixed = g.op("Transpose", g.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        x = g.op("Add", x, g.op("MatMul", g.op("Reshape", mixed, g.const([0, 0, D], np.int64)), g.weight(D, D)))
        h = write(g, x, Spelling(kind="rms"), k=D)
        gate, up = (g.op("MatMul", h, g.weight(D, WIDE)) for _ in "gu")
        a = activate(g, gate, up, Activation(kind="silu", gate="right"))
        x = g.op("Add", x, g.op("MatMul", a, g.weight(WIDE, D)))
    return g.model(g.op("MatMul", write(g, x, Spelling(kind="rms"), k=D), g.weight(D, 12), out="logits"))


def plugins(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node if n.domain == "qpass"]


def residuals(proto: onnx.ModelProto) -> int:
    return sum(a.i for n in proto.graph.node for a in n.attribute if a.name == "has_residual")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("merge", [False, True])
def test_a_decoder(layers: int, merge: bool) -> None:
    proto = decoder(layers)
    done, result = run(proto, QuantSpec.preset("w8a8", merge_siblings=merge))
    assert plugins(result) == (MERGED if merge else LAYER) * layers + ["RmsnormQuantization", "SmoothQuantGemm"]
    assert residuals(result) == 2 * layers, "every Add but the one that is not there before the first norm"
    assert not {"Add", "Mul", "Sigmoid", "Sqrt", "ReduceMean"}.intersection(ops(result))
    assert ops(result).count("Split") == (2 * layers if merge else 0)
    assert {s.status for s in done.ledger.sites} == {"rewritten"}
    assert error(proto, result) < 0.05


@zoo.each("llama_ts", "llama_dynamo", "qwen2_ts", "mistral_dynamo", "llama_nnrms_dynamo23", "llama_ts_fp16")
def test_of_the_zoo(path: Path) -> None:
    """Two layers by either exporter; what is left of Mul and Add is the rotary embedding's and the mask's."""
    _, result = run(onnx.load(path), "w8a8")
    assert plugins(result) == LAYER * 2 + ["RmsnormQuantization", "SmoothQuantGemm"]
    assert residuals(result) == 4
    assert not {"Sigmoid", "Sqrt", "ReduceMean", "RMSNormalization"}.intersection(ops(result))
