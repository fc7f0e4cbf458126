"""The benchmarks that build many engines: what a run leaves when it ends early, and how another goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import engines_zoo, matrix, rounding
from benchmarks.record import Record, command
from benchmarks.zoo import models_of
from qpass.engine import Worker
from qpass.ops import REGISTRY
from qpass.spec import QuantSpec
from qpass.testing import model

ABOUT = {"command": "python -m benchmarks.some -o f.json", "device": "a GPU", "backend": "tensorrt 8.6.1"}
NAMES = [("a", "1"), ("a", "2"), ("b", "1")]


def record(path: Path, about: dict[str, str] = ABOUT, resume: bool = True) -> Record:
    return Record(path, about, ["op", "dtype"], NAMES, resume)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two rows, in the order in which they were measured."""
    path = tmp_path / "f.json"
    begun = record(path)
    assert begun.missing == NAMES
    begun.add({"op": "b", "dtype": "1", "us": 3.0})
    assert begun.missing == NAMES[:2]
    assert json.loads(path.read_text()) == ABOUT | {"rows": [{"op": "b", "dtype": "1", "us": 3.0}]}
    begun.add({"op": "a", "dtype": "1", "us": 1.0})
    return path


def test_rows_are_kept_in_order(file: Path) -> None:
    on = record(file)
    assert [r["us"] for r in on.rows] == [1.0, 3.0]
    assert on.missing == [("a", "2")]
    on.add({"op": "a", "dtype": "2", "us": 2.0})
    assert [r["us"] for r in json.loads(file.read_text())["rows"]] == [1.0, 2.0, 3.0]
    assert record(file, resume=False).missing == NAMES


@pytest.mark.parametrize("changed", [*ABOUT, "models"])
def test_another_run_is_not_gone_on_with(changed: str, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(SystemExit, match=rf"--resume: .*f\.json: its {changed} is .*, here it is other; write another"):
        record(file, ABOUT | {changed: "other"})
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"op": "a"}]}', '{"device": "a GPU"}'])
def test_a_file_that_is_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(SystemExit, match=r"f\.json is no result of this benchmark"):
        record(tmp_path / "f.json")


def test_a_command_is_that_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["some.py", "a zoo", "--resume", "-o", "f.json"])
    assert command("benchmarks.some") == "python -m benchmarks.some 'a zoo' -o f.json"


@pytest.mark.usefixtures("tensorrt8")
def test_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after three rows, and goes on from there."""
    build, asked = matrix.build, list[tuple[str, str]]()

    def interrupted(op: str, dtype: str, backend: str, worker: Worker) -> dict[str, Any]:
        asked.append((op, dtype))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return build(op, dtype, backend, worker)

    ops = ("RmsnormQuantization", "DequantizeWeight")
    monkeypatch.setattr(matrix, "REGISTRY", {op: REGISTRY[op] for op in (*ops, "Dequantize", "QuantizePerToken")})
    monkeypatch.setattr(matrix, "build", interrupted)
    output = tmp_path / "m.json"
    monkeypatch.setattr(sys, "argv", ["matrix", "build", "--backend", "tensorrt", "-o", str(output), "--resume"])
    with pytest.raises(KeyboardInterrupt):
        matrix.main()
    assert len(json.loads(output.read_text())["rows"]) == 3
    asked.clear()
    asked.extend(4 * [("", "")])
    matrix.main()
    assert asked[4] == ("DequantizeWeight", "float32")
    rows = {(r["op"], r["dtype"]): r for r in json.loads(output.read_text())["rows"]}
    assert len(rows) == 12
    assert rows["RmsnormQuantization", "float16"]["built"]
    assert "reads constants alone" in rows["DequantizeWeight", "float16"]["why"]


ZOO = """<ir_version: 8, opset_import: ["" : 17]>
g (float[B, 64] x) => (float[B, 32] y) <float[64, 32] w> {{ [fc] m = MatMul(x, w) [end] y = {}(m) }}"""


def model_of_a_zoo(path: Path, last: str) -> Path:
    """A model, and inputs of it."""
    onnx.save(model(ZOO.format(last)), path)
    inputs: dict[str, Any] = {"in:x": np.ones((2, 64), np.float32)}
    np.savez(path.with_suffix(".npz"), **inputs)
    return path


@pytest.mark.usefixtures("tensorrt8")
def test_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines of a process's models are built in one; what TensorRT refuses is a row."""
    builders: list[int] = []

    def verified(model: Path, engine: Path, **_: Any) -> Any:
        builders.append(json.loads(engine.read_text())["told"]["pid"])
        output = SimpleNamespace(relative_error=1e-4, worst_cosine=1.0)
        return SimpleNamespace(arithmetic=[output], quantization=[output], rounding=[], outputs=[output])

    monkeypatch.setattr(engines_zoo, "verify_engine", verified)
    with Worker() as worker:
        monkeypatch.setattr(engines_zoo, "WORKER", worker)
        models = [
            model_of_a_zoo(tmp_path / f"{n}.onnx", last)
            for n, last in (("one", "Relu"), ("two", "Neg"), ("none", "Hardmax"))
        ]
        rows = [engines_zoo.measure(m, "tensorrt", 0) for m in models]
    assert len(builders) == 10
    assert len({*builders, os.getpid()}) == 2
    assert all(rows[0][run]["all_promised"] for run in engines_zoo.RUNS)
    assert rows[2].keys() == {"model", "unquantized"}
    said = engines_zoo.summary(rows)
    assert said.startswith("unquantized: 3 models, 2 built, 2 within 0.005, worst 0.0001\nw8a16: 2 models, 2 built")


def test_what_is_no_zoo(tmp_path: Path) -> None:
    path = model_of_a_zoo(tmp_path / "one.onnx", "Relu")
    assert models_of(tmp_path, "o*.onnx") == [path]
    with pytest.raises(SystemExit, match=r"no model matches two\*"):
        models_of(tmp_path, "two*")
    path.with_suffix(".npz").unlink()
    with pytest.raises(SystemExit, match=r"its inputs, one\.npz, are not beside it"):
        models_of(tmp_path, "o*.onnx")


def test_rounding_by_who_makes_what(tmp_path: Path) -> None:
    """A product alone is between x and the last node, whose output is the model's: that is never rounded."""
    row = rounding.measure(model_of_a_zoo(tmp_path / "one.onnx", "Relu"))
    assert row["model"] == "one"
    assert 0 == row["others"] < row["plugins"] == row["all"] < 1e-3


SCRIPT = """
from types import SimpleNamespace as Some
from benchmarks import engines_zoo as zoo
one = Some(relative_error=1e-4, worst_cosine=1.0)
zoo.verify_engine = lambda *_, **__: Some(arithmetic=[one], quantization=[one], rounding=[], outputs=[one])
zoo.gpu.device = lambda: Some(name=lambda: "a GPU")
if __name__ == "__main__":
    zoo.main()
"""


@pytest.mark.usefixtures("tensorrt8")
@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGINT])
def test_a_zoo_in_two_sessions(ends: signal.Signals, tmp_path: Path) -> None:
    """Killed after its first model, it leaves that row and no process; the next does the others."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for i in range(4):
        model_of_a_zoo(tmp_path / f"m{i}.onnx", "Relu")
    output = tmp_path / "zoo.json"
    command = [sys.executable, "script.py", ".", "-o", "zoo.json", "--models", "m?.onnx", "--jobs", "2", "--resume"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as first:
        assert first.stdout is not None
        assert "model" in json.loads(first.stdout.readline())
        if ends == signal.SIGINT:  # of a terminal, which sends it to all
            os.killpg(first.pid, ends)
        else:
            first.kill()
        first.wait()
        deadline = time.monotonic() + 60
        while (left := of_session(first.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        assert not left, "they outlive what started them"
        printed = 1 + len(first.stdout.read().splitlines())
    begun = json.loads(output.read_text())["rows"]
    assert printed <= len(begun) < 4
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(second) == 4 - len(begun) + len(engines_zoo.RUNS)
    assert [r["model"] for r in json.loads(output.read_text())["rows"]] == ["m0", "m1", "m2", "m3"]


def of_session(leader: int) -> list[str]:
    """Processes that live, of those that this one started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, fields = stat.read_text().rpartition(") ")
            if int(fields.split()[3]) == leader and fields[0] != "Z":
                found.append(name)
    return found


@pytest.mark.parametrize(
    ("name", "preset", "changes"),
    [(f"{preset}-merged", preset, {"merge_siblings": True}) for preset in ("w8a16", "w8a8", "w4a16-g128")]
    + [(f"{p}-fused", p, {"merge_siblings": True, "norm_plugins": True}) for p in ("w8a16", "w4a16-g128")],
)
def test_recipes_are_presets_with_what_their_names_say(name: str, preset: str, changes: dict[str, Any]) -> None:
    recipe = Path(matrix.__file__).parent / "recipes" / f"{name}.yaml"
    assert QuantSpec.from_yaml(recipe) == QuantSpec.preset(preset, **changes).model_copy(update={"name": name})
