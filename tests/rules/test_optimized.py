"""ONNX Runtime's own optimized graphs of the zoo: what is found in them is what is found in the originals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

import qpass
from qpass.graph import Model
from qpass.graph.emit import emit
from qpass.pipeline import Rewritten, rewrite
from qpass.rules import Lifted
from qpass.testing import feeds
from tests import zoo
from tests.rules.kit import Array, Graph, ops

PRESETS = ("w8a16", "w8a8")
GEMMS = {"SmoothQuantGemm", "WeightOnlyQuantMatmul"}
NORMS = {"LayernormQuantization", "RmsnormQuantization"}

HEADS, WIDTH = 2, 16

SESSION = (
    "bert_ts14",
    "bert_dynamo",
    "bert_dynamo_fp16",
    "distilbert_ts",
    "gemma_dynamo",
    "gpt2_past_ts",
    "llama_past_dynamo",
    "opt_ts",
    "phi_ts",
    "qwen2_dynamo",
    "t5_dynamo",
    "vit_ts",
    "whisper_encoder_dynamo",
)
"""One of each family."""


def session(path: Path, folder: Path) -> Path:
    """What a session makes of a model at the extended level."""
    copy, out = folder / path.name, folder / f"{path.stem}.extended.onnx"
    copy.write_bytes(path.read_bytes())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(copy), options, providers=["CPUExecutionProvider"])
    return out


def transformers(path: Path, folder: Path, kind: str, heads: int = 0, width: int = 0, half: bool = False) -> Path:
    """What onnxruntime.transformers makes of it, by fusions of its own written in Python."""
    from onnxruntime.transformers.optimizer import optimize_model  # logs as it is imported

    copy, out = folder / path.name, folder / f"{path.stem}.{kind}.onnx"
    copy.write_bytes(path.read_bytes())
    model = optimize_model(str(copy), model_type=kind, num_heads=heads, hidden_size=width, opt_level=0, use_gpu=False)
    if half:
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(out))
    return out


def found(done: Rewritten) -> dict[str, Any]:
    """Output channels of the rewritten Linears by K, those fed by a norm, and how many norms quantize.

    Channels and not Linears, since an optimizer may pack q, k and v into one.
    """
    proto = onnx.load(done.output)
    dims = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    normed = {n.output[0] for n in proto.graph.node if n.op_type in NORMS}
    channels: Counter[int] = Counter()
    fed: Counter[int] = Counter()
    for n in proto.graph.node:
        if n.op_type in GEMMS:
            rows, k = dims[n.input[1]]
            channels[k] += rows
            fed[k] += rows if n.input[0] in normed else 0
    norms = sum(n.op_type in NORMS for n in proto.graph.node)
    statuses = Counter(s.status for s in done.ledger.of("norm"))
    return {"channels": channels, "fed": fed, "norms": norms, "statuses": statuses}


def results(path: Path, inputs: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    run: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {i.name for i in run.get_inputs()}
    return list(run.run(None, {k: v for k, v in inputs.items() if k in taken}))


def compare_counts(original: Path, optimized: Path, preset: str = "w8a8") -> list[Rewritten]:
    """The same is rewritten in both, and no site is named twice or declined."""
    both = [rewrite(path, path.with_suffix(f".{preset}.onnx"), spec=preset) for path in (original, optimized)]
    assert found(both[1]) == found(both[0])
    sites = both[1].ledger.sites
    assert [(s.nodes, s.reason) for s in sites if s.status in ("declined", "near_miss")] == []
    assert max(Counter(n for s in sites for n in s.nodes).values()) == 1
    return both


def compare(original: Path, optimized: Path, inputs: dict[str, Array], half: bool = False) -> None:
    """The same is rewritten in both, and gives the same up to rounding."""
    for preset in PRESETS:
        both = compare_counts(original, optimized, preset)
        for a, b in zip(*(results(done.output, inputs) for done in both), strict=True):
            if a.dtype.kind == "f":
                x, y = a.astype(np.float64), b.astype(np.float64)
                exact = 0.01 if half or a.dtype == np.float16 else 1e-5
                assert np.linalg.norm(x - y) <= (exact if preset == "w8a16" else 0.03) * np.linalg.norm(x)


def check_session(path: Path, folder: Path) -> None:
    out = session(path, folder)
    model = Model.load(out)
    Lifted(model).unlift()
    assert emit(model).proto.graph.node == model.proto.graph.node
    compare(folder / path.name, out, zoo.samples(path)[0])


@zoo.each(*SESSION)
def test_session(path: Path, tmp_path: Path) -> None:
    check_session(path, tmp_path)


@pytest.mark.slow
@zoo.each()
def test_each_session(path: Path, tmp_path: Path) -> None:
    check_session(path, tmp_path)


@zoo.each("bert_dynamo", "gpt2_ts14", "t5_ts", "vit_ts", "whisper_encoder_ts")
def test_transformers(path: Path, tmp_path: Path) -> None:
    kinds = {"bert": "bert", "gpt2": "gpt2", "t5": "t5", "vit": "vit", "whisper": "bart"}
    out = transformers(path, tmp_path, kinds[path.stem.partition("_")[0]])
    assert any(op.startswith("Skip") for op in ops(onnx.load(out)))
    compare(tmp_path / path.name, out, zoo.samples(path)[0])


@zoo.each("bert_plain_ts")
def test_converted_to_half(path: Path, tmp_path: Path) -> None:
    out = transformers(path, tmp_path, "bert", half=True)
    assert "SkipLayerNormalization" in ops(onnx.load(out))
    compare(tmp_path / path.name, out, zoo.samples(path)[0], half=True)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_attention_and_embedding(mask: bool, half: bool, tmp_path: Path) -> None:
    """A layer written so that all of its attention becomes one operator, and its embedding another."""
    path = tmp_path / "bert.onnx"
    onnx.save(classic_bert(mask), path)
    folder = tmp_path / "optimized"
    folder.mkdir()
    out = transformers(path, folder, "bert", HEADS, WIDTH, half)
    left = ["MatMul", "SkipLayerNormalization", "MatMul", "BiasGelu", "MatMul", "SkipLayerNormalization"]
    assert [op for op in ops(onnx.load(out)) if op != "Cast"] == ["EmbedLayerNormalization", "Attention", *left]
    if half:  # ONNX Runtime has no Attention in float16 on the CPU
        compare_counts(path, out)
        return
    inputs = feeds(onnx.load(path), B=2, S=5)
    if mask:  # the optimizer takes for granted that padding is on the right
        inputs["attention_mask"] = np.tri(5, dtype=np.int64)[[4, 2]]
    compare(path, out, inputs)


def test_calibrated(tmp_path: Path) -> None:
    """Statistics are of tensors that the fused model has."""
    path, folder = tmp_path / "bert.onnx", tmp_path / "optimized"
    folder.mkdir()
    onnx.save(classic_bert(mask=False), path)
    out = transformers(path, folder, "bert", HEADS, WIDTH)
    inputs = feeds(onnx.load(path), B=2, S=5)
    np.savez(tmp_path / "sample.npz", allow_pickle=False, **inputs)
    stats = qpass.calibrate(out, [tmp_path / "sample.npz"], tmp_path / "stats.npz")
    done = rewrite(out, folder / "static.onnx", spec="w8a8-static", calibration=stats)
    assert Counter(s.status for s in done.ledger.of("linear")) == {"rewritten": 4}
    for x, y in zip(results(out, inputs), results(done.output, inputs), strict=True):
        assert np.linalg.norm(x - y) <= 0.05 * np.linalg.norm(x)


def classic_bert(mask: bool) -> onnx.ModelProto:
    """One layer as exporters wrote it in 2020: attention step by step, a mask added to its scores."""
    g = Graph(opset=14)
    i64, k = np.int64, WIDTH

    def linear(x: str, inner: int, n: int) -> str:
        return g.op("Add", g.op("MatMul", x, g.weight(inner, n)), g.gain(n))

    def heads(x: str, perm: list[int]) -> str:
        return g.op("Transpose", g.op("Reshape", x, g.const([0, 0, HEADS, k // HEADS], i64)), perm=perm)

    def norm(x: str, out: str = "") -> str:
        d = g.op("Sub", x, g.reduce("ReduceMean", x, -1))
        variance = g.reduce("ReduceMean", g.op("Pow", d, g.const(2.0)), -1)
        root = g.op("Sqrt", g.op("Add", variance, g.const(1e-5)))
        return g.op("Add", g.op("Mul", g.op("Div", d, root), g.gain(k)), g.gain(k), out=out)

    ids, segment_ids = (g.input(i, ["B", "S"], TensorProto.INT64) for i in ("input_ids", "token_type_ids"))
    length = g.op("Unsqueeze", g.op("Gather", g.op("Shape", ids), g.const(1, i64), axis=0), g.const([0], i64))
    ends = [g.const([0], i64), length, g.const([1], i64), g.const([1], i64)]
    positions = g.op("Slice", g.const(np.arange(9)[None], i64), *ends)
    embedded = g.op("Add", g.op("Gather", g.weight(9, k), ids), g.op("Gather", g.weight(2, k), segment_ids))
    h = norm(g.op("Add", embedded, g.op("Gather", g.weight(9, k), positions)))
    query, key, value = (heads(linear(h, k, k), perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    scores = g.op("Div", g.op("MatMul", query, key), g.const((k / HEADS) ** 0.5))
    if mask:
        given = g.input("attention_mask", ["B", "S"], TensorProto.INT64)
        given = g.op("Unsqueeze", g.op("Unsqueeze", given, g.const([1], i64)), g.const([2], i64))
        hidden = g.op("Sub", g.const(1.0), g.op("Cast", given, to=TensorProto.FLOAT))
        scores = g.op("Add", scores, g.op("Mul", hidden, g.const(-10000.0)))
    mixed = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    h = norm(g.op("Add", linear(g.op("Reshape", mixed, g.const([0, 0, k], i64)), k, k), h))
    x = linear(h, k, 2 * k)
    erf = g.op("Add", g.op("Erf", g.op("Div", x, g.const(2**0.5))), g.const(1.0))
    norm(g.op("Add", linear(g.op("Mul", g.op("Mul", x, erf), g.const(0.5)), 2 * k, k), h), out="y")
    return g.model("y")
