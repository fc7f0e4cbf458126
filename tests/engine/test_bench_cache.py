"""`qpass bench` of a model with a KV cache: points of first and later steps, and engines that span them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpass.engine import build_files
from qpass.engine.bench import Building, bench
from qpass.errors import QpassError
from qpass.plugins import Library
from qpass.testing import model
from tests.engine.fake_gpu import quick

TEXT = """
<ir_version: 10, opset_import: ["" : 17]>
step (float[batch, new_length, 64] x, float[batch, total_length] mask, float[batch, past_length, 64] key)
  => (float[batch, total_length, 64] y)
<float[64, 64] w, int64[1] axes = {2}>
{
    [fc] m = MatMul(x, w)
    [cache] k = Concat<axis = 1>(key, m)
    [wide] u = Unsqueeze(mask, axes)
    [masked] y = Mul(k, u)
}
"""
FIRST, LATER = {"x": (1, 8, 64), "key": (1, 0, 64)}, {"x": (1, 1, 64), "key": (1, 16, 64)}


@pytest.fixture
def step(tmp_path: Path) -> Path:
    path = tmp_path / "step.onnx"
    onnx.save(model(TEXT), path)
    return path


def test_points_of_first_and_later_steps(step: Path, built: list[dict[str, Any]], tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    keep.mkdir()
    report = bench(step, Building(backend="tensorrt", keep=keep), quick(), shapes=[FIRST, LATER])
    assert [p.shapes["mask"] for p in report.points] == [(1, 8), (1, 17)]
    assert [p.shapes["key"] for p in report.points] == [(1, 0, 64), (1, 16, 64)]
    assert report.points[0].batch == 1
    spans = [{n: built[0][f"{end}_shapes"][n] for n in ("x", "mask", "key")} for end in ("min", "opt", "max")]
    assert spans == [
        {"x": (1, 1, 64), "mask": (1, 1), "key": (1, 0, 64)},
        {"x": (1, 8, 64), "mask": (1, 8), "key": (1, 0, 64)},
        {"x": (1, 8, 64), "mask": (1, 24), "key": (1, 16, 64)},
    ]
    engine = keep / "step.baseline.engine"
    alone = bench(engine, method=quick(), shapes=[{"key": (1, 3, 64)}, {"x": (1, 2, 64), "mask": (1, 4)}])
    assert [p.shapes["mask"] for p in alone.points] == [(1, 11), (1, 4)]
    assert [p.shapes["key"] for p in alone.points] == [(1, 3, 64), (1, 2, 64)]


def test_what_is_given_spans_dims_of_that_name(step: Path, built: list[dict[str, Any]]) -> None:
    how = Building(backend="tensorrt", max_shapes={"x": (4, 32, 64)})
    bench(step, how, quick(), shapes=[FIRST])
    assert built[0]["max_shapes"] == {"x": (4, 32, 64), "mask": (4, 32), "key": (4, 0, 64)}


def test_contradictions(step: Path, built: list[dict[str, Any]], tmp_path: Path) -> None:
    how = Building(backend="tensorrt")
    with pytest.raises(
        QpassError, match=r"--shapes: 'batch' is 1 in 'x' and 2 in 'key'; dims of one name are the same"
    ):
        bench(step, how, shapes=[{"x": (1, 8, 64), "key": (2, 0, 64)}])
    with pytest.raises(
        QpassError, match=r"'total_length' is 9, which is not 'past_length' \(0\) \+ 'new_length' \(8\)"
    ):
        bench(step, how, shapes=[FIRST | {"mask": (1, 9)}])
    with pytest.raises(QpassError, match="--shapes x:1x0x64 does not fit"):
        bench(step, how, shapes=[{"x": (1, 0, 64)}])
    x, mask, key = (np.zeros(shape, np.float32) for shape in ((1, 8, 64), (1, 9), (1, 4, 64)))
    np.savez(tmp_path / "x.npz", x=x, mask=mask, key=key)
    with pytest.raises(QpassError, match="--inputs: 'total_length' is 9"):
        bench(step, how, inputs=tmp_path / "x.npz")
    assert not built


def test_tensorrt_builds_for_an_empty_past(step: Path, library: Library, tmp_path: Path) -> None:
    done = build_files(
        step,
        tmp_path / "step.engine",
        backend="tensorrt_rtx",
        min_shapes={"x": (1, 1, 64), "key": (1, 0, 64)},
        opt_shapes=FIRST,
        max_shapes={"x": (1, 8, 64), "key": (1, 16, 64)},
    )
    assert done.facts["profiles"]["key"] == {"min": [1, 0, 64], "opt": [1, 0, 64], "max": [1, 16, 64]}
    assert done.facts["profiles"]["mask"] == {"min": [1, 1], "opt": [1, 8], "max": [1, 24]}
    assert done.facts["dims"]["mask"] == ["batch", "total_length"]
