"""Engines of small models, built for real by TensorRT-RTX, with the plugins' shells."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import helper

import qpass
from qpass import engine as engines
from qpass.engine import builder
from qpass.engine.backends import BACKENDS
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.plugins import Library
from qpass.testing import model
from tests.conftest import Run
from tests.plugins.shells import compile_shells
from tests.rules.test_experts import product
from tests.rules.test_subgraphs import branch, choice, linear, tensor


def rewritten(block: Path, preset: str = "w8a8") -> Path:
    return qpass.rewrite(block, spec=preset).output


def promised(path: Path) -> dict[str, str]:
    return {n.name: n.op_type for n in onnx.load(path).graph.node if n.domain == "qpass"}


@pytest.mark.parametrize("preset", ["w8a8", "w8a16"])
def test_every_promised_layer_is_there(block: Path, library: Library, preset: str) -> None:
    path = rewritten(block, preset)
    steps: list[tuple[int, int]] = []
    finished = engines.build_files(path, progress=lambda done, total: steps.append((done, total)))
    assert finished.engine == path.with_suffix(".engine")
    facts = json.loads(finished.sidecar.read_text())
    assert facts == finished.facts
    assert facts["plugin_layers"] == promised(path) != {}
    assert facts["layers"]["PLUGIN_V3"] == len(promised(path))
    assert facts["backend"]["name"] == "tensorrt_rtx"
    assert facts["engine"]["bytes"] == finished.engine.stat().st_size
    assert facts["plugins"]["path"] == str(library.path)
    assert facts["profiles"]["x"] == {"min": [1, 1, 64], "opt": [1, 128, 64], "max": [8, 512, 64]}
    assert [(t["name"], t["mode"], t["dtype"]) for t in facts["tensors"]] == [
        ("x", "input", "float"),
        ("y", "output", "float"),
    ]
    assert f"--dynamicPlugins={library.path}" in facts["commands"]["load"]
    assert facts["ledger"]["name"] == "block.qpass.ledger.json"
    assert finished.guessed is not None
    assert "length 1 … 128 … 512" in finished.guessed
    assert steps, "progress is told"
    assert steps[-1][0] == steps[-1][1]


def test_without_plugins_bodies_are_built(block: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPASS_PLUGINS", "/nowhere")  # and none are looked for
    facts = engines.build_files(rewritten(block), use_plugins=False).facts
    assert facts["plugin_layers"] == {}
    assert facts["plugins"] is None
    assert "PLUGIN_V3" not in facts["layers"]


def test_unquantized_model(block: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPASS_PLUGINS")
    assert engines.build_files(block).facts["plugin_layers"] == {}


def test_settings_of_the_command_of_tensorrts_own_tool(block: Path, library: Library) -> None:
    facts = engines.build_files(block, level=1, workspace=3 << 29).facts
    assert (facts["level"], facts["workspace"], facts["precision"]) == (1, 3 << 29, "the model's")
    assert "--builderOptimizationLevel=1 --memPoolSize=workspace:1536" in facts["commands"]["build"]


def test_shapes_and_target(block: Path, library: Library) -> None:
    path = rewritten(block)
    facts = engines.build_files(
        path,
        target_arch="8.9",
        min_shapes={"x": (1, 2, 64)},
        opt_shapes={"x": (2, 4, 64)},
        max_shapes={"x": (4, 8, 64)},
    ).facts
    assert facts["backend"]["target"] == "89"
    assert facts["profiles"]["x"] == {"min": [1, 2, 64], "opt": [2, 4, 64], "max": [4, 8, 64]}


def test_plugins_of_another_version_are_refused(block: Path, library: Library, tmp_path: Path) -> None:
    """TensorRT would find no plugin, and inline the bodies in silence."""
    other = tmp_path / "other"
    other.mkdir()
    wrong = compile_shells(other, version="7")
    path = rewritten(block)
    with pytest.raises(QpassError, match="is of version 1, the library has 7"):
        engines.build_files(path, library=wrong.path)
    assert not list(tmp_path.glob("*.engine*"))


def test_plugins_that_are_not_registered(block: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the preflight, ops that TensorRT does not find in the library are named."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "other"
    folder.mkdir(parents=True)
    wrong = compile_shells(folder, version="7")
    monkeypatch.setattr(builder, "preflight", lambda *_: None)
    with pytest.raises(
        QpassError, match=r"does not find the plugin ActivationQuantization, LayernormQuantization, Smooth"
    ):
        engines.build_files(rewritten(block), library=wrong.path)


def test_a_node_that_became_no_plugin_is_named(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT builds the body of a node, in silence, whose plugin says no: here, since an attribute is no number."""
    text = """<ir_version: 10, opset_import: ["" : 17]>
    g (float[B, 64] x) => (float[B, 32] y) <float[64, 32] w> { [fc] y = MatMul(x, w) }"""
    onnx.save(model(text), tmp_path / "one.onnx")
    path = rewritten(tmp_path / "one.onnx", "w8a16")
    engines.build_files(path)
    path.with_suffix(".engine").unlink()
    path.with_suffix(".engine.json").unlink()
    proto = onnx.load(path)
    (node,) = proto.graph.node
    for a in node.attribute:
        if a.name == "has_zero":
            a.CopyFrom(helper.make_attribute("has_zero", "x"))
    onnx.save(proto, path)
    with pytest.raises(QpassError, match="the attribute has_zero of WeightOnlyQuantMatmul is 'x', wants int"):
        engines.build_files(path)
    monkeypatch.setattr(builder, "preflight", lambda *_: None)
    with pytest.raises(QpassError, match=r"fc\.WeightOnlyQuantMatmul"):
        engines.build_files(path)
    assert not list(path.parent.glob("*.engine*"))
    assert not [f for f in path.parent.iterdir() if f.name.startswith(".")]


def test_preflight_lists_everything(block: Path, library: Library, run: Run) -> None:
    path = rewritten(block)
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == "SmoothQuantGemm" and node.name.startswith("fc1"):
            for a in node.attribute:
                if a.name == "plugin_version":
                    a.s = b"3"
        if node.op_type == "LayernormQuantization":
            kept = [a for a in node.attribute if a.name != "epsilon"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.save(proto, path)
    with pytest.raises(QpassError) as refused:
        engines.build_files(path, target_arch="120")
    told = str(refused.value)
    assert "compiled for 80, 90a, which does not run on 120" in told
    assert "SmoothQuantGemm is of version 3, the library has 1" in told
    assert "LayernormQuantization wants the attribute epsilon" in told


def test_a_ledger_of_another_model(block: Path, library: Library) -> None:
    """What a ledger promises must be there; without one the model's own nodes are the promise."""
    path = rewritten(block, "w8a8")
    ledger = path.with_name("block.qpass.ledger.json")
    promises = ledger.read_text()
    rewritten(block, "w8a16")
    ledger.write_text(promises)
    with pytest.raises(QpassError, match=r"block\.qpass\.ledger\.json is not of this model, which has no norm\."):
        engines.build_files(path)
    ledger.write_text("{}")
    with pytest.raises(QpassError, match="not a ledger"):
        engines.build_files(path)
    ledger.unlink()
    assert engines.build_files(path).facts["ledger"] is None


def test_an_op_that_the_library_lacks(tmp_path: Path, library: Library) -> None:
    node = helper.make_node(
        "Unheard", ["x"], ["y"], "mine", domain="qpass", plugin_version="1", plugin_namespace="qpass"
    )
    info = [helper.make_tensor_value_info(n, 1, [1, 4]) for n in "xy"]
    body = helper.make_function(
        "qpass",
        "Unheard",
        ["x"],
        ["y"],
        [helper.make_node("Relu", ["x"], ["y"])],
        [helper.make_opsetid("", 17)],
        ["plugin_version", "plugin_namespace"],
    )
    graph = helper.make_graph([node], "g", info[:1], info[1:])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("qpass", 1)]
    onnx.save(helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(QpassError, match="mine: the library has no op Unheard"):
        engines.build_files(tmp_path / "m.onnx")


def test_timing_cache(block: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a backend times, a cache is read and added to; TensorRT-RTX, which has one but times nothing, plays it."""
    path, kept = rewritten(block), tmp_path / "timing.bin"
    with pytest.raises(QpassError, match="--timing-cache: tensorrt_rtx times nothing"):
        engines.build_files(path, timing_cache=kept)
    monkeypatch.setattr(TensorRTRTX, "keeps_timing", True)
    engines.build_files(path, timing_cache=kept)
    assert kept.stat().st_size
    with pytest.raises(QpassError, match="would overwrite the input"):
        engines.build_files(path, timing_cache=path)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(("timing.b.", "."))]


def test_rewrite_and_build_in_one_go(block: Path, library: Library, run: Run) -> None:
    done = run("build", block, "--preset", "w8a16", "--opt", "x:1x16x64")
    assert done.code == 0, done.err
    for name in ("block.qpass.onnx", "block.qpass.ledger.json", "block.qpass.engine", "block.qpass.engine.json"):
        assert block.with_name(name).is_file()
    assert "all 2 plugin nodes are plugin layers" in done.out
    told = json.loads(run("build", block.with_name("block.qpass.onnx"), "--json").out)
    assert len(told["plugin_layers"]) == 2


def test_a_folder_that_cannot_be_written_in(
    block: Path, library: Library, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the model is rewritten."""
    (locked := tmp_path / "locked").mkdir()
    may = os.access
    monkeypatch.setattr("os.access", lambda path, *how: Path(path) != locked and may(path, *how))
    refused = run("build", block, "--preset", "w8a8", "-o", locked / "x.engine")
    assert (refused.code, f"cannot write in {locked}" in refused.err) == (2, True), refused.err
    assert not block.with_name("block.qpass.onnx").exists()


def test_mistakes(block: Path, library: Library, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rewritten(block)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.onnx").write_text("no model")
    wrong = [
        ((tmp_path / "none.onnx",), "no such file"),
        ((tmp_path / "text.onnx",), "text.onnx"),
        ((path, "--backend", "other"), "--backend other: there are auto, tensorrt_rtx, tensorrt"),
        ((path, "--target-arch", "70"), "--target-arch 70: tensorrt_rtx builds for 75, 80"),
        ((path, "--plugins", tmp_path / "none.so"), "no such plugin library"),
        ((path, "--min", "x:1"), "--min x:1 does not fit the input 'x'"),
        ((path, "-o", tmp_path / "no" / "x.engine"), "there is no folder"),
        ((path, "-o", tmp_path / "folder"), "it is a folder"),
        ((path, "-o", path), "would overwrite the input"),
        ((path, "--workspace", "much"), "--workspace much: wants a size"),
        ((block, "--preset", "w9"), "w9"),
    ]
    for args, said in wrong:
        refused = run("build", *args)
        assert refused.code == 2, (args, refused)
        assert said in refused.err, (args, refused.err)
        assert "Traceback" not in refused.err
    monkeypatch.delenv("QPASS_PLUGINS")
    assert "compile them with `qpass plugins build`" in run("build", path).err
    for backend in BACKENDS:
        monkeypatch.setattr(type(backend), "installed", lambda self: False)
    assert "no TensorRT is installed: pip install 'qpass[rtx]'" in run("build", path).err
    assert "pip install 'qpass[tensorrt]'" in run("build", path, "--backend", "tensorrt").err
    assert not list(tmp_path.glob("*.engine*"))


def test_nothing_that_was_read_is_overwritten(block: Path, library: Library, run: Run, tmp_path: Path) -> None:
    path = rewritten(block)
    spec = tmp_path / "recipe.yaml"
    spec.write_text("preset: w8a8\n")
    (tmp_path / "notes.json").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    mine = tmp_path / "mine.so"
    mine.write_bytes(library.path.read_bytes())
    before = {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    for args in (
        (path, "-o", path),
        (path, "-o", path.with_name("block.qpass.ledger.json")),
        (path, "-o", mine, "--plugins", mine),
        (path, "-o", tmp_path / "fifo"),
        (path, "-o", tmp_path / "notes"),
        (block, "--spec", spec, "-o", block),
        (block, "--spec", spec, "-o", spec),
        (block, "--preset", "w8a16", "-o", path),
    ):
        refused = run("build", *args)
        assert refused.code == 2, args
        assert "overw" in refused.err or "no regular file" in refused.err, (args, refused.err)
    assert {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before


def test_mistakes_are_said_before_anything_is_rewritten(block: Path, library: Library, run: Run) -> None:
    for args in (("--backend", "nope"), ("--target-arch", "99"), ("--plugins", "/nope.so"), ("--workspace", "2XB")):
        assert run("build", block, "--preset", "w8a16", *args).code == 2
        assert not block.with_name("block.qpass.onnx").exists()


def test_plugins_in_a_subgraph(tmp_path: Path, library: Library) -> None:
    """TensorRT-RTX builds none there, and says so in words that help nobody."""
    then = branch("then", "a", linear("x", "w", "a"), tensor("w", 16, 16))
    otherwise = branch("else", "b", [helper.make_node("Relu", ["x"], ["b"], "relu")])
    onnx.save(choice(then, otherwise), tmp_path / "m.onnx")
    with pytest.raises(QpassError, match=r"builds no plugins within If or Loop.*or build with --no-plugins"):
        engines.build_files(rewritten(tmp_path / "m.onnx", "w8a16"))


@pytest.mark.parametrize("use_plugins", [True, False])
def test_experts_cannot_be_built(tmp_path: Path, library: Library, use_plugins: bool) -> None:
    """TensorRT gathers no int8 constant; the preflight names the stack, with plugins and without."""
    onnx.save(product("two chosen for each token"), tmp_path / "m.onnx")
    with pytest.raises(QpassError, match=r"an int8 weight only where a plugin reads it, not a Gather.*exclude these"):
        engines.build_files(rewritten(tmp_path / "m.onnx", "w8a16"), use_plugins=use_plugins)


def test_a_library_that_runs_nowhere(block: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "architectures", ("90a",))
    with pytest.raises(QpassError, match=r"compiled for 90a, which does not run on 75, 80.*--arch 120 --arch 80"):
        engines.build_files(rewritten(block))


def test_what_the_child_prints_blocks_nothing(block: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONVERBOSE", "1")  # hundreds of kilobytes on its standard error
    assert engines.build_files(rewritten(block)).engine.is_file()


def test_a_model_that_tensorrt_refuses(tmp_path: Path, library: Library) -> None:
    text = '<ir_version: 10, opset_import: ["" : 17]> g (float[2, 3, 3] x) => (float[2] y) { [odd] y = Det(x) }'
    onnx.save(model(text), tmp_path / "m.onnx")
    with pytest.raises(QpassError, match=r"m\.onnx: TensorRT cannot parse the model: odd: .*Det"):
        engines.build_files(tmp_path / "m.onnx")
    assert not list(tmp_path.glob("*.engine*"))


def test_a_crash_is_a_message(block: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(
        QpassError, match=r"tensorrt_rtx [\d.]+ ended with exit code 1 while building; it said last: nothing"
    ):
        engines.build_files(block)
    assert not list(block.parent.glob("*.engine*"))


BUILD = "import sys, qpass.engine; qpass.engine.build_files(sys.argv[1])"


def test_killed_at_any_moment(block: Path, library: Library) -> None:
    """What is killed leaves no engine, and its child with it; what comes after cleans up and succeeds."""
    path = rewritten(block)
    engine = path.with_suffix(".engine")
    rng = random.Random(5)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", BUILD, str(path)], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if engine.exists():  # it was done before
            assert engine.with_name(f"{engine.name}.json").is_file()
            engine.unlink()
    engines.build_files(path)
    assert not [f for f in path.parent.iterdir() if f.name.startswith(".")]
    workers = subprocess.run(["pgrep", "-f", "qpass.engine.worker"], capture_output=True, text=True, check=False).stdout
    stats = [Path(f"/proc/{w}/stat") for w in workers.split()]
    orphans = [s for s in stats if s.exists() and s.read_text().split()[3] == "1"]
    assert not orphans, "a building process has outlived its parent"


def test_two_builds_side_by_side(block: Path, library: Library, tmp_path: Path) -> None:
    path = rewritten(block)
    code = "import sys, qpass.engine; qpass.engine.build_files(*sys.argv[1:])"
    targets = [tmp_path / f"{i}.engine" for i in range(2)]
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), str(t)]) for t in targets]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    assert all(t.is_file() for t in targets)


def test_promises_are_of_the_registry(block: Path, library: Library) -> None:
    assert set(promised(rewritten(block)).values()) <= set(REGISTRY)
