from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import numpy_helper

from qpass.calibrate import calibrate
from qpass.calibrate.synthetic import Synthetic
from qpass.errors import QpassError
from qpass.pipeline import rewrite
from qpass.runtime import Runner, load
from qpass.testing import model
from qpass.verify import Difference, SiteReport, _first_parted, verify
from tests.calibrate.conftest import TEXT, ids, samples, tiny

__all__ = ["samples", "tiny"]  # fixtures

ARRAYS = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e3, 1e3, width=32))


def changed(path: Path, out: Path, **factors: float) -> Path:
    """A copy of a model with some weights made larger."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name in factors:
            array = numpy_helper.to_array(tensor)
            noise = np.random.default_rng(7).standard_normal(array.shape).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(array + factors[tensor.name] * noise, tensor.name))
    onnx.save(proto, out)
    return out


# -- numbers


@settings(max_examples=60, deadline=None)
@given(a=ARRAYS, seed=st.integers(0, 9), cut=st.integers(0, 50))
def test_differences_add_up(a: NDArray[np.float32], seed: int, cut: int) -> None:
    b = a + np.random.default_rng(seed).standard_normal(a.shape).astype(np.float32)
    whole = Difference.of(a, b)
    parts = Difference.of(a[:cut], b[:cut])
    parts += Difference.of(a[cut:], b[cut:])
    x, y = a.astype(np.float64), b.astype(np.float64)
    for found in (whole, parts):
        assert found.max_abs == np.abs(x - y).max()
        assert found.count == a.size
        if a.any():
            assert found.relative_error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
            assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_differences_that_have_no_quotient() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert (Difference.of(zero, zero).cosine, Difference.of(zero, zero).relative_error) == (1, 0)
    assert (Difference.of(zero, one).cosine, Difference.of(zero, one).relative_error) == (0, math.inf)
    assert (Difference.of(one, zero).cosine, Difference.of(one, zero).relative_error) == (0, 1)
    empty = Difference.of(zero[:0], zero[:0])
    assert (empty.cosine, empty.relative_error, empty.share_equal) == (1, 0, 1)


def test_what_is_not_finite_must_be_the_same() -> None:
    a = np.array([1, np.nan, np.inf, -np.inf, 2], np.float32)
    same = Difference.of(a, a.copy())
    assert (same.cosine, same.relative_error, same.strays) == (1, 0, 0)
    for i, value in [(0, np.nan), (1, 1.0), (2, -np.inf), (3, np.nan), (4, np.inf)]:
        b = a.copy()
        b[i] = value
        found = Difference.of(a, b)
        assert (found.cosine, found.relative_error, found.strays) == (0, math.inf, 1)


# -- models


def test_a_model_against_itself(tiny: Path, samples: Path) -> None:
    done: list[tuple[int, int]] = []
    report = verify(tiny, tiny, data=[samples], progress=lambda *a: done.append(a))
    (y,) = report.outputs
    assert (y.cosine, y.worst_cosine, y.relative_error, y.max_abs, y.equal) == (1, 1, 0, 0, 1)
    assert report.passed
    assert (report.samples, done[-1]) == (11, (11, 11))


def test_outputs_and_the_worst_sample(tiny: Path, samples: Path, tmp_path: Path) -> None:
    other = changed(tiny, tmp_path / "o.onnx", w2=0.3)
    report = verify(tiny, other, data=[samples], minimum=0.9)
    (found,) = report.outputs
    cosines, a, b = {}, [], []
    for file in sorted(samples.iterdir()):
        with np.load(file) as batch:
            arrays = dict(batch)
        x, y = (next(Runner(p, load(p)).run(arrays))["y"] for p in (tiny, other))
        for i, keep in enumerate(arrays["attention_mask"] > 0):  # padding does not count
            p, q = x[i][keep].reshape(-1), y[i][keep].reshape(-1)
            name = str(file) if len(x) == 1 else f"{file}, sample {i}"
            cosines[name] = p @ q / np.linalg.norm(p) / np.linalg.norm(q)
            a.append(p)
            b.append(q)
    assert found.cosine == pytest.approx(np.mean(list(cosines.values())))
    assert found.worst_cosine == pytest.approx(min(cosines.values()))
    assert found.worst_sample == min(cosines, key=lambda n: float(cosines[n]))
    p, q = np.concatenate(a), np.concatenate(b)
    assert found.relative_error == pytest.approx(np.linalg.norm(p - q) / np.linalg.norm(p), rel=1e-4)
    assert found.max_abs == pytest.approx(np.abs(p - q).max())
    for step, passes in ((-1e-5, True), (1e-5, False)):
        assert verify(tiny, other, data=[samples], minimum=min(cosines.values()) + step).passed is passes


def test_cut_batches_give_the_same(tiny: Path, samples: Path, tmp_path: Path) -> None:
    other = changed(tiny, tmp_path / "o.onnx", w2=0.3)
    whole, cut = (verify(tiny, other, data=[samples], memory=m).outputs[0] for m in (1 << 20, 1))
    assert cut.worst_sample == whole.worst_sample
    assert cut.worst_cosine == pytest.approx(whole.worst_cosine, abs=1e-6)
    assert cut.cosine == pytest.approx(whole.cosine, abs=1e-6)
    assert cut.relative_error == pytest.approx(whole.relative_error, rel=1e-5)


def test_outputs_that_are_no_floats(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 8] x) => (int64[batch] best, bool[batch, 8] above) <float[8, 8] w>
    {
        y = MatMul(x, w)
        best = ArgMax<axis = 1, keepdims = 0>(y)
        zero = Constant<value = float {0}>()
        above = Greater(y, zero)
    }
    """
    path = tmp_path / "m.onnx"
    onnx.save(model(text), path)
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32))
    report = verify(path, changed(path, tmp_path / "o.onnx", w=0.5), data=[tmp_path / "a.npz"])
    for output in report.outputs:
        assert output.worst_cosine is None
        assert 0.5 < output.equal < 1
    assert not report.passed
    assert verify(path, path, data=[tmp_path / "a.npz"]).passed


def test_infinities_in_one_model_only(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 4] x) => (float[batch, 4] y) <float[4] w> { h = Mul(x, w)  y = Exp(h) }
    """
    path, other = tmp_path / "m.onnx", tmp_path / "o.onnx"
    onnx.save(model(text, w=[1] * 4), path)
    onnx.save(model(text, w=[1000] * 4), other)
    np.savez(tmp_path / "a.npz", x=np.ones((2, 4), np.float32))
    report = verify(path, other, data=[tmp_path / "a.npz"])
    assert (report.outputs[0].strays, report.passed) == (8, False)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["outputs"][0]["relative_error"] is None
    assert document["passed"] is False
    assert document["original"] == str(path)


def test_models_that_are_not_of_each_other(tiny: Path, tmp_path: Path) -> None:
    for text, message in [
        (TEXT.replace(" y)", " z)").replace("y = ", "z = "), r"has no output 'y', the original has"),
        (TEXT.replace("input_ids", "ids"), r"has no input 'input_ids', the original has"),
        (TEXT.replace("float[50, 8]", "float[50, 8] unused, float[50, 8]"), None),
        (
            TEXT.replace(" 4]", " 5]"),
            r"output 'y' is float32\[\?, \?, 4\] in the original but float32\[\?, \?, 5\] in ",
        ),
        (
            TEXT.replace("int64[batch, sequence] att", "bool[batch, sequence] att"),
            r"'attention_mask' is int64\[\?, \?\] in",
        ),
        (TEXT.replace("mask)", "mask, int64[batch] more)"), r"has the input 'more', the original has not"),
    ]:
        other = tmp_path / "other.onnx"
        onnx.save(model(text), other)
        if message is None:
            verify(tiny, other)
        else:
            with pytest.raises(QpassError, match=message):
                verify(tiny, other)


def test_missing_files(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(QpassError, match="no such file"):
        verify(tiny, tmp_path / "missing.onnx")
    with pytest.raises(QpassError, match="no such file"):
        verify(tiny, tiny, data=[tmp_path / "missing.npz"])
    with pytest.raises(QpassError, match=r"no such file: .*l\.json"):
        verify(tiny, tiny, layers=True, ledger=tmp_path / "l.json")


# -- layers


def test_the_site_where_models_part(tiny: Path, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    rewrite(tiny, out, spec="w8a16")
    report = verify(tiny, out, data=[samples], layers=True)
    assert [(s.tensor, s.kind, s.op) for s in report.sites] == [
        ("a", "linear", "WeightOnlyQuantMatmul"),  # the site is MatMul and Add
        ("y", "linear", "WeightOnlyQuantMatmul"),
    ]
    assert all(0 < s.relative_error < 0.02 for s in report.sites)
    assert report.parted is None
    assert report.notes == ()
    strict = verify(tiny, out, data=[samples], layers=True, threshold=1e-6)
    assert strict.parted == strict.sites[0]
    assert [s.tensor for s in report.worst_sites(1)] == [max(report.sites, key=lambda s: s.relative_error).tensor]


def test_a_broken_layer_is_found(tmp_path: Path) -> None:
    layers = 6
    names = [f"w{i}" for i in range(layers)]
    body = "\n".join(f"    m{i} = MatMul(x{i}, w{i})\n    x{i + 1} = Relu(m{i})" for i in range(layers))
    text = f"""
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 16] x0) => (float[batch, 16] x{layers}) <{", ".join(f"float[16, 16] {n}" for n in names)}>
    {{
{body}
    }}
    """
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    proto = model(text)
    onnx.save(proto, path)
    rewrite(path, out, spec="w8a16")
    rewritten = onnx.load(out)
    node = next(n for n in rewritten.graph.node if n.output[0] == "m3")
    scale = next(t for t in rewritten.graph.initializer if t.name == node.input[2])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 3, scale.name))
    onnx.save(rewritten, out)
    report = verify(path, out, layers=True)
    assert report.parted is not None
    assert report.parted.tensor == "m3"
    assert len(report.sites) == layers


@pytest.mark.parametrize(
    ("errors", "parted"),
    [
        ([0.01, 0.015, 0.02, 0.05], None),  # int8: errors add up
        ([0.01, 0.015, 0.15, 0.2], 2),  # a jump, though far from the threshold
        ([0.09, 0.12, 0.2, 0.4], None),  # int4
        ([0.09, 0.12, 0.51, 0.6], 2),
        ([0.9, 1.2, 1.1], 0),
        ([1e-4, 5e-4, 1e-2], None),  # a large multiple of next to nothing
        ([], None),
    ],
)
def test_where_models_part(errors: list[float], parted: int | None) -> None:
    sites = [SiteReport(f"n{i}", f"t{i}", "linear", "SmoothQuantGemm", 1.0, e) for i, e in enumerate(errors)]
    exact = SiteReport("norm", "t", "norm", "RmsnormQuantization", 1.0, 1e-9)
    assert _first_parted([exact, *sites], 0.5) == (None if parted is None else sites[parted])


def test_without_a_ledger(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    rewrite(tiny, out, spec="w8a16")
    (tmp_path / "o.ledger.json").unlink()
    report = verify(tiny, out, layers=True)
    assert [s.tensor for s in report.sites] == ["a", "y"]
    assert "no ledger" in report.notes[0]
    (tmp_path / "o.ledger.json").write_text("{}")
    with pytest.raises(QpassError, match="is no ledger"):
        verify(tiny, out, layers=True)


def test_bfloat16_models(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (bfloat16[batch, s, 64] x) => (bfloat16[batch, s, 32] y)
    <bfloat16[64] gamma, bfloat16[64] beta, bfloat16[64, 96] w, bfloat16[96] b, bfloat16[96, 32] v>
    {
        h = LayerNormalization<axis = -1>(x, gamma, beta)
        m = MatMul(h, w)
        a = Add(m, b)
        r = Relu(a)
        y = MatMul(r, v)
    }
    """
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    onnx.save(model(text), path)
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).standard_normal((4, 9, 64)).astype(np.float32))
    stats = calibrate(path, tmp_path / "a.npz", tmp_path / "s.npz")
    for preset in ("w8a16", "w8a8", "w8a8-static"):
        rewrite(path, out, spec=preset, calibration=stats if preset != "w8a16" else None)
        report = verify(path, out, data=tmp_path / "a.npz", layers=True)
        assert report.passed
        assert 0 < report.outputs[0].relative_error < 0.05
        assert len(report.sites) >= 2


def test_outputs_of_text_are_said(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 4] x) => (float[batch, 4] y, string[batch, 4] t) { y = Relu(x)  t = Cast<to = 8>(x) }
    """
    path = tmp_path / "m.onnx"
    onnx.save(model(text), path)
    report = verify(path, path)
    assert [o.name for o in report.outputs] == ["y"]
    assert report.notes == ("output 't' is no tensor of numbers and not compared",)


# -- made-up inputs


def test_made_up_inputs_fit_the_whole_zoo(zoo: list[Path]) -> None:
    for path in zoo[::2]:
        proto = load(path)
        found = next(Runner(path, proto).run(Synthetic(proto).read(3), path.name))
        assert all(np.isfinite(a).all() for a in found.values()), path.name


def test_made_up_inputs_are_said_and_the_same_every_time(tiny: Path) -> None:
    a, b = (Synthetic(load(tiny)).read(1) for _ in range(2))
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name])
    assert a["input_ids"].max() > 25  # the whole table is used
    assert a["input_ids"].max() < 50
    assert (a["attention_mask"] == 1).all()
    assert (Synthetic(load(tiny), seed=1).read(1)["input_ids"] != a["input_ids"]).any()
    report = verify(tiny, tiny)
    assert report.inputs == "4 made-up batches of 2 × 16 tokens (seed 0); --data takes real ones"
    assert report.samples == 8


def test_made_up_images() -> None:
    value = onnx.helper.make_tensor_value_info("pixels", 1, ["batch", 3, "height", "width"])
    source = Synthetic(onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], [])))
    assert source.read(0)["pixels"].shape == (2, 3, 224, 224)
    assert str(source).startswith("4 made-up batches of 2 (seed 0)")


def test_made_up_inputs_of_a_decoder_with_a_past() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (int64[batch, sequence] input_ids, int64[batch, total_sequence] attention_mask,
       int64[batch, sequence] position_ids, float[batch, 2, past_sequence, 4] past_key, bool use_cache,
       int32[batch] lengths) => (int64[batch, sequence] y) { y = Identity(input_ids) }
    """
    made = Synthetic(model(text)).read(0)
    assert {n: a.shape for n, a in made.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 20),
        "position_ids": (2, 16),
        "past_key": (2, 2, 4, 4),
        "use_cache": (),
        "lengths": (2,),
    }
    assert made["position_ids"][1].tolist() == list(range(4, 20))
    assert made["use_cache"].dtype == np.bool_
    assert made["lengths"].tolist() == [16, 16]


def test_sums_of_dims() -> None:
    value = onnx.helper.make_tensor_value_info("m", 7, ["batch", "past + sequence"])
    proto = onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], []))
    assert Synthetic(proto).read(0)["m"].shape == (2, 20)


def test_real_data_that_does_not_fit(tiny: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=ids(1, 3)["input_ids"])
    with pytest.raises(QpassError, match="lacks the input 'attention_mask'"):
        verify(tiny, tiny, data=[tmp_path / "a.npz"])
