"""Models written as text, lowered and compared in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from qpass.engine.opset import lower
from qpass.graph.walk import all_nodes
from qpass.testing import feeds, model, outputs


def written(text: str, opset: int = 23, **weights: Any) -> ModelProto:
    """A model of one graph, `(inputs) => (outputs) <weights> { nodes }`."""
    return model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}', **weights)


def check(proto: ModelProto, rtol: float = 0, **dims: int) -> Counter[str]:
    """Lower a model to 17 and run it before and after; returns its operators."""
    given = feeds(proto, **dims)
    wanted = outputs(proto, given)
    ops = lowered(proto)
    for want, got in zip(wanted, outputs(proto, given), strict=True):
        compare(want, got, rtol)
    return ops


def lowered(proto: ModelProto) -> Counter[str]:
    names = [n.name for n in all_nodes(proto.graph.node) if n.name]
    assert lower(proto) is proto
    assert [o.domain for o in proto.opset_import] == [""]
    assert proto.opset_import[0].version <= 17
    assert proto.ir_version <= 8
    assert not proto.functions
    onnx.checker.check_model(proto, full_check=True)
    after = [n.name for n in all_nodes(proto.graph.node) if n.name]
    assert len(set(after)) == len(after)
    gone = [n for n in names if n not in after]
    assert all(any(a.startswith(f"{n}/") for a in after) for n in gone), "a node has gone, or lost its name"
    return Counter(n.op_type for n in all_nodes(proto.graph.node))


def compare(want: np.ndarray[Any, Any], got: np.ndarray[Any, Any], rtol: float) -> None:
    assert (want.dtype, want.shape) == (got.dtype, got.shape)
    if rtol:
        a, b = want.astype(np.float64), got.astype(np.float64)
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(a)
    else:
        np.testing.assert_array_equal(want, got)
