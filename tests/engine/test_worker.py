"""One process for several builds: when it is kept, when there is a fresh one, and that none is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from select import select
from typing import Any

import onnx
import pytest

import qpass
from qpass import engine as engines
from qpass.engine import Finished, Worker
from qpass.errors import QpassError
from qpass.plugins import Library
from qpass.testing import model

RELU = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] {0}) => (float[2] y) {{ y = Relu({0}) }}'


def does(what: str, folder: Path) -> Path:
    """A model that TensorRT's stand-in does this at."""
    path = folder / f"{what}.onnx"
    onnx.save(model(RELU.format(what)), path)
    return path


def told(finished: Finished) -> dict[str, Any]:
    """What the stand-in was told, and by whom."""
    found: dict[str, Any] = json.loads(finished.engine.read_text())["told"]
    return found


def pid(path: Path, worker: Worker, **how: Any) -> int:
    """The process that builds this."""
    return int(told(engines.build_files(path, backend="tensorrt", worker=worker, **how))["pid"])


def lives(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


@pytest.mark.usefixtures("tensorrt8")
class TestKept:
    def test_one_process(self, block: Path) -> None:
        """TensorRT starts once and loads the plugins once, and what one build made is gone before the next."""
        files = [block, *(qpass.rewrite(block, block.with_name(f"{p}.onnx"), spec=p).output for p in ("w8a8", "w8a16"))]
        with Worker() as worker:
            built = [engines.build_files(f, backend="tensorrt", worker=worker) for f in (*files, block, files[1])]
            seen = list(map(told, built))
            process = seen[0]["pid"]
            assert lives(process)
        assert not lives(process)
        assert [s["pid"] for s in seen] == 5 * [process]
        assert [(s["builders"], s["networks"]) for s in seen] == 5 * [(1, 1)]
        assert [len(b.facts["plugin_layers"]) for b in built] == [0, 4, 2, 0, 4]
        assert process != os.getpid()

    def test_words_are_of_one_build(self, block: Path) -> None:
        """TensorRT keeps the first logger that it is given, whose verbosity is each build's own."""
        with Worker() as worker:
            for verbose in (False, True, False):
                said: list[str] = []
                log = said.append if verbose else None
                done = engines.build_files(block, backend="tensorrt", worker=worker, log=log)
                assert done.warnings == ["a warning of note"]
                assert ("a remark" in said) == verbose

    @pytest.mark.parametrize(
        ("what", "said"),
        [
            ("crashes", "tensorrt 8.6.1 was ended by signal 6 while building; it said last: terminate called without"),
            ("is_killed", r"was ended by signal 9 \(out of memory\?\) while building; it said last: nothing"),
            ("runs_out", "TensorRT built no engine. TensorRT said: Error Code 2: OutOfMemory"),
        ],
    )
    def test_a_death_ends_one_build(self, what: str, said: str, block: Path, tmp_path: Path) -> None:
        with Worker() as worker:
            first = pid(block, worker)
            with pytest.raises(QpassError, match=rf"{what}\.onnx: .*{said}"):
                pid(does(what, tmp_path), worker)
            assert not lives(first)
            assert pid(block, worker) != first
        assert not list(tmp_path.glob(f"{what}*.engine*"))

    def test_last_words_are_of_the_build_that_died(self, block: Path, tmp_path: Path) -> None:
        """What was printed before is not what it died of."""
        with Worker() as worker:
            pid(does("prints", tmp_path), worker)
            with pytest.raises(QpassError, match="it said last: nothing"):
                pid(does("is_killed", tmp_path), worker)

    def test_what_is_printed_hides_no_event(self, tmp_path: Path) -> None:
        assert engines.build_files(does("prints", tmp_path), backend="tensorrt").engine.is_file()

    def test_a_death_between_builds(self, block: Path) -> None:
        with Worker() as worker:
            first = pid(block, worker)
            os.kill(first, signal.SIGKILL)
            os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
            assert pid(block, worker) != first

    def test_ctrl_c(self, block: Path) -> None:
        """A terminal sends it to both processes. The worker leaves it to its parent, which ends a build with it."""

        def interrupt(text: str) -> None:
            raise KeyboardInterrupt

        with Worker() as worker:
            first = pid(block, worker)
            os.kill(first, signal.SIGINT)
            assert pid(block, worker) == first
            with pytest.raises(KeyboardInterrupt):
                pid(block, worker, log=interrupt)
            assert not lives(first)
            second = pid(block, worker)
            with pytest.raises(KeyboardInterrupt), worker:
                raise KeyboardInterrupt
            assert not lives(second)

    @pytest.mark.parametrize("ends", ["", "raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"])
    def test_it_ends_with_its_parent(self, ends: str, block: Path) -> None:
        code = (
            "import json, sys; from qpass import engine as e; worker = e.Worker(); "
            "done = e.build_files(sys.argv[1], backend='tensorrt', worker=worker); "
            f"print(json.loads(done.engine.read_text())['told']['pid'], flush=True); {ends}"
        )
        done = subprocess.run([sys.executable, "-c", code, str(block)], stdout=subprocess.PIPE, text=True, check=False)
        process = int(done.stdout)
        with suppress(ProcessLookupError):
            ended, _, _ = select([os.pidfd_open(process)], [], [], 30)
            assert ended, "it outlives its parent"

    def test_another_library_or_environment(
        self, block: Path, shells8: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = qpass.rewrite(block, spec="w8a16").output
        mine = tmp_path / "mine.so"
        shutil.copy(shells8.path, mine)
        with Worker() as worker:
            seen = [pid(path, worker), pid(path, worker, library=mine), pid(block, worker)]
            shutil.copy(shells8.path, tmp_path / "fresh.so")
            (tmp_path / "fresh.so").replace(mine)
            seen.append(pid(path, worker, library=mine))
            monkeypatch.setenv("TENSORRT8_DOES", "builds")
            seen.append(pid(path, worker, library=mine))
            assert [a == b for a, b in pairwise(seen)] == [False, True, False, False]
            assert [lives(s) for s in seen] == [False, False, False, False, True]

    def test_files_are_where_the_parent_stands(
        self, block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Worker() as worker:
            for folder in (tmp_path / "a", tmp_path / "b"):
                folder.mkdir()
                monkeypatch.chdir(folder)
                shutil.copy(block, "m.onnx")
                pid(Path("m.onnx"), worker, timing_cache="timing.bin")
                assert (folder / "timing.bin").read_bytes() == b".", "learned from nothing"
                assert (folder / "m.engine").is_file()


def test_progress_is_of_one_build(block: Path, library: Library) -> None:
    path = qpass.rewrite(block, spec="w8a8").output
    with Worker() as worker:
        for _ in range(2):
            steps: list[tuple[int, int]] = []
            done = engines.build_files(path, worker=worker, progress=lambda *step, to=steps: to.append(step))
            assert len(done.facts["plugin_layers"]) == 4
            assert steps[0][0] == 1
            assert steps[-1][0] == steps[-1][1]


def test_another_backend(block: Path, library: Library, tensorrt8: None) -> None:
    with Worker() as worker:
        first = pid(block, worker)
        done = engines.build_files(block, backend="tensorrt_rtx", library=library.path, worker=worker)
        assert done.facts["backend"]["name"] == "tensorrt_rtx"
        assert not lives(first)
        assert pid(block, worker) != first
