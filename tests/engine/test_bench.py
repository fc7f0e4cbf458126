"""`qpass bench`: what is measured and how, on a GPU whose times are known; and on a real one where there is one."""

from __future__ import annotations

import json
import sys
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qpass
from qpass import gpu, pipeline, plugins
from qpass.engine import builder, sidecar
from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.engine.bench import Building, Method, Report, bench, builds, machine, points, provenance, timing
from qpass.engine.bench.statistics import Timing
from qpass.engine.run import Engine, Session
from qpass.errors import QpassError
from qpass.plugins import Library
from qpass.spec import QuantSpec
from tests.conftest import Run
from tests.engine import fake_gpu
from tests.engine.fake_gpu import L2, MEMSET_US, FakeGpu, quick, write_engine

# -- the method


def executions(log: list[str]) -> list[str]:
    return [what for what in log if what in ("a", "b")]


def test_engines_take_turns_and_the_cache_is_overwritten(fake: FakeGpu, two: list[Path]) -> None:
    bench(two, method=quick(runs=3, cuda_graph=False))
    flush = f"memset {2 * L2}"
    timed = [flush, "a", flush, "b"] * 3
    at = fake.log.index(flush)
    assert fake.log[at : at + len(timed)] == timed
    rest = set(fake.log[:at] + fake.log[at + len(timed) :])
    assert rest == {"copy", "a"}, "a keeps the GPU busy while the clocks are read"


def test_a_warm_cache_is_of_the_engine_itself(fake: FakeGpu, two: list[Path]) -> None:
    report = bench(two, method=quick(runs=3, cuda_graph=False, cold_l2=False))
    assert not [what for what in fake.log if what.startswith("memset")]
    assert "aabb" * 3 in "".join(executions(fake.log))
    assert "before each the same engine runs untimed" in report.described()["runs"]


def test_graphs_are_replayed(fake: FakeGpu, two: list[Path]) -> None:
    bench(two, method=quick(runs=3))
    assert f"memset {2 * L2}-graph-a-memset {2 * L2}-graph-b" in "-".join(fake.log)
    fake.captures = False
    with pytest.raises(QpassError, match=r"cannot be captured: CUDA graphs: .* 901; measure with --no-cuda-graph"):
        bench(two, method=quick(runs=3))


def test_warm_up_is_long_and_often_enough(fake: FakeGpu, tmp_path: Path) -> None:
    """So many runs, and so long: whichever is more."""
    for us, least in ((100.0, round(0.5e6 / (100 + MEMSET_US))), (200_000.0, 10)):
        fake.log.clear()
        engine = Engine(write_engine(tmp_path / "a.engine", [us]))
        feeds = engine.check({"x": np.zeros((2, 4), np.float32)})
        timing.Lane(engine.load(), feeds, Method(cuda_graph=False), timing.Overwrite())
        assert least <= len(executions(fake.log)) <= least + 1


def test_numbers(fake: FakeGpu, tmp_path: Path) -> None:
    """Percentiles, ratios, throughput and memory of known times: only executions count, no memset and no copy."""
    files = [
        write_engine(tmp_path / "a.engine", [float(us) for us in range(1, 101)], memory=4 << 20),
        write_engine(tmp_path / "b.engine", [25.25], memory=2 << 20, plugins={"n": "SmoothQuantGemm"}),
    ]
    report = bench(files, method=quick(runs=100), shapes=[{"x": (8, 4)}, {"x": (1, 4)}])
    first, second = report.points
    assert [p.shapes for p in report.points] == [{"x": (8, 4)}, {"x": (1, 4)}]
    timed = first.timings[0]
    assert timed is not None
    us = timed.to_dict()
    assert us == {"min": 1, "mean": 50.5, "p50": 50.5, "p90": 90.1, "p99": 99.01}
    ratio = first.times_baseline(1)
    assert ratio is not None
    assert ratio.times == pytest.approx(2)
    assert us.keys() - Timing(timed.runs[:99]).to_dict().keys() == {"p99"}, "99 runs do not tell it"
    assert (first.batch, second.batch) == (8, 1)
    assert first.items_per_second(1) == pytest.approx(8 / 25.25e-6)
    a, b = report.engines
    assert (a.memory_bytes, a.activation_bytes, b.memory_bytes) == (4 << 20, 1 << 20, 2 << 20)
    assert (a.kind, b.kind) == ("no plugins, float32 outputs", "quantized, float32 outputs")
    assert (a.plugin_layers, b.plugin_layers, a.build_seconds) == (0, 1, None)
    assert a.engine_bytes == files[0].stat().st_size


def test_progress_is_told(fake: FakeGpu, two: list[Path]) -> None:
    told: list[Any] = []

    class Stage:
        def __init__(self, what: str, data: bool) -> None:
            told.append(what)

        def __enter__(self) -> Any:
            return lambda done, total: told.append((done, total))

        def __exit__(self, *error: object) -> None: ...

    bench(two, method=quick(runs=2, profiled_runs=1), stage=Stage)
    assert told == ["measuring x:2x4", (1, 2), (2, 2), "profiling"]


def test_layers(fake: FakeGpu, tmp_path: Path) -> None:
    """Plugins by op, also where TensorRT calls the layer otherwise; all else as it is; none of the graph or warm-up."""
    shares = {"fc1": 0.2, "renamed": 0.3, "softmax": 0.4, "norm": 0.1}
    path = write_engine(
        tmp_path / "a.engine",
        [1000.0],
        plugins={"fc1": "SmoothQuantGemm", "fc2": "SmoothQuantGemm", "norm": "RmsnormQuantization"},
        layers=shares,
    )
    told = json.loads(path.read_text()) | {"of": {"renamed": "fc2"}}
    path.write_text(json.dumps(told))
    facts = json.loads(path.with_name("a.engine.json").read_text())
    facts["engine"]["sha256"] = sidecar.digest(path)
    path.with_name("a.engine.json").write_text(json.dumps(facts))
    report = bench(path, method=quick(runs=1, profiled_runs=4))
    (layers,) = report.points[0].layers
    assert [(t.name, t.layers, t.is_plugin) for t in layers] == [
        ("SmoothQuantGemm", 2, True),
        ("softmax", 1, False),
        ("RmsnormQuantization", 1, True),
    ]
    assert [t.us for t in layers] == pytest.approx([500, 400, 100])
    assert [t.share for t in layers] == pytest.approx([0.5, 0.4, 0.1])
    assert report.points[0].layers_us(0) == pytest.approx(1000)
    (timed,) = report.points[0].timings
    assert timed is not None
    assert timed.p50 == 1000


# -- what fails


def test_memory_that_does_not_suffice(fake: FakeGpu, tmp_path: Path) -> None:
    files = [write_engine(tmp_path / f"{n}.engine", [1.0], memory=m << 30) for n, m in (("a", 5), ("b", 5), ("c", 1))]
    report = bench(files, method=quick(runs=1))
    assert [t is not None for t in report.points[0].timings] == [True, False, True]
    why = report.engines[1].error or ""
    assert "b.engine cannot be loaded" in why
    assert "out of memory" in why
    assert why.endswith("bench fewer presets or smaller shapes at a time")
    assert report.points[0].errors == (None, why, None)
    assert report.remarks() == [f"b failed: {why}"]
    fake.free = L2
    with pytest.raises(QpassError, match=r"the GPU is out of memory: 2097152 bytes .*use smaller shapes"):
        bench(write_engine(tmp_path / "c.engine", [1.0], memory=0), method=quick(runs=1))


def test_an_engine_that_fails_alone(fake: FakeGpu, tmp_path: Path) -> None:
    with pytest.raises(
        QpassError, match=r"no engine could be measured: a failed at x 2x4: .*TensorRT does not say why"
    ):
        bench(write_engine(tmp_path / "a.engine", [1.0], fails=True), method=quick(runs=1))


@pytest.mark.parametrize("after", [0, 2, 12])
def test_an_engine_that_fails_among_others(fake: FakeGpu, tmp_path: Path, after: int) -> None:
    """In its warm-up, or in its turns, after which the others take theirs anew."""
    files = [write_engine(tmp_path / f"{n}.engine", [us]) for n, us in (("a", 9.0), ("b", 5.0), ("c", 3.0))]
    write_engine(files[1], [5.0], fails=True, after=after)
    method = Method(8, cuda_graph=False, warm_up_seconds=0.0, warm_up_runs=1)
    report = bench(files, method=method, shapes=[{"x": (1, 4)}, {"x": (2, 4)}])
    assert report.failed
    assert report.complete
    done = [[[round(us) for us in t.runs] if t is not None else None for t in p.timings] for p in report.points]
    assert done[-1] == [[9] * 8, None, [3] * 8]
    assert str(report.points[-1].times_baseline(2)) == "3.00x"
    assert (report.points[-1].times_baseline(1), report.points[-1].items_per_second(1)) == (None, None)
    assert "b failed at x 2x4: b.engine failed: TensorRT does not say why" in report.remarks()
    assert (done[0][1] is None) == (after < 9)


def test_a_baseline_that_fails(fake: FakeGpu, tmp_path: Path) -> None:
    files = [write_engine(tmp_path / "a.engine", [9.0], fails=True), write_engine(tmp_path / "b.engine", [5.0])]
    report = bench(files, method=quick(runs=1))
    assert report.points[0].times_baseline(1) is None
    assert report.points[0].items_per_second(1) is not None
    assert report.remarks()[-1] == "there is nothing to compare with, since a failed"


def test_a_kernel_that_fails_for_good(fake: FakeGpu, tmp_path: Path) -> None:
    """It is said which engine's it was, and nothing of it is put down to the others."""
    files = [write_engine(tmp_path / f"{n}.engine", [5.0]) for n in "abc"]
    write_engine(files[1], [5.0], breaks="an illegal access", after=4)
    seen: list[Report] = []
    shapes = [{"x": (rows, 4)} for rows in (1, 2, 4)]
    report = bench(files, method=quick(runs=4, cuda_graph=False), shapes=shapes, save=seen.append)
    assert [p.errors for p in report.points] == [
        (None, None, None),
        (
            "not measured: CUDA had failed",
            "CUDA: an illegal access; compute-sanitizer, put before the command, names the kernel",
            "not measured: CUDA had failed",
        ),
    ]
    assert report.points[1].timings == (None, None, None)
    assert not report.complete
    assert report.remarks()[0] == (
        "CUDA works no more in this process since b ran at x:2x4, and nothing was measured after that; "
        "bench the others without it"
    )
    assert [len(r.points) for r in seen] == [0, 1, 2, 2, 2]


def test_a_preset_that_cannot_be_built(
    block: Path, built: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, rewrite = builder.build_files, pipeline.rewrite

    def building(path: Path, output: Path, **keywords: Any) -> Any:
        if "w8a8" in output.name:
            raise QpassError("TensorRT built no engine")
        return build(path, output, **keywords)

    def rewriting(path: Path, output: Path, **keywords: Any) -> Any:
        if "w4a16" in output.name:
            raise QpassError("the model has no Linear")
        return rewrite(path, output, **keywords)

    monkeypatch.setattr(builder, "build_files", building)
    monkeypatch.setattr(pipeline, "rewrite", rewriting)
    report = bench(block, Building(["w4a16-g128", "w8a8", "w8a16"], backend="tensorrt"), quick(runs=1))
    assert [s.error for s in report.engines] == [
        None,
        "it could not be rewritten: the model has no Linear",
        "it could not be built: TensorRT built no engine",
        None,
    ]
    assert [t is not None for t in report.points[0].timings] == [True, False, False, True]
    assert "w8a8 failed: it could not be built: TensorRT built no engine" in report.remarks()


def test_plugins_are_loaded_once(fake: FakeGpu, tmp_path: Path) -> None:
    """TensorRT refuses a library the second time, so engines of one process share it; two libraries cannot be."""
    library, other = tmp_path / "plugins.so", tmp_path / "other.so"
    files = [write_engine(tmp_path / f"{n}.engine", [1.0], library=library) for n in "ab"]
    assert len(bench(files, method=quick(runs=1)).engines) == 2
    other.write_text("others")
    with pytest.raises(QpassError, match=r"does not take those of .*other\.so too; name one library"):
        bench(write_engine(tmp_path / "c.engine", [1.0], library=other))


# -- inputs


def test_engines_get_inputs_in_their_own_types(tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for name, dtype in (("half", np.float16), ("bf16", ml_dtypes.bfloat16), ("float", np.float32)):
        engine = Engine(write_engine(tmp_path / "a.engine", [1.0], dtype=name))
        assert points.fit(points.Point({"x": x}), engine)["x"].dtype == dtype
    ids = Engine(write_engine(tmp_path / "a.engine", [1.0], dtype="int32"))
    assert points.fit(points.Point({"x": x.astype(np.int64)}), ids)["x"].dtype == np.int32
    with pytest.raises(QpassError, match=r"'x' has values that a\.engine cannot take as int32"):
        points.fit(points.Point({"x": np.full((2, 4), 1 << 40)}), ids)
    with pytest.raises(QpassError, match=r"a\.engine cannot be measured at x:2x4: the input 'x' is float32, wants int"):
        points.fit(points.Point({"x": x}), ids)


def test_inputs_of_a_file(fake: FakeGpu, two: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, x=np.zeros((3, 4), np.float32), other=np.zeros(1))
    with pytest.raises(QpassError, match="--inputs other: the model has no such input"):
        bench(two, inputs=file)
    np.savez(file, y=np.zeros((3, 4), np.float32))
    with pytest.raises(QpassError, match=r"x\.npz has no array 'x'; the inputs are x"):
        bench(two, inputs=file)
    np.savez(file, x=np.zeros((3, 4), np.float32))
    report = bench(two, method=quick(runs=1), inputs=file)
    assert report.points[0].shapes == {"x": (3, 4)}
    assert report.inputs == str(file)


# -- engines built of a model


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


def test_the_backend_fits_the_gpu(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTRTX, "installed", lambda self: True)
    assert builds.for_this_gpu("auto").name == "tensorrt_rtx"
    fake.capability = (9, 0)
    assert builds.for_this_gpu("auto").name == "tensorrt"
    with pytest.raises(
        QpassError, match=r"tensorrt_rtx builds for compute capability 75, .*, this GPU's is 90; choose"
    ):
        builds.for_this_gpu("tensorrt_rtx")


# -- clocks


@pytest.mark.parametrize(
    ("knows", "bits", "held_by"),
    [
        ("clocks_event_reasons", 0x002, ("applications clocks setting",)),
        ("clocks_throttle_reasons", 0x024, ("software power cap", "software thermal slowdown")),
        ("clocks_event_reasons", 0x001, ("idle",)),
        ("clocks_event_reasons", 0x408, ("hardware slowdown", "reason 0x400")),
        ("neither", 0, None),
    ],
)
def test_clocks(
    fake: FakeGpu,
    two: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    knows: str,
    bits: int,
    held_by: tuple[str, ...] | None,
) -> None:
    """Drivers call the reasons by one name or another, and say [N/A] of what they do not know."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f"""#!/bin/sh
case "$1" in
  *driver_version*) echo 580.1 ;;
  *{knows}.active*) echo "1980, 1980, 41, [N/A], 0x0000000000000{bits:03x}" ;;
  *reasons*) echo 'Field is not a valid field to query.'; exit 2 ;;
  *) echo "1980, 1980, 41, [N/A]" ;;
esac
"""
    )
    smi.chmod(0o755)
    monkeypatch.setattr("qpass.engine.bench.machine.which", lambda name: str(smi))
    report = bench(two, method=quick(runs=1))
    before, after = report.points[0].clocks
    assert before == after == machine.Clocks(1980, 1980, 41, None, held_by)
    by = f"the runs at x 2x4, by {', '.join(held_by or ())}"
    notes = [f"the clock was held down {when} {by}" for when in ("before", "after")]
    assert report.remarks() == (notes if held_by not in (None, ("idle",)) else [])
    clocks = report.to_dict()["points"][0]["clocks"]["before"]
    assert clocks["held_by"] == held_by
    assert report.machine.driver == "580.1"
    told = "SM at 1980 MHz, 1980 MHz at most, 41 °C before the first run"
    assert told in report.described()["clocks"]
    locked = {None: "whether it is locked is not told", True: "the clock is locked", False: "the clock is not locked"}
    assert (
        locked[held_by if held_by is None else "applications clocks setting" in held_by] in report.described()["clocks"]
    )


# -- engines that TensorRT-RTX builds for real, and a GPU


def test_built_for_real_and_played(
    block: Path, library: Library, fake: FakeGpu, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the way with TensorRT-RTX, but for running: that part is played, at 50 µs an execution."""
    monkeypatch.setenv("QPASS_PLUGINS", str(library.path))
    module = fake_gpu.tensorrt(fake)
    module.__version__ = TensorRTRTX().version()
    runs = types.SimpleNamespace(
        create_execution_context=lambda: fake_gpu.Context(fake, {"name": "a", "us": [50.0]}), device_memory_size_v2=1
    )
    module.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda data: runs)
    monkeypatch.setattr(TensorRTRTX, "load", lambda self: module)
    monkeypatch.setattr(TensorRTRTX, "preload", lambda self: None)
    args = ("bench", block, "--preset", "w8a16", "--preset", "w8a8", "--backend", "tensorrt_rtx", "--runs", 2)
    told, again = (json.loads(run(*args, "--keep", tmp_path, "--json").out) for _ in range(2))
    assert [e["reused"] for e in again["engines"]] == [True] * 3
    assert [e["built"]["sha256"] for e in again["engines"]] == [e["built"]["sha256"] for e in told["engines"]]
    shown = {"name", "sha256", "architectures", "interface"}
    assert [set(e["library"] or ()) for e in told["engines"]] == [set(), shown, shown]
    assert [(e["name"], e["plugin_layers"]) for e in told["engines"]] == [("baseline", 0), ("w8a16", 2), ("w8a8", 4)]
    assert all(e["build_seconds"] > 0 and e["engine_bytes"] > 1000 for e in told["engines"])
    assert told["points"][0]["shapes"] == {"x": [1, 128, 64]}


@pytest.fixture
def real() -> None:
    """A GPU, plugins for it, and a TensorRT that builds for it."""
    try:
        gpu.driver()
        plugins.find(capability=gpu.capability())
        builds.for_this_gpu("auto")
    except QpassError as error:
        pytest.skip(str(error))


def test_on_a_gpu(block: Path, real: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command. Times are of this GPU; that they are plausible is all that can be asked."""
    monkeypatch.setenv("QPASS_PLUGINS", str(plugins.find(capability=gpu.capability()).path))
    out = tmp_path / "bench.json"
    presets = ("--preset", "w8a16", "--preset", "w8a8")
    args = ("bench", block, *presets, "--shapes", "x:1x1x64", "--shapes", "x:8x128x64", "--profile", "-o", out)
    for flags in ((), ("--no-cuda-graph", "--warm-l2")):
        done = run(*args, *flags)
        assert done.code == 0, done.err
        told = json.loads(out.read_text())
        assert [e["name"] for e in told["engines"]] == ["baseline", "w8a16", "w8a8"]
        assert all(e["memory_bytes"] >= 0 and e["engine_bytes"] > 0 for e in told["engines"])
        for point in told["points"]:
            for result, engine in zip(point["results"], told["engines"], strict=True):
                assert 1 < result["us"]["min"] <= result["us"]["p50"] <= result["us"]["p99"] < 1e5
                named = [layer for layer in result["layers"] if layer["is_plugin"]]
                assert sum(layer["layers"] for layer in named) == engine["plugin_layers"]
                assert sum(layer["share"] for layer in result["layers"]) == pytest.approx(1)


def test_events_and_graphs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock, the memset and the graph on a real GPU, with a memset of a known size as the engine."""
    try:
        cuda = gpu.driver()
    except QpassError as error:
        pytest.skip(str(error))
    sizes = (64 << 20, 256 << 20)
    scratch = gpu.Buffer(sizes[1])

    class Memset:
        def __init__(self, size: int) -> None:
            self.size = size

        def prepare(self, feeds: timing.Feeds) -> Any:
            return lambda stream: cuda.memset_d8_async(scratch.address, 1, self.size, stream)

    sessions: list[Any] = [Memset(size) for size in sizes]
    for method in (Method(runs=20), Method(runs=20, cuda_graph=False), Method(runs=20, cold_l2=False)):
        overwrite = timing.Overwrite() if method.cold_l2 else None
        lanes = [timing.Lane(s, {}, method, overwrite) for s in sessions]
        with lanes[0].busy():
            pass
        small, large = (float(np.median(t)) for t in timing.take_turns(lanes, method.runs))
        assert 2.5 < large / small < 6, (method, small, large)


def test_session_without_a_context(fake: FakeGpu, two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT gives no context where there is no memory for its activations."""
    none = types.SimpleNamespace(create_execution_context=lambda: None)
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda data: none)
    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", lambda logger: runtime)
    with pytest.raises(QpassError, match=r"a\.engine cannot be run on this GPU: TensorRT does not say why"):
        Session(Engine(two[0]))
