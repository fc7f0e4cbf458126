"""The benchmarks that build many engines: what a run leaves when it ends early, and how another goes on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import engines_zoo, matrix
from benchmarks.record import Record, command
from qpass.engine import Worker
from qpass.ops import REGISTRY
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


@pytest.mark.usefixtures("tensorrt8")
def test_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines of a process's models are built in one; what TensorRT refuses is a row."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[B, 64] x) => (float[B, 32] y) <float[64, 32] w> {{ [fc] m = {}(x, w) [end] y = {}(m) }}"""
    builders: list[int] = []

    def verified(model: Path, engine: Path, **_: Any) -> Any:
        builders.append(json.loads(engine.read_text())["told"]["pid"])
        output = SimpleNamespace(relative_error=1e-4, worst_cosine=1.0)
        return SimpleNamespace(arithmetic=[output], quantization=[output], rounding=[], outputs=[output])

    monkeypatch.setattr(engines_zoo, "verify_engine", verified)
    with Worker() as worker:
        monkeypatch.setattr(engines_zoo, "WORKER", worker)
        rows = []
        for name, last in (("one", "Relu"), ("two", "Neg"), ("none", "Hardmax")):
            onnx.save(model(text.format("MatMul", last)), tmp_path / f"{name}.onnx")
            inputs: dict[str, Any] = {"in:x": np.ones((2, 64), np.float32)}
            np.savez(tmp_path / f"{name}.npz", **inputs)
            rows.append(engines_zoo.measure(tmp_path / f"{name}.onnx", "tensorrt", 0))
    assert len(builders) == 10
    assert len({*builders, os.getpid()}) == 2
    assert all(rows[0][run]["all_promised"] for run in engines_zoo.RUNS)
    assert rows[2].keys() == {"model", "unquantized"}
    said = engines_zoo.summary(rows)
    assert said.startswith("unquantized: 3 models, 2 built, 2 within 0.005, worst 0.0001\nw8a16: 2 models, 2 built")
