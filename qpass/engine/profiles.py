"""Optimization profiles: the smallest, usual and largest shapes that an engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    min. A dim of which nothing is said anywhere is guessed, the same for all dims of one name.

    Raises:
        QpassError: an input that is not there, or shapes that contradict the model or each other.
    """
    least, usual, most = ({n: tuple(map(int, s)) for n, s in given.items()} for given in (least, usual, most))
    for flag, shapes in (("min", least), ("opt", usual), ("max", most)):
        for name, shape in shapes.items():
            check(flag, name, shape, inputs)
    known = _symbols(inputs, least, usual, most)
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
            profile = _guess(given, known)
        if not all(a <= b <= c for a, b, c in zip(profile.min, profile.opt, profile.max, strict=True)):
            raise QpassError(f"the shapes of '{name}' are not min ≤ opt ≤ max: {profile}")
        found[name] = profile
    return found


def check(flag: str, name: str, shape: Shape, inputs: Mapping[str, Input]) -> None:
    """Raise QpassError where a shape that a flag gives fits no input."""
    if name not in inputs:
        raise QpassError(f"--{flag} {name}: the model has no such input; it has {', '.join(inputs)}")
    dims = inputs[name].shape
    wrong = dims is not None and (
        len(dims) != len(shape) or any(isinstance(d, int) and d != s for d, s in zip(dims, shape, strict=True))
    )
    if wrong or not all(0 < s < 2**31 for s in shape):
        raise QpassError(f"--{flag} {name}:{'x'.join(map(str, shape))} does not fit the input {inputs[name]}")


def _symbols(inputs: Mapping[str, Input], *given: Mapping[str, Shape]) -> dict[str, tuple[int, int, int]]:
    """What is said of dims by their names, by way of the shapes of any input."""
    said: dict[str, list[list[int]]] = {}
    for i, shapes in enumerate(given):
        for name, shape in shapes.items():
            for dim, size in zip(inputs[name].shape or (), shape, strict=False):
                if isinstance(dim, str):
                    said.setdefault(dim, [[], [], []])[i].append(size)
    known = {}
    for dim, (low, mid, high) in said.items():
        opt = (mid or high or low)[0]
        known[dim] = min(low or [opt]), opt, max(high or [opt])
    return known


def _guess(given: Input, known: Mapping[str, tuple[int, int, int]]) -> Profile:
    dims: list[Sequence[int]] = []
    guessed = []
    for axis, dim in enumerate(given.shape or ()):
        if isinstance(dim, int):
            dims.append((dim, dim, dim))
        elif dim is not None and dim in known:
            dims.append(known[dim])
        else:
            dims.append(LENGTH if axis else BATCH)
            guessed.append(dim or f"axis {axis}")
    low, mid, high = (tuple(d[i] for d in dims) for i in range(3))
    return Profile(low, mid, high, tuple(guessed))
