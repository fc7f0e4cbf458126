"""Results as a JSON file that is whole after every row, so that a run that ends early goes on in another."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass.graph.commit import write
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.measure import Row


@dataclass(frozen=True)
class Earlier:
    """What a run wrote before, that another goes on with."""

    path: Path
    about: dict[str, Any]
    runs: list[dict[str, Any]]
    rows: dict[tuple[Any, ...], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Earlier:
        """Read a file; needs no GPU.

        Raises:
            QpassError: it cannot be read, or is something else.
        """
        try:
            told = json.loads(path.read_bytes())
            rows = {_key(row): row for row in told["rows"]}
            return cls(path, {name: told[name] for name in ("device", "dtype")}, list(told["runs"]), rows)
        except FileNotFoundError as error:
            raise QpassError(f"--resume {path}: there is no such file; -o begins one") from error
        except OSError as error:
            raise QpassError(f"--resume {path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise QpassError(f"--resume {path}: is no result of `qpass plugins bench`") from error


class Results:
    """Rows of one GPU, of one run or several, with what each run was.

    Args:
        path: rewritten, the whole of it or nothing, with every row; None keeps them in memory.
        device: the GPU's name.
        dtype: of the activations.
        run: facts about this run, JSON values; may be changed until the last write.
    """

    def __init__(self, path: Path | None, device: str, dtype: str, run: dict[str, Any]) -> None:
        self._path = path
        self._about = {"device": device, "dtype": dtype}
        self._runs = [run]
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}

    def resume(self, earlier: Earlier) -> None:
        """Take over the rows of a file that a run wrote before.

        Raises:
            QpassError: it is of another GPU or dtype.
        """
        for name, mine in self._about.items():
            if (its := earlier.about[name]) != mine:
                raise QpassError(f"--resume {earlier.path}: its {name} is {its}, here it is {mine}; write another file")
        self._rows = dict(earlier.rows)
        self._runs = [*earlier.runs, *self._runs]

    def lacks(self, job: Job, peers: Collection[str]) -> bool:
        """Whether there is no row of a job, or one for which one of these peers was never tried."""
        row = self._rows.get(job.key)
        return row is None or not set(peers) <= {*row["peers"], *row["notes"]}

    def add(self, row: Row) -> None:
        """Keep a row, in place of an earlier one of the same job, and write."""
        as_dict = asdict(row)
        self._rows[_key(as_dict)] = as_dict
        self.write()

    def write(self) -> None:
        """Write the file.

        Raises:
            QpassError: it cannot be written.
        """
        if self._path is not None:
            write(self._path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return self._about | {"runs": self._runs, "rows": list(self._rows.values())}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["variant"], row["m"], row["n"], row["k"]
