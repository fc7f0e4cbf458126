"""Dims by their names: those of one name are the same, some are the sum of others, and one may be the batch.

Exporters of models with a KV cache call the length of attention masks "past_sequence_length + sequence_length", or
"total_sequence_length" beside dims of these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from qpass.errors import QpassError
from qpass.runtime import Input

Parts = tuple[str | int, ...]

_BATCH = re.compile(r"(.*_)?batch(_?size)?|bs?|n", re.IGNORECASE)


def least(dim: int | str | None) -> int:
    """The smallest that a dim may be: the past of a first step is 0."""
    return 0 if isinstance(dim, str) and "past" in dim.lower() else 1


def sums(inputs: Iterable[Input]) -> dict[str, Parts]:
    """The dims that are sums, by their names: of dims of these names, and numbers."""
    names = list(dict.fromkeys(d for i in inputs for d in i.shape or () if isinstance(d, str)))
    plain = [n for n in names if "+" not in n and "total" not in n.lower()]
    past = [n for n in plain if "past" in n.lower()]
    new = [n for n in plain if re.search("seq|len", n.lower()) and n not in past]
    found: dict[str, Parts] = {}
    for name in names:
        written = [part.strip() for part in name.split("+")]
        if len(written) > 1 and all(p.isdigit() or p in plain for p in written):
            found[name] = tuple(int(p) if p.isdigit() else p for p in written)
        elif "total" in name.lower() and len(past) == len(new) == 1:
            found[name] = past[0], new[0]
    return found


def sizes(flag: str, shapes: Mapping[str, tuple[int, ...]], inputs: Mapping[str, Input]) -> dict[str, int]:
    """What shapes of some inputs say of dims by their names, sums and what is left of a sum included.

    Raises:
        QpassError: two dims of one name differ, or a sum is not that of its parts; names both.
    """
    said: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        for dim, size in zip(inputs[name].shape or (), shape, strict=False):
            if isinstance(dim, str):
                before, where = said.setdefault(dim, (size, name))
                if before != size:
                    both = f"{before} in '{where}' and {size} in '{name}'"
                    raise QpassError(f"--{flag}: '{dim}' is {both}; dims of one name are the same")
    known = {dim: size for dim, (size, _) in said.items()}
    complete(flag, known, sums(inputs.values()))
    return known


def complete(flag: str, known: dict[str, int], parts_of: Mapping[str, Parts]) -> None:
    """Add to sizes the sums whose parts are known, and a part that alone is not.

    Raises:
        QpassError: a sum is not that of its parts.
    """
    for name, parts in [*parts_of.items()] * 2:  # the second time with what the first has found
        missing = [p for p in parts if isinstance(p, str) and p not in known]
        there = sum(p if isinstance(p, int) else known.get(p, 0) for p in parts)
        if not missing:
            fits = known.setdefault(name, there) == there
        elif len(missing) == 1 and name in known:
            known[missing[0]] = known[name] - there
            fits = known[missing[0]] >= least(missing[0])
        else:
            continue
        if not fits:
            told = " + ".join(str(p) if isinstance(p, int) else f"'{p}' ({known[p]})" for p in parts)
            raise QpassError(f"--{flag}: '{name}' is {known[name]}, which is not {told}; give shapes that agree")


def batch(shapes: Mapping[str, tuple[int, ...]], inputs: Mapping[str, Input]) -> int | None:
    """The size of the dims that are called a batch; None where none is, or they differ."""
    found = {
        size
        for name, i in inputs.items()
        for dim, size in zip(i.shape or (), shapes[name], strict=True)
        if isinstance(dim, str) and _BATCH.fullmatch(dim)
    }
    return found.pop() if len(found) == 1 else None
