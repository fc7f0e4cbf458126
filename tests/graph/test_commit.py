"""Saving is all or nothing: whatever happens, the old output or the new one, and nothing left over."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto

from qpass.errors import QpassError
from qpass.graph import Model, commit
from qpass.graph import save as save_module
from tests.graph.models import initializers, linear_model, quantize_all, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return save(linear_model(), tmp_path / "in" / "in.onnx", external=True)


@pytest.fixture(params=["inside", "outside"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, source: Path) -> Model:
    """A model to be saved with its weights inside the file or beside it."""
    if request.param == "outside":
        monkeypatch.setattr(save_module, "INSIDE", 0)
    return Model.load(source)


@pytest.fixture
def old(tmp_path: Path, model: Model) -> dict[str, bytes]:
    """An output that is there already, in the folder `out`."""
    (tmp_path / "out").mkdir()
    other = Model.load(save(linear_model(seed=9), tmp_path / "in" / "other.onnx", external=True))
    other.save(tmp_path / "out" / "m.onnx", sidecars={tmp_path / "out" / "m.ledger.json": b"old"})
    return contents(tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def save_new(model: Model, tmp_path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    out = tmp_path / "out"
    model.save(out / "m.onnx", sidecars={out / "m.ledger.json": b"new"}, progress=progress)


def test_a_new_output_replaces_the_old(model: Model, old: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "out" / "m.notes.data").write_bytes(b"the user's")
    (tmp_path / "out" / "mm.0123456789abcdef.data").write_bytes(b"of another model")
    save_new(model, tmp_path)
    new = contents(tmp_path / "out")
    assert new["m.ledger.json"] == b"new"
    assert new["m.onnx"] != old["m.onnx"]
    assert len(new) == len(old) + 2
    assert len([n for n in new.keys() & old.keys() if n.endswith(".data")]) == 0
    assert initializers(tmp_path / "out" / "m.onnx").keys() == {"w0", "b0", "w1", "b1"}


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_full_disk(
    model: Model,
    old: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
) -> None:
    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(QpassError, match="-o") as error:
            save_new(model, tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "out") in str(error.value)
    assert contents(tmp_path / "out") == old
    save_new(model, tmp_path)


def test_a_disk_that_fills_up(
    model: Model, old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the blocks fit, and one write is cut short first, as real ones are."""
    left = 15000
    pwrite, lock = os.pwrite, threading.Lock()

    def some(fd: int, data: memoryview, offset: int) -> int:
        nonlocal left
        with lock:
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = pwrite(fd, data[: min(left, 999)], offset)
            left -= written
            return written

    monkeypatch.setattr(os, "pwrite", some)
    with pytest.raises(QpassError, match="no space left"):
        save_new(model, tmp_path)
    assert contents(tmp_path / "out") == old


def test_a_disk_without_room_is_refused_at_once(
    model: Model, old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statvfs = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*statvfs[:4], 1, *statvfs[5:]]))
    with pytest.raises(QpassError, match=r"no space left .* MB"):
        save_new(model, tmp_path)
    assert contents(tmp_path / "out") == old


def test_a_file_size_limit(model: Model, old: dict[str, bytes], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(QpassError, match="file size limit"):
            save_new(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "out") == old


def test_a_rule_that_fails(source: Path, old: dict[str, bytes], tmp_path: Path) -> None:
    model = Model.load(source)
    quantize_all(model)
    for node in model.graph.nodes:
        for const in node.inputs[1:]:
            if node.domain == "qpass":
                const.array.group.fn = lambda block: 1 / 0
    with pytest.raises(ZeroDivisionError):
        save_new(model, tmp_path)
    assert contents(tmp_path / "out") == old


@pytest.mark.parametrize(
    ("out", "says"),
    [("missing/m.onnx", "there is no folder"), (".", "it is a folder"), ("/sys/m.onnx", "cannot write in /sys")],
)
def test_places_that_cannot_be_written(model: Model, tmp_path: Path, out: str, says: str) -> None:
    with pytest.raises(QpassError, match=says):
        model.save(tmp_path / out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder(model: Model, old: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "out").chmod(0o555)
    with pytest.raises(QpassError, match="cannot write in"):
        save_new(model, tmp_path)
    assert contents(tmp_path / "out") == old


@pytest.mark.parametrize("target", ["in.onnx", "in.data", "symlink.onnx", "hard.onnx", "../in/in.onnx"])
def test_output_over_input_is_refused(model: Model, source: Path, target: str) -> None:
    folder = source.parent
    (folder / "symlink.onnx").symlink_to("in.onnx")
    (folder / "hard.onnx").hardlink_to(source.with_suffix(".data"))
    before = contents(folder)
    with pytest.raises(QpassError, match="would overwrite the input"):
        model.save(folder / target)
    with pytest.raises(QpassError, match="would overwrite the input"):
        model.save(folder / "fine.onnx", sidecars={folder / target: b""} if "/" not in target else {source: b""})
    assert contents(folder) == before


def test_input_data_that_is_named_like_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has renamed the graph of an output and writes a new one under the old name."""
    monkeypatch.setattr(save_module, "INSIDE", 0)
    monkeypatch.setattr(save_module, "INSIDE_AS_BEFORE", 0)
    Model.load(save(linear_model(), tmp_path / "in.onnx")).save(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").rename(tmp_path / "renamed.onnx")
    model = Model.load(tmp_path / "renamed.onnx")
    quantize_all(model)
    model.save(tmp_path / "m.onnx")
    assert initializers(tmp_path / "renamed.onnx").keys() == {"w0", "b0", "w1", "b1"}
    assert len(list(tmp_path.iterdir())) == 5


def test_sidecars_must_be_beside(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beside"):
        model.save(tmp_path / "m.onnx", sidecars={tmp_path / "in" / "ledger.json": b""})


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(
    model: Model, old: dict[str, bytes], tmp_path: Path
) -> None:
    dead = tmp_path / "out" / ".other.onnx.1-0.qpass-tmp"  # whoever has that pid now
    dead.write_bytes(b"half")
    with commit.Folder(tmp_path / "out") as folder:
        living = folder.temporary("another.onnx").path
        dead.write_bytes(b"half")
        save_new(model, tmp_path)
        assert living.exists()
        assert not dead.exists()
    assert len(contents(tmp_path / "out")) == len(old)


def test_an_interrupt_while_weights_are_written(model: Model, old: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_new(model, tmp_path, lambda done, total: signal.raise_signal(signal.SIGINT))
    assert contents(tmp_path / "out") == old


def test_an_interrupt_while_files_are_renamed_waits(
    model: Model, old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def interrupted(a: Path, b: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        rename(a, b)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_new(model, tmp_path)
    new = contents(tmp_path / "out")
    assert new["m.ledger.json"] == b"new"
    assert len(new) == len(old)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert initializers(tmp_path / "out" / "m.onnx").keys() == {"w0", "b0", "w1", "b1"}


def test_a_rename_that_fails(
    model: Model, old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(a: Path, b: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(QpassError, match="cannot write in"):
        save_new(model, tmp_path)
    assert contents(tmp_path / "out") == old


def test_two_writers_of_one_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them wins each time, and the data that the graph names is there."""
    monkeypatch.setattr(save_module, "INSIDE", 0)
    monkeypatch.setattr(save_module, "INSIDE_AS_BEFORE", 0)
    inputs = [save(linear_model(seed=s), tmp_path / f"in{s}.onnx") for s in range(2)]
    (tmp_path / "out").mkdir()
    failures: list[Exception] = []

    def write(path: Path) -> None:
        try:
            for _ in range(10):
                Model.load(path).save(tmp_path / "out" / "m.onnx")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[path]) for path in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert initializers(tmp_path / "out" / "m.onnx").keys() == {"w0", "b0", "w1", "b1"}
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("kills", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_kills(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, "-m", "tests.graph.kill_writer", str(tmp_path), str(kills)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{kills} kills")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Weights of 100 MB, inside the file or beside it, transposed and quantized: a few blocks are held."""
    script = """
import resource, sys
from pathlib import Path
from qpass.graph import Model, stream
from tests.graph.models import quantize_all
folder = Path(sys.argv[1])
stream.BLOCK = 1 << 20
Model.load(folder / "tiny.onnx").save(folder / "out.onnx")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = Model.load(folder / sys.argv[2])
quantize_all(model)
model.save(folder / "out.onnx")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    save(linear_model(), tmp_path / "tiny.onnx")
    model = linear_model(1, 1000, 8)
    row = model.graph.initializer[0].raw_data
    for i in range(4):
        tensor = model.graph.initializer.add(name=f"big{i}", data_type=TensorProto.FLOAT, dims=[800, 8000])
        tensor.raw_data = row * 800
        model.graph.node.add(op_type="MatMul", name=f"n{i}", input=["m0", f"big{i}"], output=[f"big_y{i}"])
    save(model, tmp_path / "inside.onnx")
    save(model, tmp_path / "beside.onnx", external=True)
    for name in ("inside.onnx", "beside.onnx"):
        command = [sys.executable, "-c", script, str(tmp_path), name]
        grown = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        assert grown < 40 << 10, (name, grown)
