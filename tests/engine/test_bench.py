"""`qpass bench`: what is measured and how, on a GPU whose times are known; and on a real one where there is one."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qpass
from qpass import gpu, plugins
from qpass.engine import run as running
from qpass.engine import sidecar
from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.engine.bench import Building, Method, bench, builds, machine, plot, points, timing
from qpass.engine.builder import Finished
from qpass.engine.profiles import profiles_of
from qpass.engine.run import Engine, Session
from qpass.errors import QpassError
from qpass.graph import Model
from qpass.plugins import Library
from qpass.testing import model
from tests.conftest import Run
from tests.engine import fake_gpu
from tests.engine.fake_gpu import L2, MEMSET_US, FakeGpu, write_engine


def quick(runs: int = 1, **changes: Any) -> Method:
    """Without warm-up."""
    return Method(runs, warm_up_seconds=0.0, warm_up_runs=0, **changes)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """A GPU, TensorRT 10 on it, a plugin library, and no nvidia-smi."""
    there = FakeGpu()
    monkeypatch.setattr(gpu, "driver", lambda: there)
    monkeypatch.setattr(gpu, "Graph", there.Graph)
    monkeypatch.setattr("qpass.engine.bench.timing.monotonic", lambda: there.now * 1e-6)
    monkeypatch.setattr("qpass.engine.bench.machine.which", lambda name: None)
    monkeypatch.setattr(running, "_REGISTERED", {})
    monkeypatch.setattr(TensorRT, "version", lambda self: fake_gpu.VERSION)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_gpu.tensorrt(there))
    (tmp_path / "plugins.so").write_text("plugins")
    monkeypatch.setenv("QPASS_PLUGINS", str(tmp_path / "plugins.so"))
    return there


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write_engine(tmp_path / "a.engine", [100.0, 120.0]), write_engine(tmp_path / "b.engine", [50.0])]


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
        timing.warmed_up([engine.load()], [feeds], Method(cuda_graph=False))
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
    us = first.timings[0].to_dict()
    assert us == {"min": 1, "mean": 50.5, "p50": 50.5, "p90": 90.1, "p99": 99.01}
    assert first.times_baseline(0) == 1
    assert first.times_baseline(1) == pytest.approx(2)
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
    assert report.points[0].timings[0].p50 == 1000


def test_memory_that_does_not_suffice(fake: FakeGpu, tmp_path: Path) -> None:
    files = [write_engine(tmp_path / f"{n}.engine", [1.0], memory=5 << 30) for n in "ab"]
    with pytest.raises(QpassError, match=r"b\.engine cannot be loaded .*out of memory.*bench fewer presets or smaller"):
        bench(files)
    fake.free = L2
    with pytest.raises(QpassError, match=r"the GPU is out of memory: 2097152 bytes .*bench fewer presets"):
        bench(write_engine(tmp_path / "c.engine", [1.0], memory=0), method=quick(runs=1))


def test_an_engine_that_fails(fake: FakeGpu, tmp_path: Path) -> None:
    with pytest.raises(QpassError, match=r"a\.engine failed: TensorRT does not say why"):
        bench(write_engine(tmp_path / "a.engine", [1.0], fails=True), method=quick(runs=1))


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


@pytest.fixture
def built(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What builds were asked for; they are played here, and the more plugins an engine has the faster it is."""
    asked: list[dict[str, Any]] = []

    def build(path: Path, output: Path, **keywords: Any) -> Finished:
        asked.append({"model": path, "engine": output} | keywords)
        loaded = Model.load(path)
        nodes = {n.name: n.op for n in loaded.nodes() if n.domain == "qpass"}
        inputs = points.required(loaded.proto)
        profiles = profiles_of(inputs, *(keywords[f"{k}_shapes"] for k in ("min", "opt", "max")))
        tensors = [
            {"name": n, "mode": "input", "dtype": "float", "shape": [d if isinstance(d, int) else -1 for d in i.shape]}
            for n, i in inputs.items()
            if i.shape is not None
        ]
        write_engine(
            output,
            [1000.0 / (1 + len(nodes))],
            plugins=nodes,
            profiles={n: {k: getattr(p, k) for k in ("min", "opt", "max")} for n, p in profiles.items()},
            tensors=tensors + [t | {"name": "y", "mode": "output"} for t in tensors[:1]],
        )
        facts = json.loads(output.with_name(f"{output.name}.json").read_text())
        return Finished(output, output.with_name(f"{output.name}.json"), None, facts)

    monkeypatch.setattr("qpass.engine.builder.build_files", build)
    return asked


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
    assert [round(report.points[0].times_baseline(i), 6) for i in range(3)] == [1, 3, 5]
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


@pytest.mark.parametrize("knows", ["clocks_event_reasons", "clocks_throttle_reasons", "neither"])
def test_clocks(fake: FakeGpu, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows: str) -> None:
    """Drivers call the reason by one name or another, and say [N/A] of what they do not know."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f"""#!/bin/sh
case "$1" in
  *driver_version*) echo 580.1 ;;
  *{knows}*) echo "1980, 1980, 41, [N/A], Active" ;;
  *reasons*) echo 'Field is not a valid field to query.'; exit 2 ;;
  *) echo "1980, 1980, 41, [N/A]" ;;
esac
"""
    )
    smi.chmod(0o755)
    monkeypatch.setattr("qpass.engine.bench.machine.which", lambda name: str(smi))
    report = bench(two, method=quick(runs=1))
    before, after = report.points[0].clocks
    assert before == after == machine.Clocks(1980, 1980, 41, None, None if knows == "neither" else True)
    assert report.machine.driver == "580.1"
    told = "SM at 1980 MHz, 1980 MHz at most, 41 °C before the first run"
    assert told in report.described()["clocks"]
    assert ("the clock is locked" in report.described()["clocks"]) == (knows != "neither")


# -- the command


def test_json_of_a_model(block: Path, built: list[dict[str, Any]], run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    args = ("bench", block, "--preset", "w8a8", "--backend", "tensorrt", "--runs", 3, "--shapes", "x:2x8x64")
    done = run(*args, "--json", "--profile", "-o", tmp_path / "out", "--keep", tmp_path)
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert told["command"].startswith(f"qpass bench {block} --preset w8a8")
    assert told["version"] == 1
    assert told["device"]["name"] == "Fake GPU"
    assert told["device"]["l2_bytes"] == L2
    assert told["versions"] == {"qpass": "0.1.0", "tensorrt": ["tensorrt 10.0"], "driver": "unknown", "cuda": "13.0"}
    assert told["method"]["runs"] == 3
    assert told["method"]["cold_l2"] is told["method"]["cuda_graph"] is True
    assert [e["name"] for e in told["engines"]] == ["baseline", "w8a8"]
    assert set(told["engines"][0]) == {
        "name", "kind", "backend", "engine_bytes", "activation_bytes", "memory_bytes", "build_seconds", "plugin_layers",
    }  # fmt: skip
    (point,) = told["points"]
    assert (point["shapes"], point["batch"]) == ({"x": [2, 8, 64]}, 2)
    assert point["clocks"] == {"before": None, "after": None}
    base, quantized = point["results"]
    assert base["us"] == dict.fromkeys(("min", "mean", "p50", "p90", "p99"), 1000.0)
    assert base["runs_us"] == [1000.0] * 3
    assert quantized["times_baseline"] == pytest.approx(5)
    assert quantized["items_per_second"] == pytest.approx(10_000)
    assert quantized["layers"] == []
    kept = {f.name for f in tmp_path.iterdir() if f.name.startswith("block.")}
    assert kept == {
        "block.onnx", "block.baseline.engine", "block.baseline.engine.json", "block.w8a8.engine",
        "block.w8a8.engine.json", "block.w8a8.onnx", "block.w8a8.ledger.json",
    }  # fmt: skip


def test_tables(fake: FakeGpu, tmp_path: Path, run: Run) -> None:
    a = write_engine(tmp_path / "a.engine", [100.0], layers={f"layer {i}": 0.05 for i in range(20)})
    b = write_engine(tmp_path / "b.engine", [40.0], layers={"fc": 1.0}, plugins={"fc": "SmoothQuantGemm"})
    done = run("bench", a, b, "--runs", 2, "--profile", "--shapes", "x:4x4", "--shapes", "x:1x4")
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert ["b", "40.0", "40.0", "40.0", "40.0", "40.0", "100000.0", "2.50"] in rows
    assert ["a", "100.0", "100.0", "100.0", "100.0", "100.0", "10000.0", "1.00"] in rows
    assert ["SmoothQuantGemm", "(plugin)", "1", "40.0", "100.0%"] in rows
    assert ["all", "others", "10", "50.0", "50.0%"] in rows, "ten layers are shown, the rest is summed up"
    assert sum(row[:1] == ["layer"] and len(row) == 5 for row in rows) == 20
    assert "x 4x4: µs of 2 runs" in done.out
    assert "overwritten by a memset of twice its size" in done.out
    assert "clocks: not known" in done.out
    assert run("bench", a, b, "--runs", 2, "--quiet").out == ""


def said_of(*shapes: str) -> list[str]:
    return [word for flag, s in zip(("--min", "--opt", "--max"), shapes, strict=True) for word in (flag, f"x:{s}")]


def test_mistakes_are_said_before_anything_long(
    block: Path, built: list[dict[str, Any]], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = write_engine(tmp_path / "a.engine", [1.0])
    other = write_engine(tmp_path / "b.engine", [1.0], tensors=[
        {"name": "z", "mode": "input", "dtype": "float", "shape": [-1, 4]},
    ])  # fmt: skip
    path = qpass.rewrite(block, spec="w8a8").output
    scalar = tmp_path / "scalar.onnx"
    onnx.save(model('<ir_version: 10, opset_import: ["" : 17]> g (float[B] z) => (float[B] y) { y = Relu(z) }'), scalar)
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 8, 64), np.float32))
    (tmp_path / "notes.txt").write_text("")
    before = {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((block, engine), "give one model, of which engines are built, or engines that exist"),
        ((tmp_path / "none.engine",), "no such engine"),
        ((tmp_path / "none.onnx",), "no such file"),
        ((engine, engine), "an engine is given twice"),
        ((engine, "--preset", "w8a8"), "--preset is for a model of which engines are built"),
        ((engine, "--keep", tmp_path), "--keep is for a model"),
        ((engine, "--min", "x:1x4"), "--min is for a model"),
        ((engine, other), "b.engine needs its input 'z'"),
        ((engine, "--shapes", "x:9x4"), "'x' has shape [9, 4], the engine was built for from [1, 4] to [8, 4]"),
        ((engine, "--shapes", "z:9x4"), "--shapes z: the model has no such input; it has x"),
        ((engine, "--shapes", "x"), "--shapes x: 'x' is not of the form name:1x128"),
        ((engine, "--runs", "0"), "--runs 0: wants 1 or more"),
        ((engine, "--inputs", tmp_path / "x.npz", "--shapes", "x:1x4"), "has shapes of its own; leave out --shapes"),
        ((engine, "--inputs", tmp_path / "none.npz"), "no such file"),
        ((engine, "-o", tmp_path / "notes.txt"), "wants a file that ends in .json"),
        ((engine, "-o", tmp_path / "a.engine.json"), "would overwrite the input"),
        ((engine, "-o", tmp_path / "no" / "b.json"), "there is no folder"),
        ((engine, "--plot", tmp_path / "p.gif"), "--plot"),
        ((block, "--preset", "w9"), "unknown preset 'w9'"),
        ((block, "--preset", "w8a8", "--preset", "w8a8"), "--preset w8a8: there are two of this name"),
        ((block, "--preset", "w8a8-static"), "--preset w8a8-static needs --calibration"),
        ((block, "--preset", "w8a8", "--group-size", "64"), "is only for groupwise modes"),
        ((block, "--preset", "w4a16-g128", "--group-size", "48"), "should be 32, 64 or 128, not 48"),
        ((block, "--calibration", tmp_path / "none.npz"), "none.npz"),
        ((block, "--backend", "other"), "--backend other: there are auto"),
        ((block, "--plugins", tmp_path / "none.so"), "no such plugin library"),
        ((block, "--keep", tmp_path / "no"), "--keep"),
        ((block, "--baseline", path), "it was rewritten; give the model of before"),
        ((block, "--baseline", scalar), "has the inputs z"),
        ((block, "--shapes", "x:1x8x65"), "--shapes x:1x8x65 does not fit the input 'x'"),
        ((block, "--shapes", "x:1x8x64", "--max", "x:1x4x64"), "min ≤ opt ≤ max"),
        ((block, *said_of("1x8x64", "1x8x64", "1x9x64"), "--shapes", "x:1x4x64"), "is not within what is built"),
        ((path, "--preset", "w8a8"), "was rewritten before and is built as it is"),
        ((block, "-o", tmp_path / "block.w8a16.engine.json", "--keep", tmp_path), "would be written twice"),
    ]  # fmt: skip
    for args, said in wrong:
        backend = ("--backend", "tensorrt") if "--backend" not in args else ()
        refused = run("bench", *args, *backend)
        assert refused.code == 2, (args, refused)
        assert said in refused.err, (args, refused.err)
    monkeypatch.delenv("QPASS_PLUGINS")
    assert "compile them with `qpass plugins build`" in run("bench", block).err
    assert not built
    assert {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before


def test_what_is_kept_overwrites_nothing(block: Path, built: list[dict[str, Any]], run: Run, tmp_path: Path) -> None:
    taken = block.rename(tmp_path / "m.w8a16.onnx")
    (tmp_path / "m.onnx").write_bytes(taken.read_bytes())
    refused = run("bench", tmp_path / "m.onnx", "--baseline", taken, "--keep", tmp_path)
    assert (refused.code, "would overwrite the input" in refused.err) == (2, True)
    assert not built


def test_without_a_gpu_it_says_so_first(block: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        gpu.driver()
    except QpassError:
        pass
    else:
        pytest.skip("there is a GPU")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_gpu.tensorrt(FakeGpu()))
    monkeypatch.setattr(TensorRT, "version", lambda self: fake_gpu.VERSION)
    monkeypatch.setenv("QPASS_PLUGINS", str(block))
    refused = run("bench", block, "--preset", "w8a8", "--keep", tmp_path, "--backend", "tensorrt")
    assert refused.code == 2
    assert "pip install 'qpass[gpu]'" in refused.err or "GPU" in refused.err
    assert {f.name for f in tmp_path.iterdir()} == {"block.onnx"}


# -- plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is asked of a stand-in for matplotlib."""
    calls: list[tuple[str, Any]] = []

    class Spines:
        def __getitem__(self, names: list[str]) -> Any:
            return types.SimpleNamespace(set_visible=lambda shown: None)

    class Axes:
        spines = Spines()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):  # NumPy asks for such
                raise AttributeError(name)
            return lambda *args, **keywords: calls.append((name, args))

    class Figure:
        def __init__(self, **keywords: Any) -> None: ...

        def subplots(self, rows: int, columns: int, squeeze: bool) -> Any:
            return np.array([[Axes()] for _ in range(rows)], dtype=object)

        def suptitle(self, text: str) -> None: ...

        def savefig(self, file: Any, format: str, **keywords: Any) -> None:
            file.write(b"<?xml version='1.0'?><svg>picture</svg>" if format == "svg" else b"\x89PNG")

    module: Any = types.ModuleType("matplotlib")
    module.__spec__, module.__path__ = types.SimpleNamespace(), []
    module.rc_context = nullcontext
    figure: Any = types.ModuleType("matplotlib.figure")
    figure.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", module)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    return calls


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".html", b"<!doctype html>")]
)
def test_what_is_drawn(
    fake: FakeGpu, two: list[Path], tmp_path: Path, run: Run, drawn: list[tuple[str, Any]], suffix: str, begins: bytes
) -> None:
    picture = tmp_path / f"p{suffix}"
    args = ("bench", *two, "--runs", 2, "--shapes", "x:2x4", "--shapes", "x:8x4", "--plot", picture)
    assert run(*args).code == 0
    assert picture.read_bytes().startswith(begins)
    bars = [args for name, args in drawn if name == "barh"]
    assert bars == [([0, 1], [110.0, 50.0])] * 2
    notes = [args[0] for name, args in drawn if name == "annotate"]
    assert notes == ["110.0 µs", "50.0 µs  ×2.20"] * 2
    if suffix == ".html":
        page = picture.read_text()
        assert "<svg>picture</svg>" in page
        assert "<?xml" not in page
        assert "the engines in turns" in page
        assert "qpass bench" in page


@pytest.mark.parametrize("suffix", plot.FORMATS)
def test_a_plot_by_matplotlib(fake: FakeGpu, two: list[Path], tmp_path: Path, run: Run, suffix: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: pip install 'qpass[bench]'")
    pictures = [tmp_path / f"{name}{suffix}" for name in "pq"]
    for picture in pictures:
        done = run("bench", *two, "--runs", 2, "--shapes", "x:2x4", "--shapes", "x:8x4", "--plot", picture)
        assert done.code == 0, done.err
        assert picture.stat().st_size > 1000
    if suffix != ".html":  # which holds the command
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_plot_without_matplotlib(two: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpass.engine.bench.plot.find_spec", lambda name: None)
    refused = run("bench", *two, "--plot", tmp_path / "p.png")
    assert (refused.code, "needs matplotlib: pip install 'qpass[bench]'" in refused.err) == (2, True)


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
    told = json.loads(run(*args, "--json").out)
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
        lanes = timing.warmed_up(sessions, [{}, {}], method)
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
