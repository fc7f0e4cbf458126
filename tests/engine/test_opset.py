"""Models lowered to an older opset: what they compute stays, and what cannot be is said."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from qpass.engine.opset import lower
from qpass.errors import QpassError
from qpass.graph.walk import all_nodes
from qpass.testing import feeds, model, outputs
from tests import zoo


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


def test_low_enough() -> None:
    proto = written("(float[N, 4] x) => (float[N, 4] y) { y = Shrink(x) }", 17)
    nodes, opsets = list(proto.graph.node), list(proto.opset_import)
    assert lower(proto) is proto
    assert (list(proto.graph.node), list(proto.opset_import)) == (nodes, opsets)
    newer = written("(float[N, 4] x) => (float[N, 4] y) { y = Gelu(x) }", 20)
    assert [n.op_type for n in lower(newer, 20).graph.node] == ["Gelu"]
    with pytest.raises(ValueError, match="opset 13"):
        lower(newer, 13)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_constants_of_a_function_are_not_computed_anew(kind: str) -> None:
    """TensorRT 8.6 would give the √2 of each Gelu, and each cast of a number, a kernel that runs every time."""
    proto = written(f"({kind}[N, 4] x) => ({kind}[N, 4] y) {{ y = Gelu(x) }}", 20)
    computed = [n.op_type for n in lower(proto).graph.node if n.op_type != "Constant"]
    assert computed == ["Div", "Erf", "Sum", "Mul", "Mul"]


@pytest.mark.parametrize(
    "text",
    [
        "(float[N, 4] x) => (float16[N, 4] y) { [c] y = Cast<to = 10, saturate = 1>(x) }",
        "(float[N, 4] x) => (float[4, N] y) { [t] y = Transpose<perm = [1, 0]>(x) }",
        "(float[N, 4] x) => (float[M] y) <int64[1] s = {-1}> { [r] y = Reshape<allowzero = 0>(x, s) }",
        "(float[N, 1] x) => (float[N] y) <int64[1] a = {1}> { [s] y = Squeeze(x, a) }",
        "(float[N, 4] x) => (float[N, 1, 4] y) <int64[1] a = {1}> { [u] y = Unsqueeze(x, a) }",
        "(float[N, 4] x) => (float[A, B] y) { s = Shape(x) [c] y = ConstantOfShape(s) }",
        "(float[N, 4] x) => (float[N, 4] y) { [t] y = Trilu(x) }",
        "(float[N, 4] x) => (bool[N, 4] y) { [n] y = IsNaN(x) }",
        "(float[N, 4] x) => (float[N, 4] y) { [f] y = Sin(x) }",
        "(float[N, 4] x) => (float[N, 1] y) <int64[1] a = {1}> { [r] y = ReduceSum(x, a) }",
        "(float[N, 4] x) => (float[N, 6] y) <int64[4] p = {0, 1, 0, 1}> { [p] y = Pad(x, p) }",
        "(float[N, 4] x, float[N, 4] u) => (float[N, 4] y) <int64[1, 1] i = {0}, float[1, 4] v> "
        '{ [s] y = ScatterND<reduction = "none">(x, i, v) }',
        "(float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) <float[4] s = {1, 1, 2, 2}> "
        '{ [r] y = Resize<antialias = 0, keep_aspect_ratio_policy = "stretch", mode = "linear">(x, , s) }',
        "(float[N, 4] x) => (float[N, 4] y) <float[4] s = {0.5, 0.25, 1, 2}, int8[4] z = {0, 1, 2, 3}> "
        "{ q = QuantizeLinear<axis = 1, saturate = 0, block_size = 0>(x, s, z) "
        "[d] y = DequantizeLinear<axis = 1, output_dtype = 0>(q, s, z) }",
    ],
)
def test_the_same_by_the_schemas(text: str) -> None:
    proto = written(text)
    before = Counter(n.op_type for n in proto.graph.node)
    assert check(proto) == before


def test_what_is_without_effect() -> None:
    proto = written("(float[N, 4] x) => (float16[N, 4] y) { [c] y = Cast<to = 10, saturate = 0>(x) }")
    assert lowered(proto) == {"Cast": 1}  # ONNX Runtime refuses it as it was


@pytest.mark.parametrize("op", ["Max", "Mean", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare"])
def test_reduce(op: str) -> None:
    head = "(float[N, 3, 4] x) => (float[A, B, C] y)"
    name = f"Reduce{op}"
    assert check(written(f"{head} <int64[2] a = {{-1, 1}}> {{ [r] y = {name}(x, a) }}"))[name] == 1
    assert check(written(f"{head} {{ a = Constant<value_ints = [1]>() [r] y = {name}(x, a) }}"))[name] == 1
    assert check(written(f"{head} {{ [r] y = {name}<noop_with_empty_axes = 0>(x) }}"))[name] == 1
    assert check(written(f"{head} <int64[0] a> {{ [r] y = {name}(x, a) }}"))[name] == 1


def test_reduce_of_no_axes() -> None:
    text = "(float[N, 4] x) => (float[N, 4] y) {{ [r] y = {}<noop_with_empty_axes = 1>(x) }}"
    assert check(written(text.format("ReduceMean"))) == {"Identity": 1}
    assert check(written(text.format("ReduceL1")))["ReduceL1"] == 0  # its function has ReduceSum, which can be told


def test_reduce_by_axes_of_the_rank() -> None:
    text = """(float[N, 3, 4] x) => (float[A, B, C] y) <int64 one = {1}> {
        s = Shape(x) n = Size(s) from = Sub(n, one) a = Range(from, n, one) [r] y = ReduceMean(x, a)
    }"""
    assert check(written(text))["ReduceMean"] == 1


def test_reduce_by_computed_axes() -> None:
    text = "(float[N, 4] x, int64[1] a) => (float[A, B] y) {{ [r] y = {}(x, a) }}"
    assert check(written(text.format("ReduceL2")), rtol=1e-6)["ReduceL2"] == 0  # as the function of its schema
    with pytest.raises(QpassError, match=r"node r: ReduceMean needs opset 18.* its axes are not constant; export"):
        lower(written(text.format("ReduceMean")))


@pytest.mark.parametrize("parts", [2, 3])
def test_split(parts: int) -> None:
    names = ("a", "b", "c")[:parts]
    outs = ", ".join(f"float[N, {name.upper()}] {name}" for name in names)
    text = f"(float[N, 4] x) => ({outs}) {{ [s] {', '.join(names)} = Split<axis = -1, num_outputs = {parts}>(x) }}"
    assert check(written(text)) == ({"Split": 1} if parts == 2 else {"Split": 1, "Constant": 1})


def test_split_by_sizes() -> None:
    check(
        written(
            "(float[N, 4] x) => (float[N, 3] a, float[N, 1] b) <int64[2] s = {3, 1}> { a, b = Split<axis=1>(x, s) }"
        )
    )


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_pad_of_some_axes(mode: str) -> None:
    text = '(float[N, 3, 4] x) => (float[A, B, C] y) {} {{ {} [p] y = Pad<mode = "{}">(x, p, , a) }}'
    weights = "<int64[2] a = {-1, 0}, int64[4] p = {1, 2, 0, 1}>"
    assert check(written(text.format(weights, "", mode))) == {"Constant": 1, "Pad": 1}
    computed = text.format(
        "<int64[1] a = {-1}, int64[1] z = {0}>", "s = Shape<end = 1>(x) p = Concat<axis=0>(z, s)", mode
    )
    assert check(written(computed))["Gather"] == 1


def test_pad_of_unknown_rank() -> None:
    text = "(float x0, int64[R] s) => (float[A, B] y) <int64[2] p = {1, 2}, int64[1] a = {0}> "
    with pytest.raises(QpassError, match=r"node p: Pad needs opset 18.* the rank of x is not known"):
        lower(written(text + "{ x = Expand(x0, s) [p] y = Pad(x, p, , a) }"))


EXPANDED = {
    "gelu": (20, "(float[N, 4] x) => (float[N, 4] y) { [e] y = Gelu(x) }"),
    "gelu_tanh": (20, '(float[N, 4] x) => (float[N, 4] y) { [e] y = Gelu<approximate = "tanh">(x) }'),
    "gelu_later": (23, "(float[N, 4] x) => (float[N, 4] y) { [e] y = Gelu(x) }"),
    "gelu_of_what_is_inferred": (20, "(float[N, 4] x) => (float[N, 4] y) { a = Neg(x) [e] y = Gelu(a) }"),
    "mish": (18, "(float[N, 4] x) => (float[N, 4] y) { [e] y = Mish(x) }"),
    "swish": (24, "(float[N, 4] x) => (float[N, 4] y) { [e] y = Swish(x) }"),
    "swish_alpha": (24, "(float[N, 4] x) => (float[N, 4] y) { [e] y = Swish<alpha = 2.0>(x) }"),
    "group_norm": (
        21,
        "(float[N, 4, 5] x) => (float[N, 4, 5] y) <float[4] s, float[4] b> "
        "{ [e] y = GroupNormalization<num_groups = 2>(x, s, b) }",
    ),
    "rms_norm": (23, "(float[N, 3, 8] x) => (float[N, 3, 8] y) <float[8] s> { [e] y = RMSNormalization(x, s) }"),
    "rms_norm_of_two_axes": (
        23,
        "(float[N, 3, 8] x) => (float[N, 3, 8] y) <float[3, 8] s> { [e] y = RMSNormalization<axis = 1>(x, s) }",
    ),
    "rotary": (
        23,
        "(float[B, 4, S, 8] x, float[B, S, 4] c, float[B, S, 4] s) => (float[B, 4, S, 8] y) "
        "{ [e] y = RotaryEmbedding(x, c, s) }",
    ),
    "rotary_of_three_axes": (
        23,
        "(float[B, S, 32] x, float[B, S, 4] c, float[B, S, 4] s) => (float[B, S, 32] y) "
        "{ [e] y = RotaryEmbedding<num_heads = 4, interleaved = 1>(x, c, s) }",
    ),
    "rotary_in_part": (
        23,
        "(float[B, 4, S, 8] x, int64[B, S] i) => (float[B, 4, S, 8] y) <float[9, 2] c, float[9, 2] s> "
        "{ [e] y = RotaryEmbedding<rotary_embedding_dim = 4>(x, c, s, i) }",
    ),
    "attention": (
        23,
        "(float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v) => (float[B, 4, S, 8] y) "
        "{ [e] y = Attention<is_causal = 1>(q, k, v) }",
    ),
    "attention_masked": (
        23,
        "(float[B, S, 32] q, float[B, T, 32] k, float[B, T, 32] v, float[B, 1, S, T] m) => (float[B, S, 32] y) "
        "{ [e] y = Attention<q_num_heads = 4, kv_num_heads = 4, scale = 0.5, softcap = 3.0>(q, k, v, m) }",
    ),
    "attention_with_past": (
        23,
        "(float[B, 2, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, float[B, 2, P, 8] pk, float[B, 2, P, 8] pv) "
        "=> (float[B, 2, S, 8] y, float[B, 2, T, 8] nk, float[B, 2, T, 8] nv) "
        "{ [e] y, nk, nv = Attention(q, k, v, , pk, pv) }",
    ),
    "attention_24": (  # pads its mask along some axes
        24,
        "(float[B, 2, S, 8] q, float[B, 2, T, 8] k, float[B, 2, T, 8] v, float[S, T] m) => (float[B, 2, S, 8] y) "
        "{ [e] y = Attention(q, k, v, m) }",
    ),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_expanded(name: str) -> None:
    opset, text = EXPANDED[name]
    proto = written(text, opset)
    assert not check(proto, rtol=1e-6, S=5)["CastLike"]
    assert all(n.name.startswith("e/") for n in proto.graph.node if n.op_type != "Neg")


def test_two_of_a_kind() -> None:
    text = "(float[N, 4] x) => (float[N, 4] y) { [e] a = Gelu(x) [f] b = Gelu(a) c = Gelu(b) y = Add(c, x) }"
    check(written(text), rtol=1e-6)


def test_subgraphs() -> None:
    text = """(float[N, 4] x, bool c) => (float[A, B] y) <int64[1] axes = {1}> {
        [if] y = If(c) <
            then_branch = g1 () => (float[N, 4] a) { [e] a = Gelu(x) },
            else_branch = g2 () => (float[N, 1] b) {
                d, r = Split<axis = 1, num_outputs = 2>(x) [m] b = ReduceMean(r, axes)
            }
        >
    }"""
    for side in (False, True):
        proto = written(text, 20)
        given = {"x": np.ones((3, 4), np.float32) * np.arange(4, dtype=np.float32), "c": np.array(side)}
        wanted = outputs(proto, given)
        lowered(proto)
        compare(wanted[0], outputs(proto, given)[0], 1e-6)


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    proto = written("(float[N, 4] x) => (float[N, 8] y) <float[4, 8] w> { a = Gelu(x) y = MatMul(a, w) }")
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="there_is_no_such_file")
    before = weight.SerializeToString()
    lower(proto)
    assert proto.graph.initializer[0] is weight
    assert weight.SerializeToString() == before


def test_external_axes_are_not_constant() -> None:
    proto = written("(float[N, 4] x) => (float[N, 1] y) <int64[1] a = {1}> { [r] y = ReduceMean(x, a) }")
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(QpassError, match="its axes are not constant"):
        lower(proto)
    given = written("(float[N, 4] x, int64[1] a) => (float[N, 1] y) { [r] y = ReduceMean(x, a) }")
    given.graph.initializer.append(helper.make_tensor("a", TensorProto.INT64, [1], [1]))  # a default
    with pytest.raises(QpassError, match="its axes are not constant"):
        lower(given)


def test_other_domains() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 21, "qpass" : 1, "com.microsoft" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) { a = qpass.Gelu<saturate = 1>(x) b = com.microsoft.Gelu(a) y = Tan(b) }"""
    )
    nodes = list(map(str, proto.graph.node))
    lower(proto)
    assert list(map(str, proto.graph.node)) == nodes
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17), ("qpass", 1), ("com.microsoft", 1)]
    assert proto.ir_version <= 8


def test_the_other_name_of_the_default_domain() -> None:
    text = "(float[N, 4] x) => (float[N, 4] y) { [e] y = Gelu(x) }"
    proto = written(text, 20)
    proto.opset_import[0].domain = proto.graph.node[0].domain = "ai.onnx"
    lower(proto)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("ai.onnx", 17)]
    assert len(proto.graph.node) > 1


def test_types_that_need_a_later_file() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 21, "qpass" : 1]> g (float[N] x) => (float[N] y) { y = qpass.Op(x, w) }'
    )
    proto.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [2], [1, 2]))
    assert lower(proto).ir_version == 11


def test_what_tensorrt_misreads() -> None:
    text = """(float[N, 4] x) => (int64[1] a, int64[K] b, float16[N, 4] c, int64 d, int64[3] e) <float16 like> {
        [s] a = Shape<start = -2, end = -1>(x) [t] b = Shape<start = 1>(x) [u] c = CastLike(x, like)
        [v] d = Constant<value_int = 3>() [w] e = Constant<value_ints = [1, 2, 3]>()
    }"""
    proto = written(text, 18)
    assert not check(proto)["CastLike"]
    spelled = {(n.op_type, a.name) for n in proto.graph.node for a in n.attribute}
    assert spelled == {("Cast", "to"), ("Constant", "value")}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "(int32[N] x) => (int32[N] y) { [b] y = BitwiseNot(x) }",
            "node b: BitwiseNot needs opset 18, and is wanted at 17: there is no such operator before; "
            "export the model with opset 17 or lower",
        ),
        (
            "(int32[N] x) => (int32[N] y) { y = BitwiseNot(x) }",
            "node BitwiseNot@y: BitwiseNot needs opset 18",
        ),
        (
            "(float[N, M] x) => (float[N, A] a, float[N, B] b) { [s] a, b = Split<axis = 1, num_outputs = 2>(x) }",
            "node s: Split needs opset 18, and is wanted at 17: whether 2 parts of x are equal is not known",
        ),
        (
            "(float[N, 4] x, int64[1] a) => (float[N, 6] y) <int64[2] p = {1, 1}> { [p] y = Pad(x, p, , a) }",
            "node p: Pad needs opset 18, and is wanted at 17: its axes are not constant",
        ),
        (
            '(float[4] x) => (float[6] y) <int64[2] p = {1, 1}> { [p] y = Pad<mode = "wrap">(x, p) }',
            "node p: Pad needs opset 19, and is wanted at 17: it has mode = 'wrap'",
        ),
        (
            "(int8[4, 8] x) => (float[4, 8] y) <float[2, 8] s> "
            "{ [d] y = DequantizeLinear<axis = 0, block_size = 2>(x, s) }",
            "node d: DequantizeLinear needs opset 21, and is wanted at 17: it has block_size = 2",
        ),
        (
            "(float[4] x) => (int16[4] y) <float s> { [q] y = QuantizeLinear<output_dtype = 5>(x, s) }",
            "node q: QuantizeLinear needs opset 21, and is wanted at 17: it has output_dtype = 5",
        ),
        (
            "(int8[4] x) => (float16[4] y) <float16 s> { [d] y = DequantizeLinear(x, s) }",
            r"node d: DequantizeLinear needs opset 19, and is wanted at 17: s is a tensor\(float16\)",
        ),
        (
            "(float[4] x) => (float[4] y) { [c] a = Cast<to = 17>(x) y = Cast<to = 1>(a) }",
            r"node c: Cast needs opset 19, and is wanted at 17: a is a tensor\(float8e4m3fn\)",
        ),
        (
            "(bfloat16[4] x) => (bfloat16[4] y) { [s] y = Sin(x) }",
            r"node s: Sin needs opset 22, and is wanted at 17: x is a tensor\(bfloat16\)",
        ),
        (
            "(float[1, 1, 4, 4] x) => (float[A, B, C, D] y) <float[2] s = {2, 2}> "
            "{ [r] y = Resize<axes = [2, 3]>(x, , s) }",
            r"node r: Resize needs opset 18, and is wanted at 17: it has axes = \[2, 3\]",
        ),
        (
            "(float[1, 1, 5, 5] x) => (float[A, B, C, D] y) "
            "{ [m] y = MaxPool<ceil_mode = 1, kernel_shape = [2, 2], strides = [2, 2]>(x) }",
            "node m: MaxPool needs opset 22, and is wanted at 17: it has ceil_mode = 1",
        ),
        (
            "(float[1, 1, 4, 4] x, float[1, 2, 2, 2] g) => (float[1, 1, 2, 2] y) "
            '{ [g] y = GridSample<mode = "linear">(x, g) }',
            "node g: GridSample needs opset 20, and is wanted at 17: it has mode = 'linear'",
        ),
        (
            "(float[1, 4, 1] x) => (float[1, 4, 2] y) { [f] y = DFT(x) }",
            "node f: DFT needs opset 20, and is wanted at 17: its axis was another by default",
        ),
        (
            "(float[N, 4] x, bool c) => (float[N, 4] y) <int64[1, 1] i, float[1, 4] v> { [if] y = If(c) <"
            'then_branch = g1 () => (float[N, 4] a) { [s] a = ScatterND<reduction = "max">(x, i, v) },'
            "else_branch = g2 () => (float[N, 4] b) { b = Identity(x) }> }",
            "node if/s: ScatterND needs opset 18, and is wanted at 17: it has reduction = 'max'",
        ),
    ],
)
def test_what_cannot_be(text: str, told: str) -> None:
    with pytest.raises(QpassError, match=told):
        lower(written(text))


def test_types_that_are_not_known() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "qpass" : 1]> '
        "g (float[N] x, float[4] s) => (float[N] y) { a = qpass.Op(x) [e] b = RMSNormalization(a, s) y = Neg(b) }"
    )
    with pytest.raises(QpassError, match=r"node e: RMSNormalization needs .* the types of its inputs.* are not known"):
        lower(proto)


def test_to_a_version_between() -> None:
    proto = written(EXPANDED["group_norm"][1], 21)
    lower(proto, 20)
    assert proto.opset_import[0].version == 20
    assert "GroupNormalization" not in {n.op_type for n in proto.graph.node}  # another one at 18
    gelu = written(EXPANDED["gelu_later"][1])
    assert [n.op_type for n in lower(gelu, 20).graph.node] == ["Gelu"]


def test_functions_that_are_left() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[N] x) => (float[N] y) {{ [f] y = local.f(x) }}
        <domain: "local", opset_import: ["" : {}]> f (a) => (b) {{ b = Neg(a) }}"""
    with pytest.raises(QpassError, match=r"the function f needs opset 20; inline it first \(onnx.inliner\)"):
        lower(onnx.parser.parse_model(text.format(20)))
    assert [n.op_type for n in lower(onnx.parser.parse_model(text.format(17))).graph.node] == ["Neg"]


@zoo.each(*(p.stem for p in zoo.FOLDER.glob("*dynamo*.onnx")))
def test_zoo(path: Path) -> None:
    proto = onnx.load(path)
    given = zoo.samples(path)[0]
    new = {"Attention", "Gelu", "RMSNormalization", "RotaryEmbedding"}
    expands = any(n.op_type in new for n in proto.graph.node)
    wanted = outputs(proto, given)
    ops = lowered(proto)
    assert not new.intersection(ops)
    # the √2 of a float16 Gelu is a float16, as its definition says, where ONNX Runtime computes it in float32
    rtol = 5e-4 if wanted[0].dtype == np.float16 else 1e-6
    for want, got in zip(wanted, outputs(proto, given), strict=True):
        compare(want, got, rtol if expands else 0)


@pytest.mark.parametrize("opset", [14, 17, 20])
def test_integers_are_constants(opset: int) -> None:
    """TensorRT 8.6 reads axes from constants alone, and `value_ints` as zeros; what comes of the input's size stays."""
    text = """(float[N, 4] x) => (float[N, M] y, int64[2] size) {
        one = Constant<value_ints = [1]>()
        shape = Constant<value_ints = [-1]>()
        two = Add(one, one)
        axes = Reshape(one, shape)
        y = Slice(x, one, two, axes)
        size = Shape(x)
    }"""
    proto = written(text, opset)
    check(proto, N=3)  # lowers it in place
    made = {n.output[0]: n for n in proto.graph.node}
    assert [made[n].op_type for n in ("one", "two", "axes", "size")] == ["Constant"] * 3 + ["Shape"]
    assert all(a.name == "value" for n in proto.graph.node if n.op_type == "Constant" for a in n.attribute)


STALE = """(float[N, 4] x) => (float[N, 4] y, int64[2] s, int64[2] t) {
    a = Neg(x) s = Shape(a) y = Identity(a) b = Abs(a) t = Shape(b)
}"""


@pytest.mark.parametrize(
    ("name", "dims"), [("a", [1, 4]), ("a", [3, 4]), ("a", [1, 1, 4]), ("b", [1, 4]), ("y", [2, 4])]
)
def test_shapes_that_are_not_true(name: str, dims: list[Any]) -> None:
    """Exported at one batch, then opened: what was noted is no constant. One that is wrong discredits all."""
    proto = written(STALE, 17)
    wanted = outputs(proto, feeds(proto))
    stale = helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
    if name == "y":
        proto.graph.output[0].CopyFrom(stale)
    else:
        proto.graph.value_info.append(stale)
    if name == "a":
        proto.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [7, 4]))
    made = {o: n.op_type for n in lower(proto).graph.node for o in n.output}
    assert (made["s"], made["t"]) == ("Shape", "Shape")
    proto.graph.output[0].CopyFrom(written(STALE, 17).graph.output[0])
    for want, got in zip(wanted, outputs(proto, feeds(proto)), strict=True):
        compare(want, got, 0)


def test_shapes_that_onnx_cannot_infer_are_believed() -> None:
    """If nothing contradicts them: exporters know more."""
    text = "(float[N, 4] x, int64[2] s) => (int64[2] y) { a = Reshape(x, s) y = Shape(a) }"
    told: list[tuple[list[str | int | None], str]] = [([2, 6], "Constant"), (["M", 6], "Shape")]
    for dims, op in told:
        proto = written(text, 17)
        proto.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, dims))
        assert next(n.op_type for n in lower(proto).graph.node if "y" in n.output) == op


def test_shapes_in_a_loop_that_are_not_true() -> None:
    text = """(float[N, 4] x) => (float[N, 4] y, int64[K, 2] s) <int64 trips = {2}, bool go = {1}> {
        y, s = Loop(trips, go, x) <body = g1 (int64 i, bool c, float[1, 4] h) => (bool d, float[1, 4] g, int64[2] t) {
            d = Identity(c) g = Neg(h) t = Shape(g) }>
    }"""
    proto = written(text, 17)
    lower(proto)
    body = next(n for n in proto.graph.node if n.op_type == "Loop").attribute[0].g
    assert [n.op_type for n in body.node] == ["Identity", "Neg", "Shape"]


def test_a_real_model() -> None:
    """MiniLM's graph, whose axes are reshaped constants."""
    graph = Path(__file__).parents[2] / "samples" / "minilm" / "minilm.onnx"
    proto = lower(onnx.load(graph, load_external_data=False))
    made = {o: n for n in proto.graph.node for o in n.output}
    slices = [n for n in proto.graph.node if n.op_type == "Slice"]
    assert slices
    assert all(made[n.input[3]].op_type == "Constant" for n in slices if len(n.input) > 3)


def test_what_tensorrt_overlooks_is_refused() -> None:
    """Its parser would scatter without adding, and say nothing."""
    text = '(float[4] x, int64[2, 1] i, float[2] u) => (float[4] y) { [s] y = ScatterND<reduction = "add">(x, i, u) }'
    with pytest.raises(QpassError, match=r"node s: TensorRT 8\.6 overlooks reduction = .* of ScatterND"):
        lower(written(text, 17))
    plain = text.replace('<reduction = "add">', '<reduction = "none">')
    assert [n.op_type for n in lower(written(plain, 17)).graph.node] == ["ScatterND"]


@pytest.mark.parametrize("opset", [17, 21])
def test_quantization_as_tensorrt_reads_it(opset: int) -> None:
    """Its parser wants a zero point and takes no axis for 0; ONNX has neither, which means int8 zeros, and axis 1."""
    text = """(float[N, 4] x) => (float[N, 4] y, float[4, 3] v) <float[4] s = {1, 2, 3, 4}, float t, int8[4, 3] w> {
        z = Constant<value = int8[4] {0, 0, 0, 0}>()
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s)
        v = DequantizeLinear(w, t)
    }"""
    proto = written(text, opset)
    check(proto)
    nodes = {n.output[0]: n for n in proto.graph.node}
    assert [len(nodes[n].input) for n in "qyv"] == [3, 3, 3]
    axes = {n: [a.i for a in nodes[n].attribute if a.name == "axis"] for n in "qyv"}
    assert axes == {"q": [1], "y": [1], "v": []}
    zeros = [onnx.numpy_helper.to_array(nodes[nodes[n].input[2]].attribute[0].t) for n in "yv"]
    assert [(z.dtype.name, z.shape, z.tolist()) for z in zeros] == [("int8", (4,), [0] * 4), ("int8", (), 0)]


def test_quantization_to_the_type_of_an_attribute() -> None:
    text = "(float[N] x) => (int8[N] y) <float s = {0.1}> { [q] y = QuantizeLinear<output_dtype = 3>(x, s) }"
    assert check(written(text, 21)) == {"QuantizeLinear": 1, "Constant": 1}


@pytest.mark.parametrize("zero", ["", ", z"])
def test_uint8_is_refused(zero: str) -> None:
    """TensorRT 8.6 would saturate at 127, and say nothing."""
    weights = "<float s, uint8 z = {0}>" if zero else "<float s>"
    text = f"(float[N] x) => (uint8[N] y) {weights} {{ [q] y = QuantizeLinear(x, s{zero}) }}"
    with pytest.raises(QpassError, match=r"node q: TensorRT 8\.6 takes the uint8 of QuantizeLinear for int8; export"):
        lower(written(text, 17))


def test_a_branch_that_never_runs() -> None:
    """An axis that is not there is no constant, and no error."""
    text = """(float[2, 3] x, bool c) => (float[2, 3] y) {
        shape = Constant<value_ints = [2, 3]>() three = Constant<value_int = 3>()
        gone = Gather(shape, three)
        y = Identity(x)
    }"""
    lower(written(text, 17))
