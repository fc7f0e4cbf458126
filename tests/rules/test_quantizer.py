"""Modes and weights as the quantizer sees them: every scaling of W8A8, and weights that are not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qpass
from qpass.testing import feeds, model, outputs

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
two (float[B, S, 64] x) => (float[B, S, 32] y) <float[64] gamma, float[64, 48] w1, float[48, 32] w2>
{
    h = LayerNormalization<axis = -1>(x, gamma)
    m = MatMul(h, w1)
    r = Relu(m)
    y = MatMul(r, w2)
}
"""


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[Path, qpass.Stats]:
    path = tmp_path / "two.onnx"
    onnx.save(model(TEXT), path)
    np.savez(tmp_path / "sample.npz", **feeds(model(TEXT), B=4, S=16))  # type: ignore[arg-type] # numpy's own stub
    return path, qpass.calibrate(path, [tmp_path / "sample.npz"], tmp_path / "stats.npz")


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_scaling(calibrated: tuple[Path, qpass.Stats], per_token: bool, per_channel: bool) -> None:
    path, stats = calibrated
    mode = qpass.QuantMode.use_smooth_quant(per_token, per_channel)
    done = qpass.rewrite(path, spec=qpass.QuantSpec(mode=mode), calibration=stats)
    assert done.ledger.coverage() == 1
    result = onnx.load(done.output)
    gemms = [n for n in result.graph.node if n.op_type == "SmoothQuantGemm"]
    for n in gemms:
        got = {a.name: a.i for a in n.attribute if a.type == onnx.AttributeProto.INT}
        assert (got["has_per_token_scaling"], got["has_per_channel_scaling"]) == (per_token, per_channel)
    shapes = {t.name: list(t.dims) for t in result.graph.initializer}
    assert [shapes[n.input[3]] for n in gemms] == ([[48], [32]] if per_channel else [[1], [1]])
    given = feeds(model(TEXT), B=4, S=16)
    want, got_y = outputs(model(TEXT), given)[0], outputs(result, given)[0]
    assert np.linalg.norm(got_y - want) < 0.05 * np.linalg.norm(want)


def test_per_tensor_scale_is_amax_of_the_smoothed_weight(calibrated: tuple[Path, qpass.Stats]) -> None:
    path, _ = calibrated
    spec = qpass.QuantSpec(mode=qpass.QuantMode.use_smooth_quant(True, False))
    done = qpass.rewrite(path, spec=spec)
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(done.output).graph.initializer}
    w1 = next(numpy_helper.to_array(t) for t in model(TEXT).graph.initializer if t.name == "w1")
    scale = np.float32(np.abs(w1).max()) / np.float32(127)
    gemm = next(n for n in onnx.load(done.output).graph.node if n.op_type == "SmoothQuantGemm")
    assert arrays[gemm.input[3]] == scale
    assert np.array_equal(arrays[gemm.input[1]], np.rint(w1.T / scale).astype(np.int8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("per_channel", [True, False])
def test_not_finite_is_named(tmp_path: Path, value: float, per_channel: bool) -> None:
    w2 = np.zeros((48, 32), np.float32)
    w2[7, 5] = value
    path = tmp_path / "bad.onnx"
    onnx.save(model(TEXT, w2=w2), path)
    spec = qpass.QuantSpec(mode=qpass.QuantMode.use_smooth_quant(True, per_channel))
    with pytest.raises(qpass.QpassError, match="weight 'w2' holds NaN or infinite values"):
        qpass.rewrite(path, spec=spec)
    assert not path.with_name("bad.qpass.onnx").exists()
