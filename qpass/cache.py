"""Where qpass keeps what it can make again: compiled plugins, timing caches, what rules did in the last run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpass.errors import QpassError


def folder() -> Path:
    """`$XDG_CACHE_HOME/qpass`, by default `~/.cache/qpass`. It need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qpass"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file in the cache; waits for another process that has it. A process that dies lets it go.

    Raises:
        QpassError: the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise QpassError(
            f"the cache {path.parent} cannot be written: {error.strerror}; name another folder in XDG_CACHE_HOME"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
