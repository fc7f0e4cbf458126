"""`qpass bench`: what is measured and how, on a GPU whose times are known; and on a real one where there is one."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from qpass import gpu, plugins
from qpass.engine import backends, sidecar
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.engine.bench import Method, bench, machine, points, tables, timing
from qpass.engine.bench.statistics import Timing
from qpass.engine.run import Engine, Session
from qpass.errors import QpassError
from qpass.plugins import Library
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


def test_items_are_counted_where_the_batch_is_known(fake: FakeGpu, tmp_path: Path) -> None:
    path = write_engine(tmp_path / "a.engine", [5.0], dims={"x": ["tokens", 4]})
    report = bench(path, method=quick())
    assert (report.points[0].batch, report.points[0].items_per_second(0)) == (None, None)
    told = report.to_dict()["points"][0]
    assert (told["batch"], told["results"][0]["items_per_second"]) == (None, None)
    out = io.StringIO()
    screen = Console(file=out, width=200)
    screen.print(tables.shown(report))
    assert "items" not in out.getvalue()
    write_engine(path, [5.0], dims={"x": ["batch", 4]})
    screen.print(tables.shown(bench(path, method=quick())))
    assert "items/s" in out.getvalue()


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
        backends.choose("auto", gpu.capability())
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
