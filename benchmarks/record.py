"""A benchmark's rows as a JSON file that is whole after every row, so that a run that ends early goes on in another."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpass.graph.commit import write

Row = dict[str, Any]
Name = tuple[str, ...]


class Record:
    """What is measured, in a file.

    Args:
        path: rewritten with every row, the whole of it or nothing.
        about: what all rows have in common, JSON values.
        key: what of a row tells it from the others.
        names: of all rows that there will be, in the file's order.
        resume: take over the rows that the file has already.

    Raises:
        SystemExit: the file that is there is of something else, or cannot be read.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], key: Sequence[str], names: Sequence[Name], resume: bool
    ) -> None:
        self._path, self._about, self._key, self._names = path, json.loads(json.dumps(about)), key, names
        self._rows: dict[Name, Row] = {}
        if resume and path.exists():
            self._resume()

    def _resume(self) -> None:
        refuse = f"--resume: {self._path}"
        try:
            told = json.loads(self._path.read_bytes())
            earlier = {self._name(row): row for row in told.pop("rows")}
        except OSError as error:
            raise SystemExit(f"{refuse} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"{refuse} is no result of this benchmark; write another file with -o") from error
        for name in self._about.keys() | told.keys():
            there, here = told.get(name), self._about.get(name)
            if there != here:
                raise SystemExit(f"{refuse}: its {name} is {there}, here it is {here}; write another file with -o")
        self._rows = {name: earlier[name] for name in self._names if name in earlier}

    def _name(self, row: Row) -> Name:
        return tuple(row[part] for part in self._key)

    @property
    def rows(self) -> list[Row]:
        """Those that are there, in the order of their names."""
        return [self._rows[name] for name in self._names if name in self._rows]

    @property
    def missing(self) -> list[Name]:
        """The names of those that are not."""
        return [name for name in self._names if name not in self._rows]

    def add(self, row: Row) -> None:
        """Write a row with all before it, then print it."""
        self._rows[self._name(row)] = row
        write(self._path, json.dumps(self._about | {"rows": self.rows}, indent=1).encode() + b"\n")
        print(json.dumps(row), flush=True)


def command(module: str) -> str:
    """What was asked for, as one would type it again for a whole run."""
    return shlex.join(["python", "-m", module, *(a for a in sys.argv[1:] if a != "--resume")])
