"""Optimization profiles: the smallest, usual and largest shapes that an engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qpass.engine import dims
from qpass.errors import QpassError
from qpass.runtime import Input

Shape = tuple[int, ...]
BATCH = (1, 1, 8)
LENGTH = (1, 128, 512)
"""What a dynamic dim may be where nothing is said of it: the first of an input is its batch, any other a length."""


@dataclass(frozen=True)
class Profile:
    """Shapes of one input, elementwise min ≤ opt ≤ max. `guessed` names the dims that nothing was said of."""

    min: Shape
    opt: Shape
    max: Shape
    guessed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " … ".join("x".join(map(str, s)) for s in (self.min, self.opt, self.max))


def parse(text: str | None, flag: str) -> dict[str, Shape]:
    """`name:1x8,other:1x16`, as trtexec has it; a name may be quoted and may hold colons, but no commas.

    Raises:
        QpassError: it is not of this form.
    """
    shapes: dict[str, Shape] = {}
    for part in text.split(",") if text else ():
        name, _, dims = part.rpartition(":")
        if not name or not re.fullmatch(r"\d+(x\d+)*", dims):
            raise QpassError(f"--{flag} {text}: '{part}' is not of the form name:1x128")
        name = name.strip("'\"")
        if name in shapes:
            raise QpassError(f"--{flag} {text}: gives '{name}' twice")
        shapes[name] = tuple(int(d) for d in dims.split("x"))
    return shapes


def profiles_of(
    inputs: Mapping[str, Input],
    least: Mapping[str, Shape],
    usual: Mapping[str, Shape],
    most: Mapping[str, Shape],
) -> dict[str, Profile]:
    """A profile for every input that has a dynamic dim.

    What is given of min, opt and max for an input stands for what is not: opt for max and max for opt, and opt for
    min. Dims of one name are the same, and some are sums of others, see `qpass.engine.dims`. A dim of which nothing is
    said anywhere is guessed, the same for all dims of one name.

    Raises:
        QpassError: an input that is not there, or shapes that contradict the model or each other.
    """
    least, usual, most = ({n: tuple(map(int, s)) for n, s in given.items()} for given in (least, usual, most))
    for flag, shapes in (("min", least), ("opt", usual), ("max", most)):
        for name, shape in shapes.items():
            check(flag, name, shape, inputs)
    known, guessed = _symbols(inputs, least, usual, most)
    found = {}
    for name, given in inputs.items():
        if given.shape is None:
            raise QpassError(f"the input {given} has no known rank; export the model with its shapes")
        if all(isinstance(d, int) for d in given.shape):
            continue
        opt = usual.get(name) or most.get(name)
        if opt is not None:
            profile = Profile(least.get(name) or opt, opt, most.get(name) or opt)
        elif name in least:
            profile = Profile(least[name], least[name], least[name])
        else:
            profile = _guess(given, known, guessed)
        if not all(a <= b <= c for a, b, c in zip(profile.min, profile.opt, profile.max, strict=True)):
            raise QpassError(f"the shapes of '{name}' are not min ≤ opt ≤ max: {profile}")
        found[name] = profile
    return found


def check(flag: str, name: str, shape: Shape, inputs: Mapping[str, Input]) -> None:
    """Raise QpassError where a shape that a flag gives fits no input."""
    if name not in inputs:
        raise QpassError(f"--{flag} {name}: the model has no such input; it has {', '.join(inputs)}")
    wanted = inputs[name].shape
    if wanted is None:
        fits = all(0 < s < 2**31 for s in shape)
    else:
        fits = len(wanted) == len(shape) and all(
            d == s if isinstance(d, int) else dims.least(d) <= s < 2**31 for d, s in zip(wanted, shape, strict=True)
        )
    if not fits:
        raise QpassError(f"--{flag} {name}:{'x'.join(map(str, shape))} does not fit the input {inputs[name]}")


def _symbols(
    inputs: Mapping[str, Input], *given: Mapping[str, Shape]
) -> tuple[dict[str, tuple[int, int, int]], set[str]]:
    """What is said of dims by their names, by way of the shapes of any input; sums with parts that had to be guessed,
    which are told, too."""
    said = [dims.sizes(flag, shapes, inputs) for flag, shapes in zip(("min", "opt", "max"), given, strict=True)]
    low, mid, high = said
    known = {}
    for dim in dict.fromkeys(d for sizes in said for d in sizes):
        opt = next(sizes[dim] for sizes in (mid, high, low) if dim in sizes)
        known[dim] = low.get(dim, opt), opt, high.get(dim, opt)
    guessed: set[str] = set()
    for name, parts in dims.sums(inputs.values()).items():
        if name not in known:
            guessed |= {p for p in parts if isinstance(p, str) and p not in known}
            known |= dict.fromkeys(guessed - known.keys(), LENGTH)
            spans = [(p, p, p) if isinstance(p, int) else known[p] for p in parts]
            known[name] = sum(s[0] for s in spans), sum(s[1] for s in spans), sum(s[2] for s in spans)
            guessed |= {name} if guessed & set(parts) else set()
    return known, guessed


def _guess(given: Input, known: Mapping[str, tuple[int, int, int]], of_sums: set[str]) -> Profile:
    spans: list[Sequence[int]] = []
    guessed = []
    for axis, dim in enumerate(given.shape or ()):
        if isinstance(dim, int):
            spans.append((dim, dim, dim))
        elif dim is not None and dim in known:
            spans.append(known[dim])
            guessed += [dim] if dim in of_sums else []
        else:
            spans.append(LENGTH if axis else BATCH)
            guessed.append(dim or f"axis {axis}")
    low, mid, high = (tuple(s[i] for s in spans) for i in range(3))
    return Profile(low, mid, high, tuple(guessed))
