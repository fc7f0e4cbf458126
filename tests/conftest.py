"""What tests share: the model zoo, and the command line in this process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qpass import cli
from tests.zoo import FOLDER


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def pytest_configure() -> None:
    """Interrupts are delivered, also where whoever started the tests in the background has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def zoo() -> list[Path]:
    """The zoo's models."""
    models = sorted(FOLDER.glob("*.onnx"))
    if not models:
        pytest.skip(f"no model zoo in {FOLDER}; set QPASS_ZOO")
    return models


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `qpass …` in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["qpass", *map(str, args)])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        got = capsys.readouterr()
        return Result(int(leave.value.code or 0), got.out, got.err)

    return call
