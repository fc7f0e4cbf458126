"""Several files that appear together or not at all.

Everything is written into temporaries in the target folder, made durable, and renamed in order, the one that
names the others last. A writer holds a lock on each of its temporaries, so a later one can tell those whose
writer has died.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from qpass.errors import QpassError

_SUFFIX = ".qpass-tmp"


class Temporary:
    """A locked file that has no name of its own yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        while self.fd < 0:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _lock(fd)
            try:  # a cleaner may have taken it between open and lock
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    self.fd = fd
            except FileNotFoundError:
                pass
            if self.fd < 0:
                os.close(fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Folder:
    """Writes into a folder; a context manager that leaves no temporaries behind. OSError as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporaries: list[Temporary] = []

    def __enter__(self) -> Self:
        remove_stale(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for temporary in self._temporaries:
            temporary.close()
            with suppress(OSError):
                temporary.path.unlink(missing_ok=True)

    def temporary(self, name: str) -> Temporary:
        """A new temporary for a file that will be called `name`."""
        number = len(self._temporaries)
        temporary = Temporary(self.path / f".{name}.{os.getpid()}-{threading.get_ident():x}-{number}{_SUFFIX}")
        self._temporaries.append(temporary)
        return temporary

    def need(self, size: int) -> None:
        """Raise ENOSPC now where `size` bytes cannot fit, and not after minutes of work."""
        disk = os.statvfs(self.path)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < size:  # some file systems tell nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def commit(self, files: list[tuple[Temporary, Path]], garbage: Iterator[Path]) -> None:
        """Give temporaries their names, in this order, replacing what is there; then remove `garbage`.

        Once the renames begin an interrupt waits until they are done.
        """
        for temporary, _ in files:
            os.fsync(temporary.fd)
        folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _uninterrupted():
                _lock(folder, wait=True)  # two writers of one output: one after the other
                with ExitStack() as replaced:
                    for _, final in files:  # held open, so that no rename waits for its file's removal
                        with suppress(OSError):
                            replaced.callback(os.close, os.open(final, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                    for temporary, final in files:
                        os.rename(temporary.path, final)
                    with suppress(OSError):  # the files are there; some network file systems cannot do more
                        os.fsync(folder)
                for path in garbage:
                    with suppress(OSError):
                        path.unlink()
        finally:
            os.close(folder)


def remove_stale(folder: Path) -> None:
    """Remove the temporaries of writers that have died."""
    for path in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _lock(fd):
                    path.unlink()
            finally:
                os.close(fd)


def _lock(fd: int, wait: bool = False) -> bool:
    """Lock a file; False where somebody else has it. File systems without locks count as not ours."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught and callable(before):
        before(*caught[0])


def write(path: Path, content: bytes) -> None:
    """Write a file, the whole of it or nothing.

    Raises:
        QpassError: it cannot be written.
    """
    try:
        with Folder(path.parent) as folder:
            fresh = folder.temporary(path.name)
            fresh.path.write_bytes(content)
            folder.commit([(fresh, path)], iter(()))
    except OSError as error:
        raise explain(error, path, len(content)) from error


def check_place(target: Path, inputs: Iterable[Path]) -> None:
    """Raise QpassError where a file cannot be written, or where one of `inputs` is that would be lost."""
    if not target.parent.is_dir():
        raise QpassError(f"cannot write {target}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise QpassError(f"cannot write in {target.parent}; choose another place with -o")
    if target.is_dir():
        raise QpassError(f"cannot write {target}: it is a folder; give a file name")
    if target.exists() and not target.is_file():
        raise QpassError(f"cannot write {target}: it is no regular file; choose another output with -o")
    for source in inputs:
        if target.exists() and source.exists() and os.path.samefile(target, source):
            raise QpassError(f"{target} would overwrite the input {source}; choose another output with -o")


def explain(error: OSError, path: Path, needed: int) -> QpassError:
    """What an OSError while writing `path` means to the user."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return QpassError(
                f"no space left for {path}: it needs {needed / 1e6:.0f} MB; free some, or choose another place with -o"
            )
        case errno.EFBIG:
            return QpassError(
                f"{path} would pass the file size limit; raise it (ulimit -f), or write elsewhere with -o"
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return QpassError(f"cannot write in {path.parent}: {error.strerror}; choose another place with -o")
        case _:
            return QpassError(f"cannot write {path}: {error.strerror}; choose another place with -o")
