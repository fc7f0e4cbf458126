"""The table of tile choices as the text that the library reads: `<library>.tuning`. Its language: kernels/tuning.h."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qpass.errors import QpassError
from qpass.graph.commit import write

RULE = "rule"
"""The variant of tokens that are left to the library's rule."""
_FIRST_LINE = "qpass tuning 1"


@dataclass(frozen=True, order=True)
class Entry:
    """Up to `m` tokens, of those that no smaller `m` of the shape takes, a product goes by `variant`."""

    kind: str
    n: int
    k: int
    m: int
    variant: str

    @property
    def product(self) -> tuple[str, int, int]:
        return self.kind, self.n, self.k


Tables = Mapping[str, tuple[Entry, ...]]
"""The entries of GPUs, by their names."""


def beside(library: Path) -> Path:
    """Where a library looks for its table."""
    return library.with_name(f"{library.name}.tuning")


def read(path: Path) -> Tables:
    """The tables of a file; none where there is no file.

    Raises:
        QpassError: it cannot be read, or is malformed.
    """
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise QpassError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise QpassError(f"{path} is no table of tuning: {error}; remove it, or write elsewhere with -o") from error


def parse(text: str) -> Tables:
    """The tables of a text. ValueError says what is wrong with it, and where; names of variants are the library's."""
    tables: dict[str, list[Entry]] = {}
    device = ""
    lines = [(at, words) for at, line in enumerate(text.splitlines(), 1) if (words := line.partition("#")[0].split())]
    if not lines or " ".join(lines[0][1]) != _FIRST_LINE:
        raise ValueError(f'its first line is not "{_FIRST_LINE}"')
    for at, words in lines[1:]:
        if words[0] == "device" and len(words) > 1:
            device = " ".join(words[1:])
            tables.setdefault(device, [])
            continue
        sizes = [int(w) if w.isascii() and w.isdigit() else 0 for w in words[1:4]]
        if not device or len(words) != 5 or min(sizes) < 1:
            raise ValueError(f"line {at} wants kind, N, K, M and variant, below a device")
        n, k, m = sizes
        tables[device].append(Entry(words[0], n, k, m, words[4]))
    return {name: tuple(entries) for name, entries in tables.items()}


def merged(tables: Tables, device: str, fresh: Iterable[Entry]) -> Tables:
    """Tables with new entries for a GPU, in place of what was there of the same products."""
    new = tuple(fresh)
    replaced = {e.product for e in new}
    kept = [e for e in tables.get(device, ()) if e.product not in replaced]
    return {**tables, device: tuple(sorted([*kept, *new]))}


def to_text(tables: Tables) -> str:
    """What `parse` reads."""
    lines = [_FIRST_LINE]
    for device, entries in sorted(tables.items()):
        lines.append(f"device {device}")
        lines += [f"{e.kind} {e.n} {e.k} {e.m} {e.variant}" for e in entries]
    return "\n".join(lines) + "\n"


def update(path: Path, device: str, fresh: Iterable[Entry]) -> None:
    """Write new entries into a file, the whole of it or nothing; what it has for other products and GPUs stays.

    Raises:
        QpassError: it cannot be read or written, or is malformed.
    """
    write(path, to_text(merged(read(path), device, fresh)).encode())
