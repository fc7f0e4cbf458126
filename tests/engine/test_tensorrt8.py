"""The backend for TensorRT 8.6, which a stand-in plays: what the model becomes on the way, and how builds end.

The real one builds, runs and is measured in benchmarks/results/engines_*.json, on a GPU.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import qpass
from qpass import engine as engines
from qpass.engine import backends, builder
from qpass.engine.backends.tensorrt_rtx import TensorRTRTX
from qpass.errors import QpassError
from qpass.plugins import Library
from tests import zoo
from tests.conftest import Run
from tests.zoo import FEW

pytestmark = pytest.mark.usefixtures("tensorrt8")


def told(engine: Path) -> dict[str, Any]:
    """What the stand-in was told."""
    found: dict[str, Any] = json.loads(engine.read_text())["told"]
    return found


def rewritten(path: Path, preset: str = "w8a8", group_size: int | None = None) -> Path:
    spec = qpass.QuantSpec.preset(preset, group_size)
    return qpass.rewrite(path, path.with_name(f"{path.stem}.{preset}.onnx"), spec=spec).output


def test_it_is_chosen_by_its_version() -> None:
    chosen = backends.choose("tensorrt")
    assert (chosen.name, chosen.version(), chosen.interface) == ("tensorrt", "8.6.1", "IPluginV2DynamicExt")
    assert chosen.weakly_typed


def test_auto_goes_by_the_gpu(block: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX, the first, does not build for Hopper; where nothing that is installed does, that is said."""
    monkeypatch.setattr(TensorRTRTX, "installed", lambda self: True)
    for here, name in (((), "tensorrt_rtx"), (("89",), "tensorrt_rtx"), (("90", "89"), "tensorrt")):
        monkeypatch.setattr("qpass.gpu.capabilities", lambda here=here: here)
        assert builder.backend_for("auto", None)[0].name == builder.backend_for("auto", "current")[0].name == name
    assert builder.backend_for("auto", "sm_89") == (backends.choose("tensorrt_rtx"), "89")
    done = run("build", rewritten(block), "--json")
    assert json.loads(done.out)["backend"]["name"] == "tensorrt", done.err
    refused = run("build", block, "--preset", "w8a8", "--backend", "tensorrt_rtx")
    assert (refused.code, "this GPU's is 90; choose another --backend" in refused.err) == (2, True), refused.err
    assert not block.with_name("block.qpass.onnx").exists()


def test_build(block: Path, run: Run) -> None:
    done = run("build", block, "--preset", "w8a8", "--backend", "tensorrt", "--opt", "x:1x16x64", "--level", "2")
    assert done.code == 0, done.err
    assert "by tensorrt 8.6.1 for current" in done.out
    assert "all 4 plugin nodes are plugin layers" in done.out
    assert "TensorRT warns of 1 thing;" in done.err, "what is meant is not counted"
    engine = block.with_name("block.qpass.engine")
    said = told(engine)
    assert said["flags"] == ["TF32", "FP16", "INT8"]
    assert said["level"] == 2
    facts = json.loads(engine.with_name("block.qpass.engine.json").read_text())
    assert (facts["precision"], facts["proof"]) == ("fp16", "inspector")
    assert "qpass build" in facts["commands"]["build"], "trtexec does not take the model as it is"
    quantized = [n for n, op in facts["plugin_layers"].items() if op != "SmoothQuantGemm"]
    assert len(said["ranges"]) == len(quantized), "the integers that plugins make have a scale of one"
    assert set(map(tuple, said["ranges"].values())) == {(-127.0, 127.0)}
    gemms = [a for n, a in said["attributes"].items() if facts["plugin_layers"][n] == "SmoothQuantGemm"]
    assert [a["int8_dims"] for a in gemms] == [[0, 2, 128, 64, 0, 0], [0, 2, 64, 128, 0, 0, 0]]


def test_settings_are_told(block: Path, run: Run) -> None:
    """In the line that is printed, in the sidecar, and in the command that builds the engine again."""
    path = rewritten(block)
    done = run("build", path, "--backend", "tensorrt", "--level", "0", "--workspace", "512MB", "--precision", "fp32")
    assert ", fp32, level 0, workspace up to 512.0 MB; all 4 plugin nodes" in done.out, done.err
    facts = json.loads(path.with_suffix(".engine.json").read_text())
    assert (facts["precision"], facts["level"], facts["workspace"]) == ("fp32", 0, 512_000_000)
    assert told(path.with_suffix(".engine"))["level"] == 0
    command = shlex.split(facts["commands"]["build"])
    path.with_suffix(".engine.json").unlink()
    again = run(*command[1:], "--json")
    assert again.code == 0, again.err
    made = json.loads(again.out)
    assert [made[k] for k in ("precision", "level", "workspace")] == ["fp32", 0, 512_000_000]
    plain = run("build", path, "--backend", "tensorrt")
    assert ", fp16, TensorRT's own level; all 4" in plain.out


def test_precision(block: Path, run: Run) -> None:
    for preset, precision, flags, kind in (
        ("w8a8", "fp32", ["INT8"], 1),
        ("w8a16", "fp32", [], 1),
        ("w8a16", "fp16", ["TF32", "FP16"], 10),
    ):
        engine = engines.build_files(rewritten(block, preset), precision=precision, backend="tensorrt").engine
        said = told(engine)
        assert said["flags"] == flags
        assert {a["float_type"] for a in said["attributes"].values()} == {kind}
    with pytest.raises(QpassError, match="--precision bf16: there are fp16, fp32"):
        engines.build_files(rewritten(block), precision="bf16", backend="tensorrt")
    refused = run("build", rewritten(block), "--precision", "fp16", "--backend", "tensorrt_rtx")
    assert (refused.code, "takes the types of the model; leave it out" in refused.err) == (2, True), refused.err


@zoo.each(*FEW)
def test_models_of_the_zoo(path: Path, tmp_path: Path) -> None:
    """Its parser is played by one that refuses what the real one refuses: functions, int8 weights, later opsets."""
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert not engines.build_files(copy, backend="tensorrt").facts["plugin_layers"]
    for preset, group_size in (("w8a8", None), ("w4a16-g128", 32)):
        facts = engines.build_files(rewritten(copy, preset, group_size), backend="tensorrt").facts
        assert facts["plugin_layers"]
        assert facts["layers"]["PluginV2"] == len(facts["plugin_layers"])


def test_without_plugins(block: Path) -> None:
    with pytest.raises(QpassError, match=r"--no-plugins: tensorrt 8\.6\.1 cannot build the ops of block\.w8a8\.onnx"):
        engines.build_files(rewritten(block), backend="tensorrt", use_plugins=False)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("crashes", "tensorrt 8.6.1 was ended by signal 6 while building; it said last: terminate called without"),
        ("is killed", r"was ended by signal 9 \(out of memory\?\) while building"),
        ("runs out", "TensorRT built no engine. TensorRT said: Error Code 2: OutOfMemory"),
        ("forgets", "plugin nodes are not in the finished engine: "),
    ],
)
def test_how_builds_fail(does: str, said: str, block: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of ours with TensorRT's last, exit code 2, and no file that was not there before."""
    monkeypatch.setenv("TENSORRT8_DOES", does)
    path = rewritten(block)
    before = set(block.parent.iterdir())
    with pytest.raises(QpassError, match=said):
        engines.build_files(path, backend="tensorrt")
    failed = run("build", path, "--backend", "tensorrt")
    assert failed.code == 2
    assert "Traceback" not in failed.err
    assert {f for f in block.parent.iterdir() if f.name != "cache"} == before - {block.parent / "cache"}


def test_what_its_parser_refuses_is_named(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in "xy")
    node = helper.make_node("Hardmax", ["x"], ["y"], "pick")
    proto = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)])
    save(proto, tmp_path / "m.onnx")
    with pytest.raises(
        QpassError, match=r"cannot parse the model: pick \(Hardmax\): Assertion failed: Plugin not found"
    ):
        engines.build_files(tmp_path / "m.onnx", backend="tensorrt")


def test_plugins_of_the_other_interface(block: Path, shells: Library) -> None:
    said = r"has plugins of IPluginV3, tensorrt 8\.6\.1 wants IPluginV2DynamicExt.*qpass plugins build --tensorrt 8"
    with pytest.raises(QpassError, match=said):
        engines.build_files(rewritten(block), backend="tensorrt", library=shells.path)
    with pytest.raises(QpassError, match=r"has plugins of IPluginV2DynamicExt, tensorrt_rtx .* --tensorrt 10"):
        engines.build_files(rewritten(block), backend="tensorrt_rtx")


def test_bfloat16_is_not_there(block: Path, tmp_path: Path) -> None:
    import ml_dtypes
    import onnx
    from onnx import TensorProto, numpy_helper

    proto = onnx.load(block)
    for w in proto.graph.initializer:
        w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w).astype(ml_dtypes.bfloat16), w.name))
    for v in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        v.type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.save(proto, tmp_path / "bf16.onnx")
    with pytest.raises(QpassError, match="x is bfloat16, the library has float32, float16"):
        engines.build_files(rewritten(tmp_path / "bf16.onnx", "w8a16"), backend="tensorrt")


@pytest.mark.parametrize(
    ("version", "known"), [("8.6.0", True), ("8.6.1.post1", True), ("8.5.2", False), ("8.60", False)]
)
def test_which_versions(version: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """8.5 loads no plugin libraries."""
    monkeypatch.setattr(backends.Backend, "version", lambda self: version)
    if known:
        assert backends.choose("tensorrt").version() == version
        return
    with pytest.raises(QpassError, match=f"tensorrt {version} is installed, which qpass does not know"):
        backends.choose("tensorrt")


def test_mistakes_are_said_before_anything_is_rewritten(block: Path, run: Run, shells: Library) -> None:
    for args, said in (
        (("--plugins", shells.path), "has plugins of IPluginV3, tensorrt 8.6.1 wants IPluginV2DynamicExt"),
        (("--level", "9"), "--level 9: TensorRT has 0 to 5"),
        (("--precision", "int8"), "--precision int8: there are fp16, fp32"),
        (("--no-plugins",), "--no-plugins: tensorrt 8.6.1 cannot build qpass's ops itself"),
        (("--min", "z:1"), "--min z: the model has no such input"),
        (("--min", "x:8x1x64", "--opt", "x:4x1x64"), "are not min ≤ opt ≤ max"),
    ):
        refused = run("build", block, "--preset", "w8a8", "--backend", "tensorrt", *args)
        assert (refused.code, said in refused.err) == (2, True), refused.err
        assert not block.with_name("block.qpass.onnx").exists()


def test_verify_says_first_that_there_is_no_gpu(block: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("ONNX Runtime was asked before the GPU")

    def none() -> None:
        raise QpassError("there is no CUDA GPU on this machine")

    path = rewritten(block)
    engine = engines.build_files(path, backend="tensorrt").engine
    monkeypatch.setattr("qpass.engine.verify.Runner", never)
    monkeypatch.setattr("qpass.gpu.driver", none)
    said = run("verify", block, engine)
    assert (said.code, "there is no CUDA GPU" in said.err) == (2, True), said.err
    other = run("verify", block, engine, "--rewritten", block)
    assert (other.code, "was not built of this" in other.err) == (2, True), other.err
    layers = run("verify", block, engine, "--layers")
    assert "an engine shows no layer's output" in layers.err
