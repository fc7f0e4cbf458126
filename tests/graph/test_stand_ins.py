"""Shapes and types behind ONNX Runtime's own operators."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from qpass.graph.importing import infer_shapes

F16, I32 = TensorProto.FLOAT16, TensorProto.INT32
X = ("x", F16, ["B", "S", 8])
Y = ("y", F16, ["B", "S", 8])


def inferred(node: onnx.NodeProto, inputs: list[Any], weights: dict[str, list[int]], opset: int) -> dict[str, Any]:
    """Output → (type, dims) behind a node; symbols that onnx made up are None."""
    initializers = [
        onnx.TensorProto(name=n, dims=d, data_type=F16, data_location=TensorProto.EXTERNAL) for n, d in weights.items()
    ]
    graph = helper.make_graph(
        [node, *(helper.make_node("Identity", [o], [f"{o}.out"]) for o in node.output if o)],
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [onnx.ValueInfoProto(name=f"{o}.out") for o in node.output if o],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)], ir_version=8
    )
    result = infer_shapes(model)
    assert [n.op_type for n in result.graph.node] == [n.op_type for n in graph.node]
    found = {}
    for info in result.graph.output:
        t = info.type.tensor_type
        dims = [d.dim_value or (d.dim_param if not d.dim_param.startswith("unk") else None) for d in t.shape.dim]
        found[info.name.removesuffix(".out")] = (t.elem_type, dims)
    return found


@pytest.mark.parametrize("opset", [14, 18, 23])
@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "attributes", "weights", "expected"),
    [
        ("SkipLayerNormalization", "x y g", "a   s", {}, {"g": [8]}, {"a": ["B", "S", 8], "s": ["B", "S", 8]}),
        ("BiasGelu", "x g", "a", {}, {"g": [8]}, {"a": ["B", "S", 8]}),
        ("QuickGelu", "x", "a", {}, {}, {"a": ["B", "S", 8]}),
        ("FusedMatMul", "x w", "a", {}, {"w": [8, 5]}, {"a": ["B", "S", 5]}),
        ("FusedMatMul", "x w", "a", {"transB": 1}, {"w": [5, 8]}, {"a": ["B", "S", 5]}),
        ("FusedMatMul", "x y", "a", {"transB": 1}, {}, {"a": ["B", "S", "S"]}),
        ("FusedMatMul", "x y", "a", {"transA": 1}, {}, {"a": ["B", 8, 8]}),
        ("FusedGemm", "m w", "a", {"transB": 1}, {"w": [5, 8]}, {"a": ["M", 5]}),
        ("Attention", "x w", "a", {}, {"w": [8, 24]}, {"a": ["B", "S", 8]}),
        ("Attention", "x w", "a", {"qkv_hidden_sizes": [8, 8, 4]}, {"w": [8, 20]}, {"a": ["B", "S", 4]}),
        ("MultiHeadAttention", "x y z", "a", {}, {}, {"a": ["B", "S", 4]}),
        ("GroupQueryAttention", "x z z", "a", {}, {}, {"a": ["B", "S", 8]}),
        ("MatMulNBits", "x w", "a", {"K": 8, "N": 5}, {"w": [5, 1]}, {"a": ["B", "S", 5]}),
    ],
)
def test_shapes(
    op: str, inputs: str, outputs: str, attributes: dict[str, Any], weights: dict[str, Any], expected: Any, opset: int
) -> None:
    given = [X, Y, ("z", F16, ["B", "T", 4]), ("m", F16, ["M", 8])]
    node = helper.make_node(op, inputs.split(), outputs.split(" "), domain="com.microsoft", **attributes)
    used = [i for i in given if i[0] in inputs.split()]
    assert inferred(node, used, weights, opset) == {k: (F16, v) for k, v in expected.items()}


def test_an_embedding() -> None:
    node = helper.make_node(
        "EmbedLayerNormalization", ["i", "", "w", "p", "", "g", "g"], ["a", "count", "s"], domain="com.microsoft"
    )
    found = inferred(node, [("i", I32, ["B", "S"])], {"w": [9, 8], "p": [7, 8], "g": [8]}, 17)
    assert found == {"a": (F16, ["B", "S", 8]), "count": (I32, ["B"]), "s": (F16, ["B", "S", 8])}


@pytest.mark.parametrize("op", ["LayerNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize("opset", [13, 18])
def test_norms_in_the_standard_domain(op: str, opset: int) -> None:
    assert inferred(helper.make_node(op, ["x", "g"], ["a"], axis=-1), [X], {"g": [8]}, opset) == {
        "a": (F16, ["B", "S", 8])
    }


def test_what_is_not_known() -> None:
    node = helper.make_node("MultiHeadAttention", ["x"], ["a"], domain="com.microsoft")
    assert inferred(node, [X], {}, 17) == {"a": (0, [])}
