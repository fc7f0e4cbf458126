"""The cache of compiled plugins, the tools that are looked for, and what is said where something is missing.

Nothing is compiled here, but for a stand-in library: the compiler's part is that of `make plugins`.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from qpass import gpu, plugins
from qpass.errors import QpassError
from qpass.plugins import Library, toolchain
from qpass.plugins import compile as building
from qpass.plugins.library import LIBRARY
from qpass.plugins.tune.table import Entry, beside, read, update
from tests.conftest import Run


@pytest.fixture
def compiled(shells: Library, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The objects' folders that were compiled in, each time; compiling takes no time and gives the shells."""
    seen: list[Path] = []

    def instead(tools: Any, objects: Path, flags: Any, jobs: Any, progress: Any) -> None:
        seen.append(objects)
        (objects / "build").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shells.path, objects / "build" / LIBRARY)

    tools = toolchain.Toolchain(Path("nvcc"), "13.0.88", None, Path("cmake"), Path("ninja"), Path("cutlass"))
    monkeypatch.setattr(building, "_compile", instead)
    monkeypatch.setattr(toolchain, "find", lambda: tools)
    monkeypatch.setattr(toolchain, "gpu_architectures", tuple)
    return seen


def test_built_once(compiled: list[Path]) -> None:
    first = plugins.build(["90a"])
    assert plugins.build(["90a"]).path == first.path == plugins.find().path
    assert len(compiled) == 1
    assert plugins.build(["90a"], force=True).path == first.path
    assert len(compiled) == 2
    assert first.ops


def test_key_is_all_that_goes_in(compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.cu"
    own.write_text("// nothing")
    one = {plugins.build(["90a"]).path, plugins.build(["80"]).path, plugins.build(["90a"], extra=[own]).path}
    own.write_text("// something")
    one.add(plugins.build(["90a"], extra=[own]).path)
    assert len(one) == 4
    assert compiled[0] == compiled[2] == compiled[3] != compiled[1], "objects are shared but by architecture"
    assert plugins.build(["90a", "80"]).path == plugins.build(["80", "90a", "80"]).path
    monkeypatch.setattr(building, "source_hash", lambda: "other")
    assert plugins.build(["90a"]).path not in one


def test_sources_are_copied_by_content(compiled: list[Path]) -> None:
    plugins.build(["90a"])
    copy = compiled[0] / "cuda_plugins"
    files = {f.relative_to(copy): f.stat().st_mtime_ns for f in copy.rglob("*") if f.is_file()}
    assert {Path("CMakeLists.txt"), Path("plugins/op.h"), Path("kernels/qpass_kernels.h")} <= set(files)
    (copy / "plugins" / "gone.cpp").write_text("// of another version")
    (copy / "plugins" / "op.h").write_text("// of another version")
    plugins.build(["90a"], force=False)
    building._synchronize(building.source_folder(), copy)
    after = {f.relative_to(copy): f.stat().st_mtime_ns for f in copy.rglob("*") if f.is_file()}
    assert set(after) == set(files)
    changed = {f for f in files if files[f] != after[f]}
    assert changed == {Path("plugins/op.h")}


def test_find(compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QpassError, match="compile them with `qpass plugins build`"):
        plugins.find()
    for_ampere, for_hopper = plugins.build(["80"]), plugins.build(["90a"])
    time.sleep(0.01)
    for_hopper.path.touch()
    assert plugins.find().path == for_hopper.path, "the newest"
    assert plugins.find(capability="89").path == for_ampere.path, "one that runs there"
    assert plugins.find(capability="120").path == for_hopper.path, "none runs there: the newest"
    with pytest.raises(QpassError, match=r"none\.so: no such plugin library"):
        plugins.find(tmp_path / "none.so")
    monkeypatch.setenv("QPASS_PLUGINS", str(for_ampere.path))
    assert plugins.find().path == for_ampere.path
    monkeypatch.delenv("QPASS_PLUGINS")
    monkeypatch.setattr(plugins, "source_hash", lambda: "those of another version")
    with pytest.raises(QpassError, match="not compiled"):
        plugins.find()


def test_what_runs_where() -> None:
    assert toolchain.runs_on(("80",), "89")
    assert toolchain.runs_on(("80", "90a"), "90")
    assert not toolchain.runs_on(("90a",), "100")
    assert not toolchain.runs_on(("89",), "86")
    assert not toolchain.runs_on(("80",), "90")
    assert toolchain.runs_on(("120",), "121")
    wanted = {"80": "80", "86": "86", "87": "87", "88": "86", "89": "89", "90": "90a", "100": "100a", "121": "120"}
    assert {c: toolchain.compiled_for(c) for c in wanted} == wanted
    assert toolchain.compiled_for("75") == ""


def test_jetson_is_on_its_own() -> None:
    """CUDA promises binaries of one compute capability for later ones of the same major, but not to and from Jetson."""
    assert toolchain.runs_on(("80", "87"), "87")
    assert not toolchain.runs_on(("80", "86"), "87")
    assert not toolchain.runs_on(("87",), "89")


class Driver:
    """libcuda with GPUs of these compute capabilities."""

    def __init__(self, *gpus: tuple[int, int], fails: int = 0) -> None:
        self.gpus, self.fails = gpus, fails

    def cuInit(self, flags: int) -> int:
        return self.fails

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 40 + ordinal
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.gpus[device.value - 40][{75: 0, 76: 1}[attribute]]
        return 0


def test_gpus_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No nvidia-smi and no pycuda is asked: Jetson has the former not, a machine that builds needs the latter not."""
    for driver, capabilities, architectures in (
        (Driver((8, 7)), ("87",), ("87",)),
        (Driver((12, 0), (9, 0), (7, 5)), ("120", "90", "75"), ("120", "90a")),
        (Driver(), (), ()),
        (Driver((8, 7), fails=100), (), ()),
    ):
        monkeypatch.setattr("qpass.gpu.ctypes.CDLL", lambda name, driver=driver: driver)
        assert gpu.capabilities() == capabilities
        assert toolchain.gpu_architectures() == architectures

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("qpass.gpu.ctypes.CDLL", missing)
    assert gpu.capabilities() == ()


def build_beside(folder: str, done: Any) -> None:
    """A process that builds into a cache that another fills too."""
    import os

    os.environ["XDG_CACHE_HOME"] = folder
    done.put(str(plugins.build(["90a"]).path))


def test_two_builds_side_by_side(compiled: list[Path], cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both succeed, with one library, complete."""
    at_once = building._compile

    def slowly(*args: Any) -> None:
        time.sleep(0.3)
        at_once(*args)

    monkeypatch.setattr(building, "_compile", slowly)
    fork = multiprocessing.get_context("fork")
    done = fork.Queue()
    both = [fork.Process(target=build_beside, args=(str(cache_folder.parents[1]), done)) for _ in range(2)]
    for p in both:
        p.start()
    paths = {done.get(timeout=60) for _ in both}
    for p in both:
        p.join()
    assert [p.exitcode for p in both] == [0, 0]
    assert len(paths) == 1
    assert Library(Path(paths.pop())).ops
    assert not list(cache_folder.glob("*.[0-9]*"))


def test_missing_tools(cache_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that is missing is named at once, with the mend."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CUTLASS_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "_tool", lambda name: None)
    with pytest.raises(QpassError) as missing:
        plugins.build(["90a"])
    for word in ("nvcc", "cmake", "ninja", "CUTLASS", "pip install 'qpass[plugins]'"):
        assert word in str(missing.value)


def test_a_compiler_that_fails(
    shells: Library, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error is told, the rest is in a file; nothing is in the cache."""
    (tmp_path / "cmake").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "ninja").write_text("#!/bin/sh\necho '[1/3] nvcc a.cu'\necho 'a.cu(3): error: no such thing'\nexit 1\n")
    for tool in ("cmake", "ninja"):
        (tmp_path / tool).chmod(0o755)
    tools = toolchain.Toolchain(Path("nvcc"), "13", None, tmp_path / "cmake", tmp_path / "ninja", tmp_path)
    monkeypatch.setattr(toolchain, "find", lambda: tools)
    steps = []
    with pytest.raises(QpassError, match=r"a\.cu\(3\): error: no such thing; all that the compiler said: .*build\.log"):
        plugins.build(["90a"], progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3)]
    assert not building.built()


@pytest.mark.parametrize("step", ["_synchronize", "_compile", "copyfile"])
def test_a_disk_that_is_full(
    step: str, compiled: list[Path], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sources, the compiler's log or the library: a line that says where, nothing half written, then mended."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as filled:
        filled.setattr(shutil if step == "copyfile" else building, step, full)
        where = re.escape(str(building.folder()))
        with pytest.raises(QpassError, match=rf"written to {where}: No space left on device; mend that, or .* XDG_"):
            plugins.build(["90a"])
    assert not building.built()
    assert [f.name for f in building.folder().iterdir() if not f.name.startswith("objects-")] == []
    assert plugins.build(["90a"]).ops


def test_whose_plugins(compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said by a flag, by headers, or by the TensorRT that is installed; objects of kernels serve both."""
    flags: list[list[str]] = []
    places: set[Path] = set()
    inner = building._compile

    def compile_and_tell(tools: Any, objects: Path, given: list[str], *rest: Any) -> None:
        flags.append(given)
        places.add(objects)
        inner(tools, objects, given, *rest)

    monkeypatch.setattr(building, "_compile", compile_and_tell)
    monkeypatch.setattr(toolchain, "installed_tensorrt", lambda: "8")
    for name, text in (("old", "class IPluginV2DynamicExt"), ("new", "class IPluginV3 : public IVersionedInterface")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "NvInferRuntime.h").write_text(text)
    wanted = []
    for tensorrt, headers, major in (
        (None, None, "8"),
        ("10.3", None, "10"),
        ("rtx", tmp_path / "new", "10"),
        (None, tmp_path / "old", "8"),
        (None, tmp_path / "new", "10"),
    ):
        plugins.build(["90a"], tensorrt=tensorrt, tensorrt_include=headers, force=True)
        wanted.append(f"-DQPASS_TENSORRT={major}")
    assert [next(f for f in given if f.startswith("-DQPASS_TENSORRT=")) for given in flags] == wanted
    assert len(places) == 1
    with pytest.raises(QpassError, match=r"--tensorrt 8\.6: wants 8\.6 or 10 .* as its headers are"):
        plugins.build(["90a"], tensorrt="8.6", tensorrt_include=tmp_path / "new")


def test_found_by_interface(compiled: list[Path], shells: Library, shells8: Library, cache_folder: Path) -> None:
    assert {"8": shells8.interface, "10": shells.interface} == plugins.INTERFACES
    old = plugins.build(["90a"], tensorrt="8.6")
    new = plugins.build(["90a"], tensorrt="10")
    assert plugins.find(interface="IPluginV2DynamicExt").path == old.path
    assert plugins.find(interface="IPluginV3").path == new.path


def test_output_is_checked_before_the_compile(
    compiled: list[Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.cu"
    own.write_text("// an op")
    for output, said in (
        (tmp_path / "no" / "where.so", "there is no folder"),
        (tmp_path, "it is a folder"),
        (own, "would overwrite the input"),
    ):
        refused = run("plugins", "build", "--with", own, "-o", output)
        assert (refused.code, said in refused.err) == (2, True), refused.err
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot write in" in run("plugins", "build", "-o", tmp_path / "mine.so").err
    assert not compiled


def test_output_is_whole_or_not(
    compiled: list[Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays where the disk is full; who has it open keeps it where not."""
    mine = tmp_path / "mine.so"
    mine.write_bytes(b"old")
    plugins.build()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        refused = run("plugins", "build", "-o", mine)
    assert (refused.code, "no space left" in refused.err) == (2, True), refused.err
    assert mine.read_bytes() == b"old"
    with mine.open("rb") as file:
        assert run("plugins", "build", "-o", mine).code == 0
        assert file.read() == b"old"
    assert Library(mine).ops
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cache", "mine.so"]


def test_all_libraries(compiled: list[Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not compiled" in run("plugins", "info", "--all").out
    monkeypatch.setattr("qpass.gpu.capabilities", lambda: ("89",))
    monkeypatch.setattr("qpass.plugins.commands.installed_tensorrt", lambda: "10")
    ours = plugins.build(["80"], tensorrt="10")
    old = plugins.build(["80"], tensorrt="8.6")
    hopper = plugins.build(["90a"], tensorrt="10")
    with monkeypatch.context() as patch:
        patch.setattr(building, "source_hash", lambda: "other")
        stale = plugins.build(["80"], tensorrt="10")
    told = json.loads(run("plugins", "info", "--all", "--json").out)
    assert [(r["path"], r["taken"], r["why"]) for r in told] == [
        (str(ours.path), True, "it is the newest that fits"),
        (str(hopper.path), False, "it does not run on 89"),
        (str(old.path), False, "its plugins are not of IPluginV3"),
        (str(stale.path), False, "it is of another version's sources"),
    ]
    assert plugins.find(capability="89", interface="IPluginV3").path == ours.path
    record = stale.path.with_name("build.json")
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "interface"}))
    assert "an interface not told for 80; not taken" in run("plugins", "info", "--all").out, "as old versions wrote it"
    monkeypatch.setattr("qpass.gpu.capabilities", lambda: ("120",))
    said = run("plugins", "info", "--all").out
    assert "taken: nothing fits better; it does not run on 120" in said
    monkeypatch.setenv("QPASS_PLUGINS", str(old.path))
    first, *rest = json.loads(run("plugins", "info", "--all", "--json").out)
    assert (first["path"], first["why"]) == (str(old.path), "QPASS_PLUGINS names it")
    assert not any(r["taken"] for r in rest)
    assert "give one of them" in run("plugins", "info", "--all", "--library", old.path).err


def test_the_table_of_a_library_goes_along(compiled: list[Path], run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.so"
    assert run("plugins", "build", "--arch", "90a").code == 0
    library = plugins.find().path
    update(beside(library), "NVIDIA H200", [Entry("w8a8", 256, 256, 16, "skinny"), Entry("w8a8", 256, 256, 64, "mma")])
    assert run("plugins", "build", "--arch", "90a", "-o", mine).code == 0
    assert read(beside(mine)) == read(beside(library))
    assert f"tuned for NVIDIA H200: 2 lines of {mine}.tuning" in run("plugins", "info", "-l", mine).out
    assert json.loads(run("plugins", "info", "-l", mine, "--json").out)["tuned"] == {"NVIDIA H200": 2}
    beside(mine).write_text("no table")
    refused = run("plugins", "info", "-l", mine)
    assert (refused.code, "mine.so.tuning is no table of tuning" in refused.err) == (2, True), refused.err
    before = mine.read_bytes()
    beside(library).write_text("no table")
    assert run("plugins", "build", "--arch", "90a", "-o", mine).code == 2
    assert mine.read_bytes() == before


def test_commands(compiled: list[Path], run: Run, tmp_path: Path) -> None:
    assert "not compiled" in run("plugins", "info").err
    built = run("plugins", "build", "--arch", "90a", "-o", tmp_path / "mine.so")
    assert built.code == 0
    assert "mine.so for 80, 90a" in built.out
    assert "SmoothQuantGemm" in run("plugins", "info").out
    assert '"architectures": "80 90a"' in run("plugins", "info", "--library", tmp_path / "mine.so", "--json").out
    assert "tuned for" not in run("plugins", "info").out
    assert not beside(tmp_path / "mine.so").exists()
    for args, said in (
        (("build", "--arch", "75"), "--arch 75: qpass compiles for 80, 86"),
        (("build", "--with", tmp_path / "none.cu"), "wants a .cpp or .cu file that is there"),
        (("build", "--tensorrt-include", tmp_path), "has no NvInferRuntime.h"),
        (("build", "--tensorrt", "7"), "--tensorrt 7: wants 8.6 or 10"),
        (("build", "-o", tmp_path / "no" / "where.so"), "there is no folder"),
        (("selftest", "--op", "Nothing"), "--op Nothing: there are QuantizeTensor"),
        (("bench", "--dtype", "int8"), "--dtype int8: wants one of"),
    ):
        refused = run("plugins", *args)
        assert refused.code == 2
        assert said in refused.err
        assert "Traceback" not in refused.err
