"""Models lowered to an older opset: what they compute stays, and what cannot be is said."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qpass.engine.opset import lower
from qpass.errors import QpassError
from qpass.testing import outputs
from tests.engine.lowering import check, compare, lowered, written


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


def test_to_a_version_between() -> None:
    proto = written(EXPANDED["group_norm"][1], 21)
    lower(proto, 20)
    assert proto.opset_import[0].version == 20
    assert "GroupNormalization" not in {n.op_type for n in proto.graph.node}  # another one at 18
    gelu = written(EXPANDED["gelu_later"][1])
    assert [n.op_type for n in lower(gelu, 20).graph.node] == ["Gelu"]
