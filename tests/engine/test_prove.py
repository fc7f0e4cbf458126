"""What counts as proof that a node became a plugin layer."""

from __future__ import annotations

import json

from qpass.engine.prove import Layer, inspected, missing, summary, unnamed

NODES = {"a.QuantizePerToken": "QuantizePerToken", "a.SmoothQuantGemm": "SmoothQuantGemm"}


def test_all_there_by_name_or_origin() -> None:
    layers = [
        Layer("a.QuantizePerToken", "PLUGIN_V3"),
        Layer("fused", "PluginV3", "a.SmoothQuantGemm"),
        Layer("x", "CAST"),
    ]
    assert missing(NODES, layers) == []
    assert summary(layers) == {"CAST": 1, "PLUGIN_V3": 1, "PluginV3": 1}


def test_an_inlined_node_is_named_with_what_it_became() -> None:
    layers = [Layer("a.QuantizePerToken", "PLUGIN_V3"), Layer("a.SmoothQuantGemm/MatMul", "MATRIX_MULTIPLY")]
    assert missing(NODES, layers) == ["a.SmoothQuantGemm (SmoothQuantGemm, became MATRIX_MULTIPLY)"]
    layers = [Layer("a.QuantizePerToken", "PLUGIN_V3"), Layer("m", "MATRIX_MULTIPLY", "a.SmoothQuantGemm")]
    assert missing(NODES, layers) == ["a.SmoothQuantGemm (SmoothQuantGemm, became MATRIX_MULTIPLY)"]
    assert missing(NODES, []) == ["a.QuantizePerToken (QuantizePerToken)", "a.SmoothQuantGemm (SmoothQuantGemm)"]


def test_a_layer_of_the_same_name_is_no_proof() -> None:
    assert len(missing(NODES, [Layer(n, "ELEMENTWISE") for n in NODES])) == 2


def test_inspector() -> None:
    text = json.dumps(
        {
            "Layers": [
                {"Name": "q", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: a.QuantizePerToken]"},
                {"Name": "a.SmoothQuantGemm", "LayerType": "PluginV3"},
                "only a name",
            ]
        }
    )
    layers = inspected(text)
    assert missing(NODES, layers) == []
    assert layers[2] == Layer("only a name", "")


def test_names_in_the_engine() -> None:
    assert unnamed(NODES, b"..a.QuantizePerToken..") == ["a.SmoothQuantGemm"]
