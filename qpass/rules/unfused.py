"""Operators that ONNX Runtime's optimizers make of several, said again in the several.

A SkipLayerNormalization is an Add and a norm, a BiasGelu the bias of the Linear before it and an activation, Attention
the packed Linear of q, k and v before a MultiHeadAttention. The rules that lift, and the later ones, then find what
they know; what none of them claims goes back into the operator that it was. Operators and their attributes are those
of ONNX Runtime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from qpass.graph import Const, Value
from qpass.graph.ir import Shape
from qpass.rewriter import (
    Emit,
    Pattern,
    Replacement,
    attr,
    const,
    emitting,
    ms,
    need,
    output,
    respelling,
    rule,
    val,
)
from qpass.rewriter.contrib import CONTRIB, MICROSOFT
from qpass.rewriter.view import producer

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "Softplus": (),
    "Softsign": (),
    "Elu": ("alpha",),
    "LeakyRelu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"),
}
"""The operators that the `activation` of a fused product may name, each with its attributes."""


def fused(type_: str, least: int, *inputs: Any) -> Any:
    """An operator with any attributes and with all of these inputs, or with fewer of the last, `least` at least."""
    arities = range(len(inputs), least - 1, -1)
    return reduce(or_, (getattr(ms, type_)(*inputs[:n], **_any_attributes(type_)) for n in arities))


def _any_attributes(type_: str) -> dict[str, Any]:
    return {name: attr() for name in CONTRIB[MICROSOFT, type_].defaults}


class SkipNorm(Pattern):
    """A norm of a sum, of three where one is a bias; outputs the norm, its mean and inverse deviation, and the sum."""

    x: Value = val()
    skip: Value = val()
    gamma: Value = val()
    beta: Value | None = val()
    bias: Value | None = val()
    y = fused("SkipLayerNormalization", 3, x, skip, gamma, beta, bias) | fused(
        "SkipSimplifiedLayerNormalization", 3, x, skip, gamma, bias
    )
    mean: Value | None = output(y, 1)
    deviation: Value | None = output(y, 2)
    total: Value | None = output(y, 3)


class EmbedNorm(Pattern):
    """LayerNorm of a sum of embeddings: of words, positions and, where they are there, segments."""

    ids: Value = val("B S")
    segment_ids: Value | None = val()
    words: Value = val()
    positions: Value = val()
    segments: Value | None = val()
    gamma: Value = val()
    beta: Value = val()
    mask: Value | None = val()
    position_ids: Value | None = val()
    y = fused(
        "EmbedLayerNormalization", 7, ids, segment_ids, words, positions, segments, gamma, beta, mask, position_ids
    )
    mask_index: Value | None = output(y, 1)
    total: Value | None = output(y, 2)


class BiasedGelu(Pattern):
    x: Value = val()
    bias: Value = val()
    y = ms.BiasGelu(x, bias) | ms.FastGelu(x, bias)


class GemmFastGelu(Pattern):
    x: Value = val()
    w: Value = val()
    bias: Value | None = val()
    y = fused("GemmFastGelu", 2, x, w, bias)


class FusedGemm(Pattern):
    a: Value = val()
    b: Value = val()
    c: Value | None = val()
    y = fused("FusedGemm", 2, a, b, c)


class FusedMatMulActivation(Pattern):
    a: Value = val()
    b: Value = val()
    y = fused("FusedMatMulActivation", 2, a, b)


class TransposeMatMul(Pattern):
    a: Value = val()
    b: Value = val()
    y = fused("TransposeMatMul", 2, a, b)


class Attention(Pattern):
    """Attention with the packed projection of q, k and v in it: x [B, S, K], w [K, Q + K + V]."""

    x: Value = val("B S K")
    w: Const = const("K N")
    bias: Value | None = val()
    mask: Value | None = val()
    past: Value | None = val()
    scores: Value | None = val()
    length: Value | None = val()
    y = fused("Attention", 2, x, w, bias, mask, past, scores, length)
    present: Value | None = output(y, 1)


@respelling
@emitting("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
@rule
def unfuse_skip_norm(m: SkipNorm, new: Emit, cfg: object) -> Replacement:
    """SkipLayerNormalization, Simplified or not: an Add before a norm; or of the bias before one without it."""
    used = m.mean is not None or m.deviation is not None
    need(not used, "its outputs mean and inv_std_var are used, which no norm of qpass gives")
    epsilon = _attributes(m)["epsilon"]
    weights = [m.gamma, *([m.beta] if _there(m.beta) else [])]
    if not _there(m.bias):
        total = new.onnx("Add", m.x, m.skip, like=m.y)
        y = new.onnx(m.root.op.removeprefix("Skip"), total, *weights, like=m.y, axis=-1, epsilon=epsilon)
        return {m.y: y} | ({m.total: total} if m.total is not None else {})
    x, skip = m.x, m.skip
    if _is_product(skip) and not _is_product(x):
        skip = new.onnx("Add", skip, m.bias, like=skip)
    else:
        x = new.onnx("Add", x, m.bias, like=x)
    outputs: list[Any] = [(m.y.dtype, m.y.shape)]
    if m.total is not None:
        outputs += [None, None, (m.total.dtype, m.total.shape)]
    made = new.nodes(m.root.op, [x, skip, *weights], outputs, MICROSOFT, epsilon=epsilon)
    return {m.y: made[0]} | ({m.total: made[3]} if m.total is not None else {})


@respelling
@rule
def unfuse_embedding(m: EmbedNorm, new: Emit, cfg: object) -> Replacement:
    """EmbedLayerNormalization: Gathers, Adds and a LayerNormalization; positions count where none are given."""
    total = new.onnx("Add", new.onnx("Gather", m.words, m.ids, like=m.y), _positions(m, new), like=m.y)
    if _there(m.segments):
        segments = new.onnx("Gather", m.segments, m.segment_ids, like=m.y)
        total = new.onnx("Add", total, segments, like=m.y)
    epsilon = _attributes(m)["epsilon"]
    y = new.onnx("LayerNormalization", total, m.gamma, m.beta, like=m.y, axis=-1, epsilon=epsilon)
    replaced = {m.y: y} | ({m.total: total} if m.total is not None else {})
    if m.mask_index is not None:
        replaced[m.mask_index] = _words(m, m.mask_index, new)
    return replaced


@respelling
@emitting("FastGelu")
@rule
def unfuse_biased_gelu(m: BiasedGelu, new: Emit, cfg: object) -> Replacement:
    """BiasGelu, and FastGelu with a bias: an Add before the activation."""
    total = new.onnx("Add", m.x, m.bias, like=m.y)
    return new.onnx(m.root.op.removeprefix("Bias"), total, like=m.y, domain=MICROSOFT)


@respelling
@emitting("FastGelu")
@rule
def unfuse_gemm_fast_gelu(m: GemmFastGelu, new: Emit, cfg: object) -> Replacement:
    """GemmFastGelu: a MatMul, the Add of its bias, and FastGelu."""
    y = new.onnx("MatMul", m.x, m.w, like=m.y)
    if _there(m.bias):
        y = new.onnx("Add", y, m.bias, like=m.y)
    return new.onnx("FastGelu", y, like=m.y, domain=MICROSOFT)


@respelling
@rule
def unfuse_gemm(m: FusedGemm, new: Emit, cfg: object) -> Replacement:
    """FusedGemm: a Gemm and the activation that it names."""
    a = _attributes(m)
    inputs = [m.a, m.b, *([m.c] if _there(m.c) else [])]
    y = new.onnx("Gemm", *inputs, like=m.y, **{k: a[k] for k in ("alpha", "beta", "transA", "transB")})
    return _activated(y, m, new)


@respelling
@rule
def unfuse_matmul_activation(m: FusedMatMulActivation, new: Emit, cfg: object) -> Replacement:
    """FusedMatMulActivation: a FusedMatMul and the activation that it names."""
    kept = {k: v for k, v in _attributes(m).items() if k == "alpha" or k.startswith("trans")}
    return _activated(new.onnx("FusedMatMul", m.a, m.b, like=m.y, domain=MICROSOFT, **kept), m, new)


@respelling
@rule
def unfuse_transpose_matmul(m: TransposeMatMul, new: Emit, cfg: object) -> Replacement:
    """TransposeMatMul: FusedMatMul's name in older models."""
    return new.onnx("FusedMatMul", m.a, m.b, like=m.y, domain=MICROSOFT, **_attributes(m))


@respelling
@rule
def unfuse_attention(m: Attention, new: Emit, cfg: object) -> Replacement:
    """Attention: a packed Linear, Split and MultiHeadAttention, the past and present keys and values stacked."""
    a = _attributes(m)
    need(not a["do_rotary"], "it rotates q and k itself, which MultiHeadAttention does not")
    need(not a["past_present_share_buffer"], "its past and present share a buffer")
    if m.mask is not None and m.mask.name:
        _need_mask(m.mask.shape, m.x.shape, _there(m.past))
    n = m.w.shape[1]
    sizes = a["qkv_hidden_sizes"] or [n // 3] * 3
    need(sum(sizes) == n, f"q, k and v are {sizes} wide, the weight {n}")
    dtype, lead = m.y.dtype, m.x.shape[:-1] if m.x.shape is not None else (None, None)
    # the node's own operand, whose constant keeps its name, and not the view of it
    qkv = new.onnx("MatMul", m.x, m.root.inputs[1], dtype=dtype, shape=(*lead, n))
    if _there(m.bias):
        qkv = new.onnx("Add", qkv, m.bias, like=qkv)
    q, k, v = new.nodes("Split", [qkv, np.array(sizes, np.int64)], [(dtype, (*lead, s)) for s in sizes], axis=-1)
    mask, scores = (i if _there(i) else None for i in (m.mask, m.scores))
    inputs: list[Any] = [q, k, v, None, mask, scores]
    if _there(m.past):
        inputs += [new.onnx("Gather", m.past, np.int64(i), dtype=dtype, axis=0) for i in (0, 1)]
    while inputs[-1] is None:
        inputs.pop()
    outputs: list[Any] = [(m.y.dtype, m.y.shape)]
    if _there(m.past) or m.present is not None:
        outputs += [(dtype, None), (dtype, None)]
    kept = {x: a[x] for x in ("num_heads", "unidirectional", "scale", "mask_filter_value") if a[x] is not None}
    y, *states = new.nodes("MultiHeadAttention", inputs, outputs, MICROSOFT, **kept)
    if m.present is None:
        return y
    axis = np.array([0], np.int64)
    stacked = [new.onnx("Unsqueeze", s, axis, dtype=dtype) for s in states]
    return {m.y: y, m.present: new.onnx("Concat", *stacked, like=m.present, axis=0)}


def _there(v: Value | Const | None) -> bool:
    """Whether an optional input is given: one that is left out before others has no name."""
    return v is not None and bool(v.name)


def _attributes(m: Pattern) -> dict[str, Any]:
    """The node's attributes, the defaults of those that it leaves out."""
    return {**CONTRIB[MICROSOFT, m.root.op].defaults, **m.root.attrs}


def _is_product(v: Value) -> bool:
    """Whether a bias that is added to the value can be that of a Linear."""
    maker = producer(v)
    return maker is not None and maker.op in ("MatMul", "FusedMatMul")


def _activated(y: Value, m: FusedGemm | FusedMatMulActivation, new: Emit) -> Value:
    a = _attributes(m)
    kind = a["activation"]
    need(kind in ACTIVATIONS, f"its activation is {kind or 'not given'}; qpass knows {', '.join(ACTIVATIONS)}")
    given = {k: a[f"activation_{k}"] for k in ("alpha", "beta", "gamma") if a[f"activation_{k}"] is not None}
    odd = [f"activation_{k}" for k in given if k not in ACTIVATIONS[kind]]
    need(not odd, f"its attribute {' and '.join(odd)} is none that {kind} has")
    return new.onnx(kind, y, like=m.y, **given)


def _positions(m: EmbedNorm, new: Emit) -> Value:
    """The embeddings of the positions given, or of 0, 1, … up to the length of the rows."""
    int64, ids = np.dtype(np.int64), m.position_ids
    shape = m.y.shape
    if not _there(ids):
        one = np.int64(1)
        length = new.onnx("Gather", new.onnx("Shape", m.ids, dtype=int64, shape=(2,)), one, dtype=int64, shape=())
        ids = new.onnx("Range", np.int64(0), length, one, dtype=int64, shape=(None,))
        shape = shape[1:] if shape is not None else None
    return new.onnx("Gather", m.positions, ids, dtype=m.y.dtype, shape=shape)


def _words(m: EmbedNorm, like: Value, new: Emit) -> Value:
    """How many words of each row the mask leaves: those where it is 1; none where there is no mask."""
    int32 = np.dtype(np.int32)
    if _there(m.mask):
        kept = new.onnx("Equal", m.mask, np.int32(1), dtype=np.dtype(bool))
        words = new.onnx("Cast", kept, dtype=int32, to=6)
    else:
        words = new.onnx("Mul", m.ids, np.int32(0), dtype=int32)
    return new.onnx("ReduceSum", words, np.array([1], np.int64), like=like, keepdims=0)


def _need_mask(mask: Shape | None, x: Shape | None, past: bool) -> None:
    """Decline a mask that MultiHeadAttention does not take: it knows no [2·B] bounds, and broadcasts no [B, 1]."""
    batch, length = x[:2] if x is not None else (None, None)
    fits = mask is not None and batch is not None and mask[0] == batch
    if fits and mask is not None and len(mask) > 1:
        fits = len(mask) < 4 and mask[-1] not in (None, 1) and (len(mask) == 3 or past or mask[1] == length)
    shape = "unknown" if mask is None else list(mask)
    need(fits, f"the shape of its mask is {shape}, that of its input {x and list(x)}: not known to fit")


_RULES = (
    unfuse_skip_norm,
    unfuse_embedding,
    unfuse_biased_gelu,
    unfuse_gemm_fast_gelu,
    unfuse_gemm,
    unfuse_matmul_activation,
    unfuse_transpose_matmul,
    unfuse_attention,
)

UNFUSE = (_RULES, (unfuse_skip_norm,))
"""A norm loses its bias first, then its sum: where only the bias is claimed later, the rest goes back as one."""
