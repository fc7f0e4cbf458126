"""A model with a function for each module and each operator, as torch's first dynamo exporter wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qpass.calibrate import calibrate
from qpass.pipeline import rewrite
from qpass.testing import feeds, model
from qpass.verify import verify
from tests.rules.kit import error, ops, run

K = 32

TEXT = """
<ir_version: 10, opset_import: ["" : 18, "pkg.model" : 1, "pkg.aten" : 1]>
g (float[B, S, 32] x) => (float[B, S, 32] y)
<float[32] norm0, float[96, 32] up0, float[32, 96] down0, float[32] norm1, float[96, 32] up1, float[32, 96] down1>
{
    h = pkg.model.Block(x, norm0, up0, down0)
    y = pkg.model.Block(h, norm1, up1, down1)
}
<domain: "pkg.model", opset_import: ["" : 18, "pkg.model" : 1, "pkg.aten" : 1]>
Block (x, g, up, down) => (y) {
    n = pkg.model.RMSNorm <eps = 1e-6> (x, g)
    m = pkg.model.MLP(n, up, down)
    y = pkg.aten.add(x, m)
}
<domain: "pkg.model", opset_import: ["" : 18, "pkg.aten" : 1]>
RMSNorm <eps> (x, g) => (y) {
    two = Constant <value_float = 2.0> ()
    e = Constant <value_float: float = @eps> ()
    p = pkg.aten.pow(x, two)
    v = pkg.aten.mean(p)
    a = pkg.aten.add(v, e)
    r = pkg.aten.rsqrt(a)
    n = pkg.aten.mul(x, r)
    y = pkg.aten.mul(g, n)
}
<domain: "pkg.model", opset_import: ["" : 18, "pkg.model" : 1, "pkg.aten" : 1]>
MLP (x, up, down) => (y) {
    h = pkg.model.Linear(x, up)
    s = pkg.aten.silu(h)
    y = pkg.model.Linear(s, down)
}
<domain: "pkg.model", opset_import: ["" : 18, "pkg.aten" : 1]>
Linear (x, w) => (y) {
    t = pkg.aten.t(w)
    y = pkg.aten.matmul(x, t)
}
<domain: "pkg.aten", opset_import: ["" : 18]>
t (x) => (y) { y = Transpose <perm = [1, 0]> (x) }
<domain: "pkg.aten", opset_import: ["" : 18]>
matmul (a, b) => (y) { y = MatMul(a, b) }
<domain: "pkg.aten", opset_import: ["" : 18]>
add (a, b) => (y) { y = Add(a, b) }
<domain: "pkg.aten", opset_import: ["" : 18]>
mul (a, b) => (y) { y = Mul(a, b) }
<domain: "pkg.aten", opset_import: ["" : 18]>
pow (a, b) => (y) { y = Pow(a, b) }
<domain: "pkg.aten", opset_import: ["" : 18]>
mean (x) => (y) {
    axes = Constant <value_ints = [-1]> ()
    y = ReduceMean <keepdims = 1> (x, axes)
}
<domain: "pkg.aten", opset_import: ["" : 18]>
rsqrt (x) => (y) {
    s = Sqrt(x)
    y = Reciprocal(s)
}
<domain: "pkg.aten", opset_import: ["" : 18]>
silu (x) => (y) {
    s = Sigmoid(x)
    y = Mul(x, s)
}
"""


@pytest.mark.parametrize("spec", ["w8a16", "w4a16", "w8a8"])
def test_every_linear_and_norm(spec: str) -> None:
    proto = model(TEXT)
    done, result = run(proto, spec)
    status = "rewritten" if spec == "w8a8" else "kept"
    linear = ("linear", "rewritten")
    assert [(s.kind, s.status) for s in done.ledger.sites] == [("norm", status), linear, ("mlp", status), linear] * 2
    assert error(proto, result) < (0.3 if spec == "w4a16" else 0.03)
    assert done.ledger.sites[1].nodes == [
        "Block@h/MLP@m/Linear@h/t@t/Transpose@y",
        "Block@h/MLP@m/Linear@h/matmul@y/MatMul@y",
    ]
    assert [s.fed_by for s in done.ledger.of("linear")] == ([0, None, 4, None] if spec == "w8a8" else [None] * 4)
    left = {(f.domain, f.name) for f in result.functions if f.domain != "qpass"}
    weight_only = {("pkg.model", "RMSNorm"), *(("pkg.aten", f) for f in ("add", "mul", "pow", "mean", "rsqrt", "silu"))}
    assert left == ({("pkg.aten", "add")} if spec == "w8a8" else weight_only)
    assert run(result, spec)[1] == result


def test_weights_are_counted_and_written_once() -> None:
    done, result = run(model(TEXT))
    assert done.ledger.bytes_before == 4 * (2 * K + 4 * K * 96)
    assert done.ledger.bytes_after == 4 * 2 * K + 4 * K * 96 + 4 * 2 * (K + 96)
    assert ops(result).count("WeightOnlyQuantMatmul") == 4


def test_calibration_and_verify_see_into_functions(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = model(TEXT)
    onnx.save(proto, path)
    np.savez(tmp_path / "sample.npz", **feeds(proto, B=2, S=8))  # type: ignore[arg-type] # numpy's own stub
    stats = calibrate(path, [tmp_path / "sample.npz"], tmp_path / "stats.npz")
    assert len(stats.tensors) == 4
    done = rewrite(path, spec="w8a8-static", calibration=stats)
    assert {s.status for s in done.ledger.sites} == {"rewritten"}
    assert all("error" in (s.reason or "") for s in done.ledger.of("linear"))
    assert error(proto, onnx.load(done.output)) < 0.03
    found = verify(path, done.output, layers=True)
    assert found.passed
    assert [s.name for s in found.sites if s.kind == "linear"] == [s.name for s in done.ledger.of("linear")]
