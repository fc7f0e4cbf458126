"""Signatures of operators that ONNX Runtime has beyond ONNX's own: its optimizers write them, onnx has no schema.

From ONNX Runtime's docs/ContribOperators.md and its registered schemas; only operators that patterns name are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MICROSOFT = "com.microsoft"
"""The domain of most of them."""


@dataclass(frozen=True)
class Signature:
    """Input names and attribute defaults of an operator at an opset."""

    inputs: tuple[str, ...]
    defaults: Mapping[str, Any]  # None where the attribute has no default


def _signature(inputs: str, **defaults: Any) -> Signature:
    return Signature(tuple(inputs.split()), defaults)


_NORM = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
_TRANSPOSES = {"alpha": 1.0, "transA": 0, "transB": 0}
_BATCHES = {"transBatchA": 0, "transBatchB": 0}
_ACTIVATION = dict.fromkeys(["activation", "activation_alpha", "activation_beta", "activation_gamma"])
_ATTENTION = {"num_heads": None, "unidirectional": 0, "scale": None, "mask_filter_value": None}

CONTRIB = {
    ("", "LayerNormalization"): _signature("X Scale B", **_NORM),  # before opset 17
    ("", "SimplifiedLayerNormalization"): _signature("X scale", **_NORM),
    (MICROSOFT, "SkipLayerNormalization"): _signature("input skip gamma beta bias", epsilon=1e-12),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _signature("input skip gamma bias", epsilon=1e-12),
    (MICROSOFT, "EmbedLayerNormalization"): _signature(
        "input_ids segment_ids word_embedding position_embedding segment_embedding gamma beta mask position_ids",
        epsilon=1e-12,
        mask_index_type=None,
    ),
    (MICROSOFT, "Gelu"): _signature("X"),
    (MICROSOFT, "BiasGelu"): _signature("A B"),
    (MICROSOFT, "FastGelu"): _signature("X bias"),
    (MICROSOFT, "QuickGelu"): _signature("X", alpha=1.7020000219345093),
    (MICROSOFT, "FusedMatMul"): _signature("A B", **_TRANSPOSES, **_BATCHES),
    (MICROSOFT, "TransposeMatMul"): _signature("A B", **_TRANSPOSES),
    (MICROSOFT, "FusedMatMulActivation"): _signature(
        "A B", **_TRANSPOSES, **_BATCHES, **_ACTIVATION, activation_axis=None
    ),
    (MICROSOFT, "FusedGemm"): _signature("A B C", **_TRANSPOSES, beta=1.0, **_ACTIVATION),
    (MICROSOFT, "GemmFastGelu"): _signature("X W bias"),
    (MICROSOFT, "Attention"): _signature(
        "input weights bias mask_index past attention_bias past_sequence_length",
        **_ATTENTION,
        qkv_hidden_sizes=None,
        do_rotary=0,
        rotary_embedding_dim=0,
        past_present_share_buffer=0,
    ),
}
"""(domain, op type) → signature."""
