"""The declarations against the design's table, and what follows from them: attributes, shapes, functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import AttributeProto

from qpass.ops import DOMAIN, PLUGIN, REGISTRY
from qpass.ops.examples import signatures
from qpass.ops.shapes import Shape
from tests.ops.running import BF16, F16, F32, INT8, every_case

NORM = "x residual? gamma beta?", "y sum?", "epsilon has_residual has_beta has_sum"
QUANTIZING_NORM = (
    "x residual? gamma beta? smoother? scale? zero?",
    "q scale? y? sum?",
    "epsilon has_residual has_beta has_smoother dyn_act_scaling has_zero has_y has_sum",
)
TABLE = {
    "QuantizeTensor": ("x smoother? scale zero?", "q", "has_smoother has_zero"),
    "QuantizePerToken": ("x smoother?", "q scale", "has_smoother"),
    "Dequantize": ("q scale", "x", "output_type"),
    "DequantizeWeight": ("weight scale zero?", "w", "output_type weight_type_id group_size has_zero"),
    "Layernorm": NORM,
    "Rmsnorm": NORM,
    "LayernormQuantization": QUANTIZING_NORM,
    "RmsnormQuantization": QUANTIZING_NORM,
    "ActivationQuantization": (
        "x up? smoother? scale? zero?",
        "q scale? y?",
        "activation gated has_smoother dyn_act_scaling has_zero has_y",
    ),
    "SmoothQuantGemm": (
        "q weight scale_a scale_w bias?",
        "y",
        "output_type has_per_token_scaling has_per_channel_scaling has_bias",
    ),
    "WeightOnlyQuantMatmul": ("x weight scale zero? bias?", "y", "weight_type_id has_zero has_bias"),
    "WeightOnlyGroupwiseQuantMatmul": (
        "x pre_quant_scale? weight scale zero? bias?",
        "y",
        "quant_algo group_size weight_type_id",
    ),
}


def test_the_table() -> None:
    def names(tensors: Any) -> str:
        return " ".join(t.name + "?" * t.optional for t in tensors)

    declared = {
        name: (names(op.inputs), names(op.outputs), " ".join(a.name for a in op.attributes))
        for name, op in REGISTRY.items()
    }
    assert declared == TABLE


def test_every_scale_is_float32_and_every_code_int8() -> None:
    for op in REGISTRY.values():
        for t in (*op.inputs, *op.outputs):
            if "scale" in t.name or t.name == "smoother":
                assert t.kind == "float32"
            assert (t.kind == "int8") == (t.name in ("q", "weight", "zero"))


def test_flags_follow_from_the_tensors() -> None:
    op = REGISTRY["WeightOnlyGroupwiseQuantMatmul"]
    need = {"x", "weight", "scale"}
    for extra, algo in (
        (set(), 0),
        ({"bias"}, 1),
        ({"zero"}, 2),
        ({"pre_quant_scale"}, 4),
        ({"bias", "zero", "pre_quant_scale"}, 7),
    ):
        attrs = op.attributes_for(need | extra, {"y"}, {"group_size": 32})
        assert attrs == {"quant_algo": algo, "group_size": 32, "weight_type_id": 2} | PLUGIN

    op = REGISTRY["LayernormQuantization"]
    attrs = op.attributes_for({"x", "gamma", "beta"}, {"q", "scale", "y"}, {"epsilon": 1e-12})
    assert attrs == {
        "epsilon": 1e-12,
        "has_residual": 0,
        "has_beta": 1,
        "has_smoother": 0,
        "dyn_act_scaling": 1,
        "has_zero": 0,
        "has_y": 1,
        "has_sum": 0,
    } | {"plugin_version": "1", "plugin_namespace": "qpass"}
    assert op.attributes_for({"x", "gamma", "scale"}, {"q"}, {})["dyn_act_scaling"] == 0
    assert op.attributes_for({"x", "gamma"}, {"q"}, {})["dyn_act_scaling"] == 1, "implied by the missing input"


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "given", "message"),
    [
        ("QuantizeTensor", "x", "q", {}, "QuantizeTensor needs its input 'scale'"),
        ("QuantizePerToken", "x", "scale", {}, "QuantizePerToken needs its output 'q'"),
        ("QuantizePerToken", "x bias", "q scale", {}, "has no input 'bias'; it has x, smoother"),
        ("QuantizePerToken", "x", "q y", {}, "has no output 'y'; it has q, scale"),
        ("QuantizePerToken", "x", "q scale", {"axis": 1}, "has no attribute 'axis'; it has has_smoother"),
        ("QuantizePerToken", "x", "q scale", {"has_smoother": 1}, "has_smoother=1, but the tensors make it 0"),
        ("LayernormQuantization", "x gamma scale", "q scale", {}, "'scale' cannot be an output here"),
        ("LayernormQuantization", "x gamma zero", "q scale", {}, "'zero' needs the input 'scale' too"),
        ("Dequantize", "q scale", "x", {}, "needs its attribute 'output_type'"),
        ("Dequantize", "q scale", "x", {"output_type": 7}, r"output_type=7, wants one of \[1, 10, 16\]"),
        ("ActivationQuantization", "x", "q scale", {}, "needs its attribute 'activation': 0 gelu, 1 gelu_tanh"),
        ("ActivationQuantization", "x zero", "q scale", {"activation": 4}, "'zero' needs the input 'scale' too"),
        ("WeightOnlyGroupwiseQuantMatmul", "x weight scale", "y", {"group_size": 48}, "group_size=48, wants one of"),
    ],
)
def test_what_does_not_fit_is_refused(op: str, inputs: str, outputs: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REGISTRY[op].attributes_for(set(inputs.split()), set(outputs.split()), given)


GROUPWISE = REGISTRY["WeightOnlyGroupwiseQuantMatmul"]
GROUPS = GROUPWISE.attributes_for({"x", "weight", "scale"}, {"y"}, {"group_size": 32})


def groupwise(x: Shape, weight: Shape = (8, 32), scale: Shape = (8, 2)) -> Shape:
    kinds = [(F16, x), None, (INT8, weight), (F32, scale), None, None]
    ((dtype, shape),) = GROUPWISE.infer(kinds, GROUPS)
    assert dtype == F16
    return shape


def test_shapes_are_solved_from_what_is_known() -> None:
    assert groupwise(("batch", None, 64)) == ("batch", None, 8)
    assert groupwise((2, 3, "hidden")) == (2, 3, 8)
    assert groupwise((64,)) == (8,)
    assert groupwise(None) is None
    assert groupwise((4, 64), weight=None) == (4, 8)
    assert groupwise((4, 64), weight=None, scale=None) == (4, None)

    norm = REGISTRY["RmsnormQuantization"]
    attrs = norm.attributes_for({"x", "gamma"}, {"q", "scale", "y"}, {})
    results = norm.infer([(BF16, ("b", "s", None)), None, (BF16, (96,)), None, None, None, None], attrs)
    assert results == [(INT8, ("b", "s", 96)), (F32, ("b", "s", 1)), (BF16, ("b", "s", 96))]


@pytest.mark.parametrize(
    ("x", "residual", "total"),
    [
        ((2, 3, 8), (2, 3, 8), (2, 3, 8)),
        (("b", "s", 8), ("b", "s", 8), ("b", "s", 8)),
        (("b", "s", 8), (1, "s", 8), ("b", "s", 8)),
        (("s", 8), ("b", 1, 8), ("b", "s", 8)),
        (("b", 4, 8), (4, 8), ("b", 4, 8)),
        (("b", "s", 8), ("c", "s", 8), (None, "s", 8)),
        (("b", None, 8), (1, 4, 8), ("b", 4, 8)),
        (None, ("b", 8), None),
    ],
)
def test_a_residual_broadcasts_over_leading_dims(x: Shape, residual: Shape, total: Shape) -> None:
    norm = REGISTRY["RmsnormQuantization"]
    attrs = norm.attributes_for({"x", "residual", "gamma"}, {"q", "scale", "sum"}, {})
    q, _, s = norm.infer([(F16, x), (F16, residual), (F16, (8,)), None, None, None, None], attrs)
    assert q[1] == s[1] == total


def test_a_residual_that_does_not_fit() -> None:
    norm = REGISTRY["RmsnormQuantization"]
    attrs = norm.attributes_for({"x", "residual", "gamma"}, {"q", "scale"}, {})
    with pytest.raises(ValueError, match=r"residual has shape \[3, 8\], wants \[~..., K\], K=8, ...=\[2\]"):
        norm.infer([(F16, (2, 8)), (F16, (3, 8)), (F16, (8,)), None, None, None, None], attrs)
    with pytest.raises(ValueError, match="'sum' needs the input 'residual' too"):
        norm.attributes_for({"x", "gamma"}, {"q", "scale", "sum"}, {})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (4, 60)}, r"weight has shape \[8, 32\], wants \[N, K/2\], N=8, K=60"),
        ({"x": (4, 65)}, "weight does not fit: K=65 is not a multiple of 2"),
        ({"x": (4, 70), "weight": (8, 35)}, "scale does not fit: K=70 is not a multiple of 32"),
        ({"x": (4, 64), "scale": (9, 2)}, r"scale has shape \[9, 2\], wants \[N, K/group_size\], N=8, K=64"),
        ({"x": (4, 64), "scale": (8,)}, r"scale has shape \[8\]"),
        ({"x": ()}, r"x has shape \[\], wants \[..., K\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, Shape], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groupwise(**shapes)


def test_dtypes_that_do_not_fit_are_refused() -> None:
    op = REGISTRY["QuantizePerToken"]
    attrs = op.attributes_for({"x", "smoother"}, {"q", "scale"}, {})
    with pytest.raises(ValueError, match="smoother is float16, wants float32"):
        op.infer([(F16, (4,)), (F16, (4,))], attrs)
    with pytest.raises(ValueError, match="x is float64, wants float32, float16 or bfloat16"):
        op.infer([(np.dtype(np.float64), (4,)), (F32, (4,))], attrs)
    with pytest.raises(ValueError, match="input 'smoother' is missing"):
        op.infer([(F16, (4,)), None], attrs)
    with pytest.raises(ValueError, match="takes 2 inputs, None for those that are not there; got 1"):
        op.infer([(F16, (4,))], attrs)


def test_leading_dims_must_agree() -> None:
    op = REGISTRY["SmoothQuantGemm"]
    attrs = op.attributes_for({"q", "weight", "scale_a", "scale_w"}, {"y"}, {"output_type": 1})

    def infer(scale_a: Shape) -> Any:
        return op.infer([(INT8, (2, "s", 16)), (INT8, (8, 16)), (F32, scale_a), (F32, (8,)), None], attrs)

    assert infer((2, 5, 1)) == [(F32, (2, 5, 8))]
    for wrong in (3, 5, 1), (5, 1), (1,), (2, 5, 2):
        with pytest.raises(ValueError, match="scale_a has shape"):
            infer(wrong)


def test_a_body_declares_all_attributes_and_the_models_opset() -> None:
    for case in every_case(F16):
        body = case.op.body(case.attrs, [None if x is None else x.dtype for x in case.inputs], 17)
        assert (body.domain, body.name) == (DOMAIN, case.op.name)
        assert list(body.attribute) == list(case.attrs)
        assert [(o.domain, o.version) for o in body.opset_import] == [("", 17)]
        assert list(body.input) == [i.name for i in case.op.inputs if i.present(case.attrs)]
        assert list(body.output) == [o.name for o in case.outputs]
        assert body.overload.endswith(".o17")
        nested = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
        assert not any(a.type in nested for n in body.node for a in n.attribute), "a branch"


def test_overloads() -> None:
    op = REGISTRY["WeightOnlyGroupwiseQuantMatmul"]
    attrs = op.attributes_for({"x", "weight", "scale", "zero", "bias"}, {"y"}, {"group_size": 128})
    assert op.body(attrs, [F16, None, INT8, F32, INT8, F16], 17).overload == "f16.g128.int4.zero.bias.o17"
    op = REGISTRY["LayernormQuantization"]
    attrs = op.attributes_for({"x", "gamma", "beta", "scale"}, {"q", "y"}, {})
    assert op.body(attrs, [BF16, None, BF16, BF16, None, F32, None], 21).overload == "bf16.beta.static.y.o21"
    op = REGISTRY["Dequantize"]
    attrs = op.attributes_for({"q", "scale"}, {"x"}, {"output_type": 1})
    assert op.body(attrs, [INT8, F32], 13).overload == "f32.o13"
    op = REGISTRY["DequantizeWeight"]
    attrs = op.attributes_for({"weight", "scale"}, {"w"}, {"output_type": 10, "weight_type_id": 1})
    assert op.body(attrs, [INT8, F32, None], 17).overload == "f16.int8.channel.o17"


@pytest.mark.parametrize("opset", [12, 999])
def test_opsets_without_bodies_are_refused(opset: int) -> None:
    op = REGISTRY["QuantizePerToken"]
    with pytest.raises(ValueError, match=f"opset {opset} is not supported: 13 to"):
        op.body(op.attributes_for({"x"}, {"q", "scale"}, {}), [F32, None], opset)


def test_signatures_are_all_there_are() -> None:
    count = {name: sum(1 for _ in signatures(op)) for name, op in REGISTRY.items()}
    assert count == {
        "QuantizeTensor": 4,
        "QuantizePerToken": 2,
        "Dequantize": 3,
        "DequantizeWeight": 48,
        "Layernorm": 6,
        "Rmsnorm": 6,
        "LayernormQuantization": 72,
        "RmsnormQuantization": 72,
        "ActivationQuantization": 7 * 24,
        "SmoothQuantGemm": 24,
        "WeightOnlyQuantMatmul": 8,
        "WeightOnlyGroupwiseQuantMatmul": 48,
    }
