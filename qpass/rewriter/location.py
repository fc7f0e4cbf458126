"""Where in a rule file something stands: every message of the language carries it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Location:
    """Where in a rule file something was declared."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"


def caller() -> Location:
    """The first frame outside this package: the line of the rule file that is being executed."""
    frame = sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent == _HERE:
        frame = frame.f_back
    return Location(frame.f_code.co_filename, frame.f_lineno)


class PatternError(Exception):
    """A pattern or rule that is wrong in itself; the message carries file and line."""
