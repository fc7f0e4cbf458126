"""`qpass bench` as a command: its tables, JSON and plots, and what it refuses before anything long."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qpass
from qpass import gpu
from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.bench import plot, points
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.testing import model
from tests.conftest import Run
from tests.engine import fake_gpu
from tests.engine.fake_gpu import L2, FakeGpu, write_engine

# -- the command


def test_json_of_a_model(block: Path, built: list[dict[str, Any]], run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    args = ("bench", block, "--preset", "w8a8", "--backend", "tensorrt", "--runs", 3, "--shapes", "x:2x8x64")
    done = run(*args, "--json", "--profile", "-o", tmp_path / "out", "--keep", tmp_path)
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert told["command"].startswith(f"qpass bench {block} --preset w8a8")
    assert (told["version"], told["complete"]) == (2, True)
    assert told["device"]["name"] == "Fake GPU"
    assert told["device"]["l2_bytes"] == L2
    assert told["versions"] == {"qpass": "0.1.0", "tensorrt": ["tensorrt 10.0"], "driver": "unknown", "cuda": "13.0"}
    assert told["method"]["runs"] == 3
    assert told["method"]["cold_l2"] is told["method"]["cuda_graph"] is True
    assert [e["name"] for e in told["engines"]] == ["baseline", "w8a8"]
    assert set(told["engines"][0]) == {
        "name", "kind", "error", "backend", "engine_bytes", "activation_bytes", "memory_bytes", "build_seconds",
        "plugin_layers", "reused", "recipe", "built", "library",
    }  # fmt: skip
    (point,) = told["points"]
    assert (point["shapes"], point["batch"]) == ({"x": [2, 8, 64]}, 2)
    assert point["clocks"] == {"before": None, "after": None}
    base, quantized = point["results"]
    assert base["us"] == dict.fromkeys(("min", "mean", "p50", "p90"), 1000.0)
    assert base["runs_us"] == [1000.0] * 3
    assert quantized["times_baseline"] == pytest.approx(5)
    assert quantized["items_per_second"] == pytest.approx(10_000)
    assert (quantized["layers"], quantized["layers_us"]) == ([], 0)
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
    assert ["b", "40.0", "40.0", "40.0", "40.0", "100000.0", "2.50x"] in rows
    assert ["a", "100.0", "100.0", "100.0", "100.0", "10000.0"] in rows
    assert ["SmoothQuantGemm", "(plugin)", "1", "40.0", "100.0%"] in rows
    assert ["all", "others", "10", "50.0", "50.0%"] in rows, "ten layers are shown, the rest is summed up"
    assert sum(row[:1] == ["layer"] and len(row) == 5 for row in rows) == 20
    assert "a at x 4x4, layer by layer: 100.0 µs together, a run in one go (p50) 100.0 µs" in done.out
    assert "so compare shares and not µs with p50" in done.out
    assert "x 4x4: µs of 2 runs" in done.out
    assert "overwritten by a memset of twice its size" in done.out
    assert "clocks: not known" in done.out
    assert run("bench", a, b, "--runs", 2, "--quiet").out == ""


def test_a_failure_is_a_row_and_exit_code_1(fake: FakeGpu, tmp_path: Path, run: Run) -> None:
    files = [
        write_engine(tmp_path / f"{n}.engine", [us], fails=n == "b") for n, us in (("a", 9.0), ("b", 5.0), ("c", 3.0))
    ]
    done = run("bench", *files, "--runs", 2, "-o", tmp_path / "bench.json")
    assert (done.code, done.err) == (1, "")
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "a 9.0 9.0 9.0 9.0 222222.2" in rows
    assert "b failed" in rows
    assert "b failed: b.engine failed: TensorRT does not say why" in rows
    assert "c 3.0 3.0 3.0 3.0 666666.7 3.00x" in rows
    assert "note: b failed at x 2x4: b.engine failed: TensorRT does not say why" in rows
    told = json.loads((tmp_path / "bench.json").read_text())
    (point,) = told["points"]
    assert [r["error"] for r in point["results"]] == [None, "b.engine failed: TensorRT does not say why", None]
    assert ["us" in r for r in point["results"]] == [True, False, True]
    assert told["notes"] == ["b failed at x 2x4: b.engine failed: TensorRT does not say why"]
    alone = run("bench", files[1], "--json")
    assert (alone.code, alone.err.count("\n"), "no engine could be measured" in alone.err) == (2, 1, True)


def test_what_was_measured_is_kept(
    fake: FakeGpu, two: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in its third point, a bench leaves two."""
    fit, asked = points.fit, []

    def interrupted(point: points.Point, engine: Engine) -> Any:
        asked.append(point.shapes["x"][0])
        if asked.count(4) > 2:  # the first two are its check
            raise KeyboardInterrupt
        return fit(point, engine)

    monkeypatch.setattr(points, "fit", interrupted)
    shapes = [word for rows in (1, 2, 4) for word in ("--shapes", f"x:{rows}x4")]
    assert run("bench", *two, "--runs", 2, *shapes, "-o", tmp_path).code == 130
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["complete"] is False
    assert [p["shapes"]["x"] for p in told["points"]] == [[1, 4], [2, 4]]
    assert [r["runs_us"] for r in told["points"][1]["results"]] == [[100.0, 120.0], [50.0, 50.0]]


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
        ((engine, "--level", "0"), "--level is for a model"),
        ((engine, "--timing-cache", tmp_path / "c"), "--timing-cache is for a model"),
        ((block, "--level", "6"), "--level 6: TensorRT has 0 to 5"),
        ((block, "--precision", "fp16"), "--precision: tensorrt 10.0 takes the types of the model"),
        ((block, "--workspace", "2 elephants"), "--workspace 2 elephants: wants a size such as 256MB"),
        ((block, "--timing-cache", block), "would overwrite the input"),
        ((block, "--timing-cache", tmp_path / "c.json", "-o", tmp_path / "c.json"), "would be written twice"),
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
    assert notes == ["110.0 µs", "50.0 µs  2.20x"] * 2
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
