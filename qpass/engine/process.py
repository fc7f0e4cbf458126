"""The process that builds, as its parent sees it: started when it is needed, kept between builds, and what it tells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from qpass import gpu
from qpass.engine.backends import Backend
from qpass.engine.job import Built, Job
from qpass.errors import QpassError

Progress = Callable[[int, int], None]
Log = Callable[[str], None]

_ERROR, _WARNING = 1, 2
_NO_DRIVER = "cudaError 35"  # what TensorRT-RTX says of a machine without a GPU, on the way to every other error


class Worker:
    """A process for builds one after the other, so that TensorRT starts once, which can take longer than a build.

        with Worker() as worker:
            for model in models:
                build_files(model, worker=worker)

    It starts with the first build. A build that fails or crashes it ends it, and so does one of another backend,
    plugin library or environment; the next build starts it afresh. It ends with the block, and with the thread that
    started it. One build at a time.
    """

    def __init__(self) -> None:
        self._process: _Process | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process. It holds nothing by then that an orderly end would save."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def build(self, backend: Backend, job: Job, progress: Progress | None, log: Log | None) -> tuple[Built, list[str]]:
        """Have an engine built.

        Returns:
            What was built, and TensorRT's warnings.

        Raises:
            QpassError: TensorRT refused, or died, with its last words.
        """
        environment = dict(os.environ) | backend.environment()
        if self._process is not None and not self._process.fits(backend, environment, job.plugins):
            self.close()
        if self._process is None:
            self._process = _Process(backend, environment)
        build = _Build(backend, job, progress, log)
        try:
            self._process.run(job, build)
        finally:
            if build.built is None:  # after an error of CUDA's nothing that it does can be trusted
                self.close()
        if build.built is None:
            raise QpassError(build.failure)
        return build.built, build.warnings


class _Process:
    """A running `qpass.engine.worker`."""

    def __init__(self, backend: Backend, environment: dict[str, str]) -> None:
        self._started = backend, sys.executable, environment
        self._library: tuple[object, ...] | None = None
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe would be full at some time
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "qpass.engine.worker"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=self._noise, text=True, errors="replace"
        )

    def fits(self, backend: Backend, environment: dict[str, str], library: str | None) -> bool:
        """Whether it lives and can build this. A library stays loaded, so there can be no second one."""
        return (
            self._process.poll() is None
            and self._started == (backend, sys.executable, environment)
            and (None in (library, self._library) or _identity(library) == self._library)
        )

    def run(self, job: Job, build: _Build) -> None:
        """Hand over a job, and what is told of it until it is done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._library = _identity(job.plugins) or self._library
        before = os.fstat(self._noise.fileno()).st_size
        with suppress(BrokenPipeError):  # it is dead already; its exit code will tell
            self._process.stdin.write(f"{job.to_json()}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if build.take(line):
                return
        code = self._process.wait()
        self._noise.seek(before)  # only now: the process writes where this file stands
        build.died(code, self._noise.read().decode(errors="replace"))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._noise):
            with suppress(BrokenPipeError):  # of a job that it did not live to read
                if stream is not None:
                    stream.close()


def _identity(library: str | None) -> tuple[object, ...] | None:
    """What tells a library from another, or from one compiled anew in its place."""
    if library is None:
        return None
    file = os.stat(library)
    return library, file.st_ino, file.st_size, file.st_mtime_ns


class _Build:
    """What is told of one build."""

    def __init__(self, backend: Backend, job: Job, progress: Progress | None, log: Log | None) -> None:
        self._backend, self._model = backend, Path(job.model).name
        self._progress, self._log = progress, log
        self._said: deque[str] = deque(maxlen=4)
        self.warnings: list[str] = []
        self.built: Built | None = None
        self.failure = ""

    def take(self, line: str) -> bool:
        """Take in an event. Returns whether it is the build's last."""
        try:
            told = json.loads(line)
            kind = told.pop("event")
        except (ValueError, TypeError, KeyError, AttributeError):
            return False  # cut off by a crash, or printed before the worker had its output to itself
        if kind == "log":
            self._take_log(told["level"], " ".join(told["text"].split()))
        elif kind == "step" and self._progress is not None:
            self._progress(told["done"], told["total"])
        elif kind == "built":
            self.built = Built(**told)
        elif kind == "failed":
            words = "; ".join(self._said)
            self.failure = f"{self._model}: {told['text']}{f'. TensorRT said: {words}' if words else ''}"
        return kind in ("built", "failed")

    def _take_log(self, level: int, text: str) -> None:
        if level <= _ERROR and not (_NO_DRIVER in text and not gpu.capabilities()):
            self._said.append(text)
        elif level == _WARNING and not text.startswith(self._backend.expected):
            self.warnings.append(text)
        if self._log is not None:
            self._log(text)

    def died(self, code: int, noise: str) -> None:
        """Tell the failure of a process that ended, in one line with its last words."""
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = noise.strip().splitlines()
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        last = "; ".join(self._said) or " ".join((raised or lines)[-1:]) or "nothing"
        hint = " (out of memory?)" if code == -9 else ""
        who = f"{self._backend.name} {self._backend.version()}"
        self.failure = f"{self._model}: {who} {ended}{hint} while building; it said last: {last}"
