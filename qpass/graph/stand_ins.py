"""Shapes behind ONNX Runtime's own operators: onnx infers none there, nor further on.

For inference, in a copy of the model, every such node gets a function for a body: standard operators that give results
of the same shapes and types, if not the same values. Identity does for an activation, Einsum for a FusedMatMul.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

Body = Iterator[NodeProto]


@dataclass(frozen=True)
class Call:
    """A node to find a body for; in the body its inputs are called i0, i1, … and its outputs o0, o1, …"""

    node: NodeProto
    attrs: Mapping[str, Any]
    opset: int
    initializers: Mapping[str, TensorProto]
    """Those of its graph."""


def stand_in(model: ModelProto) -> None:
    """Give every node of an operator that only ONNX Runtime has a function that tells its shapes; changes the model."""
    made: list[FunctionProto] = []
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    for node, initializers in _nodes(model.graph):
        maker = _MAKERS.get((node.domain, node.op_type))
        if maker is None or (not node.domain and node.op_type == "LayerNormalization" and opset >= 17):
            continue
        inputs = [f"i{k}" for k in range(len(node.input))]
        outputs = [f"o{k}" for k in range(len(node.output))]
        unnamed = {o for o, name in zip(outputs, node.output, strict=True) if not name}
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        body = [n for n in maker(Call(node, attrs, opset, initializers)) if n.output[0] not in unnamed]
        node.overload = f"qpass.{len(made)}"
        made.append(
            helper.make_function(
                node.domain, node.op_type, inputs, outputs, body, model.opset_import, overload=node.overload
            )
        )
    model.functions.extend(made)


def _identity(k: int) -> NodeProto:
    return helper.make_node("Identity", ["i0"], [f"o{k}"])


def _like_first(call: Call) -> Body:
    """The first output is like the first input, and so is the fourth, the sum that a skipping norm gives."""
    yield from (_identity(k) for k in (0, 3) if k < len(call.node.output))


def _grouped_query(call: Call) -> Body:
    """The result is like the query, unless keys and values are packed in one with that."""
    if len(call.node.input) > 2 and all(call.node.input[1:3]):
        yield _identity(0)


def _multi_head(call: Call) -> Body:
    """The query's rows, as wide as the values; where these are [B, N, S, H], or packed, onnx does not tell."""
    if len(call.node.input) > 2 and all(call.node.input[1:3]):
        yield helper.make_node("Einsum", ["i0", "i2"], ["o0"], equation="bqk,bsv->bqv")


def _sum(call: Call) -> Body:
    yield helper.make_node("Add", ["i0", "i1"], ["o0"])


def _product(call: Call) -> Body:
    left, right = call.attrs.get("transA"), call.attrs.get("transB")
    if call.attrs.get("transBatchA") or call.attrs.get("transBatchB"):
        return
    w = call.initializers.get(call.node.input[1])
    if not left and right and w is not None and len(w.dims) == 2:
        yield helper.make_node("Transpose", ["i1"], ["turned"], perm=[1, 0])
        yield helper.make_node("MatMul", ["i0", "turned"], ["o0"])
    elif not left and not right:
        yield helper.make_node("MatMul", ["i0", "i1"], ["o0"])
    else:  # onnx tells the shape where both have the same number of dims
        equation = f"{'...km' if left else '...mk'},{'...nk' if right else '...kn'}->...mn"
        yield helper.make_node("Einsum", ["i0", "i1"], ["o0"], equation=equation)


def _gemm(call: Call) -> Body:
    kept = {k: v for k, v in call.attrs.items() if k.startswith("trans")}
    yield helper.make_node("Gemm", ["i0", "i1"], ["o0"], **kept)


def _embedding(call: Call) -> Body:
    yield helper.make_node("Gather", ["i2", "i0"], ["o0"])
    if len(call.node.output) > 1:
        yield helper.make_node("ArgMax", ["i0"], ["row"], axis=1, keepdims=0)
        yield helper.make_node("Cast", ["row"], ["o1"], to=TensorProto.INT32)
    if len(call.node.output) > 2:
        yield helper.make_node("Gather", ["i2", "i0"], ["o2"])


def _attention(call: Call) -> Body:
    """[B, S, K] and [K, Q + K + V] give [B, S, V]: what Split leaves of the product."""
    yield helper.make_node("MatMul", ["i0", "i1"], ["qkv"])
    sizes = call.attrs.get("qkv_hidden_sizes")
    if sizes:
        yield helper.make_node(
            "Constant", [], ["sizes"], value=helper.make_tensor("sizes", TensorProto.INT64, [3], sizes)
        )
        yield helper.make_node("Split", ["qkv", "sizes"], ["q", "k", "o0"], axis=-1)
    else:
        split = helper.make_node("Split", ["qkv"], ["q", "k", "o0"], axis=-1)
        if call.opset >= 18:
            split.attribute.append(helper.make_attribute("num_outputs", 3))
        yield split


def _quantized(call: Call) -> Body:
    """[..., K] and a packed weight give [..., N]: as many columns of the input as the attribute says."""
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    width = helper.make_tensor("width", TensorProto.INT64, [1], [call.attrs["N"]])
    yield helper.make_node("Constant", [], ["width"], value=width)
    yield helper.make_node("ConstantOfShape", ["width"], ["columns"], value=zero)
    yield helper.make_node("Gather", ["i0", "columns"], ["o0"], axis=-1)


def _quantize(call: Call) -> Body:
    yield helper.make_node("QuantizeLinear", [f"i{k}" for k in range(len(call.node.input))], ["o0"])


def _like_scale(call: Call) -> Body:
    """Shape of the integers, type of the scale."""
    yield helper.make_node("CastLike", ["i0", "i1"], ["o0"])


def _quantized_rows(call: Call) -> Body:
    """Rows of a table; two of its columns stand in a byte where it is packed."""
    table = call.initializers.get(call.node.input[0])
    if table is None or call.attrs.get("gather_axis", 0) != 0:
        return
    packed = table.data_type == TensorProto.UINT8 and call.attrs.get("bits", 4) == 4
    yield helper.make_node("Gather", ["i0", "i1"], ["rows"])
    yield helper.make_node("Concat", ["rows", "rows"] if packed else ["rows"], ["codes"], axis=-1)
    yield helper.make_node("CastLike", ["codes", "i2"], ["o0"])


def _nodes(graph: GraphProto) -> Iterator[tuple[NodeProto, Mapping[str, TensorProto]]]:
    """Every node, those of inner graphs too, with the initializers of its graph."""
    initializers = {t.name: t for t in graph.initializer}
    for node in graph.node:
        yield node, initializers
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _microsoft(maker: Callable[[Call], Body], *types: str) -> dict[tuple[str, str], Callable[[Call], Body]]:
    return {("com.microsoft", t): maker for t in types}


_MAKERS: dict[tuple[str, str], Callable[[Call], Body]] = {
    ("", "LayerNormalization"): _like_first,  # before opset 17
    ("", "SimplifiedLayerNormalization"): _like_first,
    **_microsoft(_like_first, "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    **_microsoft(_like_first, "Gelu", "FastGelu", "QuickGelu", "RotaryEmbedding"),
    **_microsoft(_sum, "BiasGelu", "BiasAdd"),
    **_microsoft(_product, "FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "GemmFastGelu"),
    **_microsoft(_gemm, "FusedGemm"),
    **_microsoft(_quantized, "MatMulNBits", "MatMulBnb4"),
    **_microsoft(_quantize, "QuantizeLinear"),
    **_microsoft(_like_scale, "DequantizeLinear"),
    **_microsoft(_quantized_rows, "GatherBlockQuantized"),
    **_microsoft(_grouped_query, "GroupQueryAttention"),
    **_microsoft(_multi_head, "MultiHeadAttention"),
    **_microsoft(_attention, "Attention"),
    **_microsoft(_embedding, "EmbedLayerNormalization"),
}
