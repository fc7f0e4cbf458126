"""Models of the zoo as other tools quantize them: the same Linears are found, and the numbers are the quantized ones.

The tools are ONNX Runtime's: MatMulNBits (what Olive and onnxruntime-genai write) and static QDQ. DequantizeLinear of
int4 in blocks, as ModelOpt writes it, is written here.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper, version_converter
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from qpass.pipeline import Rewritten, rewrite
from tests import zoo

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:onnxruntime")
"""Its quantizer stumbles over ranges of nothing, and over masks of -inf."""

Make = Callable[[Path, Path], None]


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no type hints
    """The zoo's one sample of a model."""

    def __init__(self, path: Path) -> None:
        self.left: Iterator[Any] = iter([zoo.samples(path)[0]])

    def get_next(self) -> Any:
        return next(self.left, None)


def nbits(symmetric: bool) -> Make:
    def make(path: Path, to: Path) -> None:
        tool = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=symmetric)
        tool.process()
        onnx.save(tool.model.model, to)

    return make


def qdq(activations: str, weights: str, per_channel: bool, only: Sequence[str] = ()) -> Make:
    def make(path: Path, to: Path) -> None:
        copy = to.with_name("copy.onnx")  # tools have been seen to overwrite what they are given
        shutil.copyfile(path, copy)
        quantization.quantize_static(
            copy,
            to,
            Samples(path),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=quantization.QuantType[activations],
            weight_type=quantization.QuantType[weights],
            op_types_to_quantize=list(only) or None,
        )

    return make


def int4_blocks(path: Path, to: Path) -> None:
    """DequantizeLinear of int4 with a scale per 32 inputs, before every MatMul and Gemm whose weight allows it."""
    model = onnx.load(path)
    if max(o.version for o in model.opset_import if not o.domain) < 21:
        model = version_converter.convert_version(model, 21)
    graph = model.graph
    model.ir_version = max(model.ir_version, 10)
    weights = {t.name: t for t in graph.initializer}
    done: dict[str, str] = {}
    for node in list(graph.node):
        name = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        if name not in weights or weights[name].dims[turned] % 32 or len(weights[name].dims) != 2:
            continue
        if name not in done:
            done[name] = f"{name}.int4"
            w = numpy_helper.to_array(weights[name])
            axis = int(turned)
            groups = np.moveaxis(w, axis, 0).reshape(-1, 32, w.shape[1 - axis]).astype(np.float32)
            scale = (np.abs(groups).max(axis=1) / 7).astype(w.dtype)
            q = np.clip(np.rint(groups / np.maximum(scale, 1e-6)[:, None].astype(np.float32)), -8, 7)
            tensors = {"q": q.reshape(-1, w.shape[1 - axis]).astype(ml_dtypes.int4), "scale": scale}
            for suffix, tensor in tensors.items():
                array = np.ascontiguousarray(np.moveaxis(tensor, 0, axis))
                graph.initializer.append(numpy_helper.from_array(array, f"{name}.{suffix}"))
            names = [f"{name}.{suffix}" for suffix in tensors]
            dq = helper.make_node("DequantizeLinear", names, [done[name]], f"{name}.dq", axis=axis, block_size=32)
            graph.node.insert(0, dq)
        node.input[1] = done[name]
    onnx.save(model, to)


def outputs(path: Path, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs without ONNX Runtime's optimizer, which computes some of these models in another way."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def check(path: Path, make: Make, folder: Path, preset: str, rtol: float) -> Rewritten:
    """Quantize a model with a tool and rewrite that: every Linear of the ground truth is rewritten or excluded."""
    made = folder / "quantized.onnx"
    make(path, made)
    done = rewrite(made, folder / "out.onnx", spec=preset)
    onnx.checker.check_model(str(done.output), full_check=True)
    linears = done.ledger.of("linear")
    assert len(linears) == len(zoo.truth(path)["linears"])
    assert {s.status for s in linears} <= {"rewritten", "excluded"}, Counter(s.reason for s in linears)
    before = rewrite(path, dry_run=True).ledger.of("linear")
    assert sum(s.status == "rewritten" for s in linears) >= sum(s.status == "rewritten" for s in before)
    feeds, _ = zoo.samples(path)
    for want, got in zip(outputs(made, feeds), outputs(done.output, feeds), strict=True):
        if want.dtype.kind == "f":
            assert np.linalg.norm(want.astype(np.float64) - got) <= rtol * np.linalg.norm(want.astype(np.float64))
    return done


def came(done: Rewritten, what: str) -> int:
    return sum((s.reason or "").startswith(f"its weight came quantized: {what}") for s in done.ledger.of("linear"))


@zoo.each("bert_ts14", "gemma_dynamo", "gpt2_ts", "llama_past_ts", "llama_ts_fp16", "phi_ts", "t5_dynamo")
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits(path: Path, symmetric: bool, tmp_path: Path) -> None:
    done = check(path, nbits(symmetric), tmp_path, "w8a16", 0.03)
    left = sum(n.op_type == "MatMulNBits" for n in onnx.load(tmp_path / "quantized.onnx").graph.node)
    assert came(done, "uint4, group 32" + ("" if symmetric else ", with zero points")) == left > 0


@zoo.each("bert_ts14", "gemma_dynamo", "gpt2_ts", "opt_dynamo", "phi_ts")
@pytest.mark.parametrize("activations", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_qdq(path: Path, per_channel: bool, activations: str, tmp_path: Path) -> None:
    done = check(path, qdq(activations, "QInt8", per_channel), tmp_path, "w4a16", 5e-3)
    rewritten = [s for s in done.ledger.of("linear") if s.status == "rewritten"]
    assert {s.op for s in rewritten} == {"SmoothQuantGemm"}
    assert came(done, "int8" + ("; static" if per_channel else ", per tensor; static")) == len(rewritten)


@zoo.each("bert_ts14", "gemma_dynamo", "gpt2_ts", "llama_ts", "qwen2_dynamo", "vit_ts", "whisper_encoder_dynamo")
def test_what_feeds_whom_in_qdq(path: Path, tmp_path: Path) -> None:
    """With the products alone quantized, norms and MLPs are found as in the original, and feed as many Linears.

    A head that is the embedding's becomes a weight of its own: it is one more.
    """
    # what lies on the edge between two integers may fall to either side, and here every product's result is rounded:
    # Llama's first q, k, v agree to 2e-7, its logits, on steps of 1 % of their range, to 1.3e-2
    done = check(path, qdq("QInt8", "QInt8", True, ["MatMul", "Gemm"]), tmp_path, "w8a8", 0.03)
    before = rewrite(path, spec="w8a8", dry_run=True).ledger
    heads = sum(s.status == "excluded" for s in before.of("linear"))
    for kind in "norm", "mlp":
        found, wanted = (sum(s.status == "rewritten" for s in ledger.of(kind)) for ledger in (done.ledger, before))
        assert wanted <= found <= wanted + heads, kind
    fed, as_before = (sum(s.fed_by is not None for s in ledger.sites) for ledger in (done.ledger, before))
    assert as_before <= fed <= as_before + heads


@zoo.each("bert_ts14", "gemma_dynamo", "phi_ts")
def test_qdq_with_zero_points_of_weights(path: Path, tmp_path: Path) -> None:
    done = check(path, qdq("QUInt8", "QUInt8", False), tmp_path, "w8a8", 5e-3)
    assert came(done, "uint8, per tensor") == sum(s.status == "rewritten" for s in done.ledger.of("linear"))


@zoo.each("bert_dynamo", "gpt2_dynamo_fp16", "llama_dynamo23", "llama_ts_fp16", "opt_ts", "whisper_encoder_dynamo")
@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
def test_int4_blocks(path: Path, preset: str, tmp_path: Path) -> None:
    done = check(path, int4_blocks, tmp_path, preset, 5e-3 if "fp16" in path.stem else 1e-4)
    assert came(done, "int4, group 32") == sum(s.status == "rewritten" for s in done.ledger.of("linear"))
