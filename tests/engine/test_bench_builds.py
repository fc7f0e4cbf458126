"""`qpass bench` of a model: what it builds, how, of what that is told, and what it uses again."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qpass
from qpass import gpu
from qpass.engine import Worker, backends, sidecar
from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.engine.bench import Building, bench, provenance
from qpass.errors import QpassError
from qpass.spec import QuantSpec
from tests.engine.fake_gpu import FakeGpu, quick


def test_a_baseline_and_an_engine_a_preset(block: Path, built: list[dict[str, Any]]) -> None:
    how = Building(["w8a16", "w8a8"], backend="tensorrt")
    report = bench(block, how, quick(runs=2), shapes=[{"x": (4, 32, 64)}, {"x": (1, 128, 64)}])
    assert [(s.name, s.plugin_layers, s.build_seconds) for s in report.engines] == [
        ("baseline", 0, 1.5),
        ("w8a16", 2, 1.5),
        ("w8a8", 4, 1.5),
    ]
    assert report.engines[0].kind == "unquantized, float32"
    assert report.engines[1].kind == "int8 weights per channel"
    assert [str(report.points[0].times_baseline(i)) for i in range(3)] == ["1.00x", "3.00x", "5.00x"]
    assert report.notes == (
        "the baseline computes in float32, as block.onnx does: tensorrt keeps a model's types; "
        "--baseline takes a float16 export of it",
    )
    for asked in built:  # the shapes span the measured ones, the first of which is the usual one
        assert asked["min_shapes"] == {"x": (1, 32, 64)}
        assert asked["opt_shapes"] == {"x": (4, 32, 64)}
        assert asked["max_shapes"] == {"x": (4, 128, 64)}
        assert not asked["engine"].exists(), "the folder was temporary"
    assert {f.name for f in block.parent.glob("*.onnx")} == {"block.onnx"}
    (worker,) = {asked["worker"] for asked in built}
    assert isinstance(worker, Worker), "TensorRT starts once"


def test_a_weakly_typed_backend_may_compute_in_float16(
    block: Path, built: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRT, "weakly_typed", True)
    report = bench(block, Building(backend="tensorrt"), quick(runs=1))
    assert report.engines[0].kind == "unquantized, float32, FP16 where TensorRT finds it faster"
    assert [s.name for s in report.engines] == ["baseline", "w8a16"], "the preset that rewrite has, too"
    (note,) = report.notes
    assert "guessed (min … opt … max): batch 1 … 1 … 8, length 1 … 128 … 512" in note


def test_flags_of_builds_are_passed_on(
    block: Path, built: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(TensorRT, "weakly_typed", True)
    flags: dict[str, Any] = {
        "timing_cache": tmp_path / "learned.bin",
        "workspace": 1 << 20,
        "precision": "fp32",
        "level": 0,
    }
    how = Building(["w8a8"], backend="tensorrt", **flags)
    report = bench(block, how, quick(runs=1))
    assert [{flag: asked[flag] for flag in flags} for asked in built] == [flags] * 2
    assert report.engines[0].kind == "unquantized, float32", "and no FP16"


def test_provenance(block: Path, built: list[dict[str, Any]], tmp_path: Path) -> None:
    """Whoever reads the JSON can tell what was measured, and can do it again."""
    (tmp_path / "mine.yaml").write_text("preset: w8a16\nexclude: ['fc2']\n")
    how = Building([str(tmp_path / "mine.yaml")], backend="tensorrt", level=2, workspace=1 << 20)
    before = datetime.now(UTC).replace(microsecond=0)
    told = json.loads(json.dumps(bench(block, how, quick(runs=1), shapes=[{"x": (1, 8, 64)}]).to_dict()))
    date = datetime.fromisoformat(told["date"])
    assert date.tzinfo == UTC
    assert before <= date <= datetime.now(UTC)
    assert told["model"] == told["baseline"]
    assert told["model"]["path"] == str(block)
    assert told["model"]["sha256"] == sidecar.digest(block)
    span = {"x": {"min": [1, 8, 64], "opt": [1, 8, 64], "max": [1, 8, 64]}}
    assert told["building"] == {
        "backend": "tensorrt", "timing_cache": None, "precision": None, "level": 2, "workspace": 1 << 20,
        "shapes": span,
    }  # fmt: skip
    base, mine = told["engines"]
    assert (base["recipe"], base["library"]) == (None, None)
    (tmp_path / "again.yaml").write_text(mine["recipe"])
    recipes = [QuantSpec.from_yaml(tmp_path / f"{name}.yaml").to_dict() for name in ("mine", "again")]
    assert recipes[0] == recipes[1]
    assert mine["library"] == {"name": "plugins.so", "sha256": sidecar.digest(tmp_path / "plugins.so")}
    assert mine["built"]["profiles"] == span
    assert len(mine["built"]["sha256"]) == 64


def test_what_is_kept_is_used_again(block: Path, built: list[dict[str, Any]], tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    keep.mkdir()

    def again(*presets: str, **changes: Any) -> list[str]:
        """The engines that had to be built."""
        built.clear()
        report = bench(block, Building(presets or ("w8a16", "w8a8"), backend="tensorrt", keep=keep, **changes), quick())
        names = [b["engine"].name.split(".")[1] for b in built]
        reused = [s.name for s in report.engines if s.reused]
        assert sorted([*names, *reused]) == sorted(s.name for s in report.engines)
        told = [note for note in report.notes if note.startswith(f"used again from {keep}, not built: ")]
        assert told == ([f"{told[0].partition(': ')[0]}: {', '.join(reused)}; model, recipe, flags, shapes, plugins, "
                         "GPU, TensorRT and qpass are the same"] if reused else [])  # fmt: skip
        return names

    assert again() == ["baseline", "w8a16", "w8a8"]
    assert again() == []
    assert again(level=1) == ["baseline", "w8a16", "w8a8"], "other flags"
    assert again("w8a16", level=1, max_shapes={"x": (2, 256, 64)}) == ["baseline", "w8a16"], "other shapes"
    assert again(level=1) == ["baseline", "w8a16"]
    (tmp_path / "w8a8.yaml").write_text("preset: w8a8\nexclude: ['fc2']\n")
    assert again("w8a16", str(tmp_path / "w8a8.yaml"), level=1) == ["w8a8"], "another recipe of that name"
    (tmp_path / "plugins.so").write_text("newer plugins")
    assert again("w8a16", level=1) == ["w8a16"], "the baseline has none"
    (keep / "block.w8a16.engine").write_text("damaged")
    assert again("w8a16", level=1) == ["w8a16"]
    proto = onnx.load(block)
    proto.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(2 * numpy_helper.to_array(proto.graph.initializer[1]), "w1")
    )
    onnx.save(proto, block)
    assert again("w8a16", level=1) == ["baseline", "w8a16"], "other weights"


@pytest.mark.parametrize("what", ["gpu", "tensorrt", "qpass"])
def test_what_another_machine_kept_is_not(
    block: Path, built: list[dict[str, Any]], fake: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    how = Building(["w8a8"], backend="tensorrt", keep=tmp_path)
    bench(block, how, quick())
    if what == "gpu":
        fake.capability = (8, 6)
    elif what == "qpass":
        monkeypatch.setattr(provenance, "_sources", lambda: "others")
    else:
        for name in ("baseline", "w8a8"):
            facts = tmp_path / f"block.{name}.engine.json"
            facts.write_text(facts.read_text().replace('"version": "10.0"', '"version": "10.1"'))
    bench(block, how, quick())
    assert len(built) == 4


def test_a_rewritten_model_beside_its_original(block: Path, built: list[dict[str, Any]], tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    proto = onnx.load(block)
    for t in proto.graph.initializer:
        t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float16), t.name))
    onnx.save(proto, half)
    path = qpass.rewrite(block, spec="w8a8").output
    how = Building(backend="tensorrt", baseline=half, max_shapes={"x": (2, 128, 64)})
    report = bench(path, how, quick(runs=1))
    assert [(s.name, s.kind) for s in report.engines] == [
        ("baseline", "unquantized, float16"),
        ("block.qpass", "rewritten before"),
    ]
    assert [a["model"] for a in built] == [half, path]
    assert built[0]["max_shapes"] == {"x": (2, 128, 64)}
    assert not report.notes
    alone = bench(path, Building(backend="tensorrt"), quick(runs=1))
    assert [s.name for s in alone.engines] == ["block.qpass"]


def test_an_unfit_library_is_said_first(
    block: Path, built: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_: Any) -> None:
        raise QpassError("has plugins of another interface")

    monkeypatch.setattr("qpass.engine.builder.check_library", unfit)
    (tmp_path / "kept").mkdir()
    with pytest.raises(QpassError, match="of another interface"):
        bench(block, Building(["w8a16"], backend="tensorrt", keep=tmp_path / "kept"), quick(runs=1))
    assert not built
    assert not list((tmp_path / "kept").iterdir())


def test_recipes(block: Path, built: list[dict[str, Any]], tmp_path: Path) -> None:
    """A recipe is measured as a preset is, under the name of its file."""
    (tmp_path / "mine.yaml").write_text("preset: w8a16\nexclude: ['fc2']\n")
    how = Building(["w8a16", str(tmp_path / "mine.yaml")], backend="tensorrt")
    report = bench(block, how, quick(runs=1))
    assert [e.name for e in report.engines] == ["baseline", "w8a16", "mine"]
    assert [e.plugin_layers for e in report.engines] == [0, 2, 1]


def test_group_size_is_for_what_is_groupwise(block: Path, built: list[dict[str, Any]]) -> None:
    how = Building(["w8a16", "w4a16-g128"], group_size=64, backend="tensorrt")
    kinds = [s.kind for s in bench(block, how, quick(runs=1)).engines]
    assert kinds[1:] == ["int8 weights per channel", "int4 weights in groups of 64, symmetric, mse scales"]


def test_flags_are_checked_against_the_backend_that_fits(
    block: Path, built: list[dict[str, Any]], fake: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRTRTX, "installed", lambda self: True)
    how = Building(["w8a8"], timing_cache=tmp_path / "learned.bin")
    with pytest.raises(QpassError, match="--timing-cache: tensorrt_rtx times nothing"):
        bench(block, how, quick())
    assert not built
    fake.capability = (9, 0)
    bench(block, how, quick())
    assert {asked["backend"] for asked in built} == {"tensorrt"}


def test_the_backend_fits_the_gpu(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTRTX, "installed", lambda self: True)
    assert backends.choose("auto", gpu.capability()).name == "tensorrt_rtx"
    fake.capability = (9, 0)
    assert backends.choose("auto", gpu.capability()).name == "tensorrt"
    with pytest.raises(
        QpassError, match=r"tensorrt_rtx builds for compute capability 75, .*, this GPU's is 90; choose"
    ):
        backends.choose("tensorrt_rtx", gpu.capability())
