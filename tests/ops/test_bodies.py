"""Every body against its NumPy reference, in ONNX Runtime on the CPU, optimised and not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from qpass.ops import REGISTRY
from qpass.ops.examples import Case, example, signatures
from tests.ops.running import (
    BF16,
    F16,
    F32,
    INT8,
    OPSETS,
    Array,
    assert_agree,
    close,
    every_case,
    graph_of,
    run,
    session,
)

NEWEST = max(OPSETS)
DTYPES = (F32, F16, BF16)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_signature_agrees_with_its_reference(opset: int) -> None:
    """In every dtype at the ends, in turn between them."""
    every_signature_agrees(opset, DTYPES if opset in (OPSETS[0], NEWEST) else DTYPES[opset % 3 :][:1])


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS[1:-1])
def test_every_signature_agrees_in_every_dtype(opset: int) -> None:
    every_signature_agrees(opset, DTYPES)


def every_signature_agrees(opset: int, dtypes: Sequence[np.dtype[Any]]) -> None:
    cases = every_case(*dtypes)
    plain = run(cases, opset, optimised=False, check=True)
    optimised = run(cases, opset, optimised=True)
    for case, a, b in zip(cases, plain, optimised, strict=True):
        assert_agree(case, a)
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(x, y), f"optimisations change {case}"


def test_bodies_are_valid_at_the_newest_opset_of_onnx() -> None:
    newest = onnx.defs.onnx_opset_version()
    assert newest >= NEWEST
    onnx.checker.check_model(graph_of(every_case(F32, F16, BF16), newest).model(), full_check=True)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (0,), (2, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(
    ("opset", "dtype"),
    [
        (13, F32),
        (NEWEST, BF16),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [(13, F16), (13, BF16), (NEWEST, F32), (NEWEST, F16)]
        ),
    ],
    ids=str,
)
def test_any_rank_and_no_tokens(opset: int, dtype: np.dtype[Any], lead: tuple[int, ...]) -> None:
    cases = every_case(dtype, lead=lead, n=8, k=128)
    for optimised in (False, True):
        for case, actual in zip(cases, run(cases, opset, optimised, check=not optimised), strict=True):
            assert_agree(case, actual)


@pytest.mark.parametrize("opset", [13, 21])
def test_weights_that_are_no_constants(opset: int) -> None:
    cases = every_case(F16)
    for optimised in (False, True):
        for case, actual in zip(cases, run(cases, opset, optimised, constants=False), strict=True):
            assert_agree(case, actual)


def test_one_output_channel_and_the_smallest_k() -> None:
    cases = []
    for op in REGISTRY.values():
        for attrs in signatures(op):
            int4 = attrs.get("weight_type_id") == 2
            k = int(attrs.get("group_size") or (2 if int4 else 1))
            cases.append(example(op, attrs, F32, n=1, k=k))
    for optimised in (False, True):
        for case, actual in zip(cases, run(cases, 17, optimised), strict=True):
            assert_agree(case, actual)


@pytest.mark.parametrize("optimised", [False, True])
def test_norms_differ_in_few_integers(optimised: bool) -> None:
    """At most ±1 in at most 1e-5 of the values: what is computed in float32 before rounding sums in another order."""
    for name in "LayernormQuantization", "RmsnormQuantization":
        op = REGISTRY[name]
        cases = [example(op, attrs, F32, lead=(256,), k=768, seed=i) for i, attrs in enumerate(signatures(op))]
        differ = total = 0
        for case, (q, *_) in zip(cases, run(cases, 17, optimised), strict=True):
            difference = np.abs(q.astype(int) - case.reference[0].astype(int))
            assert difference.max() <= 1
            differ += int(np.count_nonzero(difference))
            total += q.size
        assert total > 3e6
        assert differ <= 1e-5 * total


@pytest.mark.parametrize("k", [1, 127, 1024, 4096])
def test_accumulators_are_exact(k: int) -> None:
    """With scales of 1 the result is the int32 accumulator itself."""
    op = REGISTRY["SmoothQuantGemm"]
    attrs = op.attributes_for(
        {"q", "weight", "scale_a", "scale_w"}, {"y"}, {"output_type": 1, "has_per_channel_scaling": 1}
    )
    rng = np.random.default_rng(k)
    q, w = (rng.integers(-128, 128, (rows, k)).astype(INT8) for rows in (16, 32))
    q[0], w[0] = -128, -128  # the largest sum
    if k > 1024:
        q[0] = 127 * rng.choice([-1, 1], k)  # beyond 2^24 a float32 is no integer any more; real sums are far below
    case = Case(op, attrs, [q, w, np.ones((16, 1), F32), np.ones(32, F32), None])
    expected = q.astype(np.int64) @ w.astype(np.int64).T
    for opset in 13, 21, NEWEST:
        for optimised in (False, True):
            (y,) = run([case], opset, optimised)[0]
            assert np.array_equal(y, expected)
    assert np.array_equal(case.reference[0], expected)


EDGES = {
    "zeros": np.zeros((3, 64)),
    "a row of zeros": np.concatenate([np.zeros((1, 64)), np.ones((2, 64))]),
    "ties": np.arange(-127, 128).repeat(2)[:510].reshape(2, 255) + 0.5,
    "big": np.full((2, 64), 6e4) * np.linspace(-1, 1, 64),
    "float16 subnormals": np.linspace(-60, 60, 64)[None] * 2.0**-24,
    "one outlier": np.where(np.arange(64) == 7, 1e4, 1e-3)[None],
}


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_quantization_at_the_edges(edge: str, dtype: np.dtype[np.generic]) -> None:
    x = EDGES[edge].astype(dtype)
    k = x.shape[-1]
    cases = []
    for scale in (0.0, 1.0, 2.0**-20, 1e-38, 1e30):
        op = REGISTRY["QuantizeTensor"]
        attrs = op.attributes_for({"x", "scale"}, {"q"}, {})
        cases.append(Case(op, attrs, [x, None, np.array([scale], F32), None]))
        attrs = op.attributes_for({"x", "scale", "zero"}, {"q"}, {})
        cases += [Case(op, attrs, [x, None, np.array([scale], F32), np.array([z], INT8)]) for z in (-128, 7, 127)]
    op = REGISTRY["QuantizePerToken"]
    cases.append(Case(op, op.attributes_for({"x"}, {"q", "scale"}, {}), [x, None]))
    smoother = np.linspace(1e-3, 1e3, k).astype(F32)
    cases.append(Case(op, op.attributes_for({"x", "smoother"}, {"q", "scale"}, {}), [x, smoother]))
    for name in "LayernormQuantization", "RmsnormQuantization":
        op = REGISTRY[name]
        attrs = op.attributes_for({"x", "gamma"}, {"q", "scale", "y"}, {"epsilon": 1e-6})
        cases.append(Case(op, attrs, [x, None, np.ones(k, dtype), None, None, None, None]))
    for optimised in (False, True):
        for case, actual in zip(cases, run(cases, 17, optimised), strict=True):
            assert_agree(case, actual)


def test_float32_at_the_edges() -> None:
    """Subnormal scales, and quotients beyond float32."""
    x = np.array([[3e38, -3e38, 1e38, 0], [1e-44, -1e-44, 3e-45, 0], [1e-38, -2e-39, 1e-40, 0]], F32)
    per_token, tensor = REGISTRY["QuantizePerToken"], REGISTRY["QuantizeTensor"]
    attrs = tensor.attributes_for({"x", "scale"}, {"q"}, {})
    cases = [Case(per_token, per_token.attributes_for({"x"}, {"q", "scale"}, {}), [x, None])]
    cases += [Case(tensor, attrs, [x, None, np.array([s], F32), None]) for s in (1e-40, 1e-10, 1e38)]
    for optimised in (False, True):
        for case, actual in zip(cases, run(cases, 17, optimised), strict=True):
            assert_agree(case, actual)


def test_ties_go_to_even() -> None:
    op = REGISTRY["QuantizeTensor"]
    x = np.array([-128.5, -127.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 200.0], F32)
    case = Case(op, op.attributes_for({"x", "scale"}, {"q"}, {}), [x, None, np.ones(1, F32), None])
    expected = np.array([-128, -128, -2, -2, 0, 0, 2, 2, 126, 127, 127])
    assert np.array_equal(case.reference[0], expected)
    assert np.array_equal(run([case], 13, True)[0][0], expected)


def test_a_zero_point_is_added_behind_the_rounding() -> None:
    """As ONNX's own QuantizeLinear does it: ties go by the value before, not by the sum."""
    op = REGISTRY["QuantizeTensor"]
    x = np.array([-1e30, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 200.0], F32)
    for zero in (-128, -3, 0, 1, 127):
        z = np.array([zero], INT8)
        case = Case(op, op.attributes_for({"x", "scale", "zero"}, {"q"}, {}), [x, None, np.ones(1, F32), z])
        inputs = [onnx.helper.make_tensor_value_info("x", 1, [len(x)])]
        node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
        given: dict[str, Array] = {"s": np.array(1, F32), "z": np.array(zero, INT8)}
        constants = [onnx.numpy_helper.from_array(v, k) for k, v in given.items()]
        graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_empty_tensor_value_info("q")], constants)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
        assert np.array_equal(case.reference[0], session(model, False).run(None, {"x": x})[0])
        assert np.array_equal(case.reference[0], run([case], 13, True)[0][0])


def test_it_is_a_division_not_a_product_with_the_reciprocal() -> None:
    scale = np.float32(0.3)
    halves = (np.arange(-126, 127).astype(F32) + np.float32(0.5)) * scale
    products = np.rint(halves * (np.float32(1) / scale))
    assert np.any(products != np.rint(halves / scale)), "this data does not tell the two apart"
    op = REGISTRY["QuantizeTensor"]
    case = Case(op, op.attributes_for({"x", "scale"}, {"q"}, {}), [halves, None, np.array([scale]), None])
    assert np.array_equal(case.reference[0], np.rint(halves / scale))
    assert_agree(case, run([case], 21, True)[0])


@pytest.mark.parametrize("opset", [13, 17, 18, 21, 23, NEWEST])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_chain_of_ops_is_not_fused_away(opset: int, dtype: np.dtype[np.generic]) -> None:
    """Norm → two int8 GEMMs → weight-only Linear: optimisations across bodies change nothing."""
    rng = np.random.default_rng(0)
    x, gamma, beta = (rng.normal(size=s).astype(dtype) for s in ((2, 5, 128), 128, 128))
    norm, gemm, linear = (REGISTRY[n] for n in ("LayernormQuantization", "SmoothQuantGemm", "WeightOnlyQuantMatmul"))
    output_type = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    first = Case(
        norm,
        norm.attributes_for({"x", "gamma", "beta"}, {"q", "scale", "y"}, {}),
        [x, None, gamma, beta, None, None, None],
    )
    q, scale, _ = first.reference
    attrs = gemm.attributes_for({"q", "weight", "scale_a", "scale_w", "bias"}, {"y"}, {"output_type": output_type})

    def int8_linear() -> Case:
        w = rng.integers(-128, 128, (64, 128)).astype(INT8)
        return Case(
            gemm, attrs, [q, w, scale, rng.uniform(0.001, 0.01, 64).astype(F32), rng.normal(size=64).astype(dtype)]
        )

    second, third = int8_linear(), int8_linear()
    (h,) = second.reference
    w = rng.integers(-128, 128, (32, 64)).astype(INT8)
    last = Case(
        linear,
        linear.attributes_for({"x", "weight", "scale"}, {"y"}, {"weight_type_id": 1}),
        [h, w, np.full(32, 0.01, F32), None, None],
    )
    graph = graph_of([first, second, third, last], opset)
    for a, b in {
        "1.q": "0.q.out",
        "2.q": "0.q.out",
        "1.scale_a": "0.scale.out",
        "2.scale_a": "0.scale.out",
        "3.x": "1.y.out",
    }.items():
        for node in graph.nodes:
            node.input[:] = [b if name == a else name for name in node.input]
    graph.inputs = [i for i in graph.inputs if i.name.startswith("0.x")]
    graph.before = [n for n in graph.before if n.output[0] == "0.x"]
    graph.feeds = {k: v for k, v in graph.feeds.items() if k.startswith("0.x")}
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    plain, optimised = (session(model, o).run(None, graph.feeds) for o in (False, True))
    for a, b in zip(plain, optimised, strict=True):
        assert np.array_equal(a, b)
    assert close(plain[-1], last.unrounded[0], dtype)


def test_epsilon_is_no_part_of_the_signature() -> None:
    op = REGISTRY["RmsnormQuantization"]
    cases = []
    for epsilon in (1e-12, 1e-5, 0.1):
        attrs = op.attributes_for({"x", "gamma"}, {"q", "scale"}, {"epsilon": epsilon})
        cases.append(example(op, attrs, F32))
    assert len(graph_of(cases, 17).functions) == 1
    for case, actual in zip(cases, run(cases, 17, True), strict=True):
        assert_agree(case, actual)


def test_bodies_survive_onnx_inlining() -> None:
    """A build without plugins inlines the functions first."""
    import onnx.inliner

    cases = every_case(F16)
    graph = graph_of(cases, 17)
    model = onnx.inliner.inline_local_functions(graph.model())
    assert not model.functions
    results = iter(session(model, False).run(None, graph.feeds))
    for case in cases:
        assert_agree(case, [next(results) for _ in case.outputs])


def test_bfloat16_results_are_rounded_to_bfloat16() -> None:
    op = REGISTRY["Dequantize"]
    case = example(op, op.attributes_for({"q", "scale"}, {"x"}, {"output_type": 16}), BF16)
    (y,) = run([case], 13, False)[0]
    assert np.array_equal(y, y.astype(ml_dtypes.bfloat16).astype(F32))
    unrounded: Array = case.unrounded[0]
    assert not np.array_equal(y, unrounded)
