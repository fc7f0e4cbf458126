"""Declared shapes: "... K", "N K/2", "N K/group_size"; real ones are checked by them, and outputs' found.

A name stands for the same dim wherever it occurs in an op, `...` for the same leading dims. `K/2` and
`K/group_size` are K divided by a number or by an attribute's value. `a | b` is either. `~...` are leading dims that
broadcast with `...`, as NumPy has it; `...` stands for the result from then on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Dim = int | str | None
"""A size, a symbolic one, or nothing known."""
Shape = tuple[Dim, ...] | None
"""None: not even the rank is known."""


class ShapeError(ValueError):
    """Shapes that do not fit the declaration."""


@dataclass(frozen=True)
class Case:
    """A declared shape that depends on the value of an attribute."""

    attribute: str
    shapes: Mapping[int, str]


def concrete(
    declared: str | Case, attrs: Mapping[str, int | float | str], names: Mapping[str, int], lead: tuple[int, ...]
) -> tuple[int, ...]:
    """The dims of a declared shape, with `lead` for its leading ones; of `a | b` those of a."""
    text = declared if isinstance(declared, str) else declared.shapes[int(attrs[declared.attribute])]
    dims: list[int] = []
    for token in text.partition("|")[0].split():
        name, _, by = token.partition("/")
        size = names[name] if name in names else int(name) if name.isdigit() else 0
        dims += lead if token.endswith("...") else [size // int(attrs.get(by, by))] if by else [size]
    return tuple(dims)


class Unifier:
    """What the shapes of one node's inputs say about the names in its declaration."""

    def __init__(self, attrs: Mapping[str, int | float | str]) -> None:
        self._attrs = attrs
        self._dims: dict[str, Dim] = {}
        self._lead: Shape = None

    def check(self, declared: str | Case, shape: Shape) -> None:
        """Take note of a tensor's shape.

        Raises:
            ShapeError: it does not fit the declaration, or what was seen before.
        """
        if shape is None:
            return
        shape = tuple(shape)
        *others, last = self._choices(declared)
        for choice in others:
            trial = copy.deepcopy(self)
            with contextlib.suppress(ShapeError):
                trial._unify(choice.split(), shape)
                self._dims, self._lead = trial._dims, trial._lead
                return
        self._unify(last.split(), shape)

    def solve(self, declared: str | Case) -> Shape:
        """The shape of an output; None where the rank is not known."""
        (tokens,) = (c.split() for c in self._choices(declared))
        dims = tuple(self._value(t) for t in tokens if t != "...")
        if tokens[0] != "...":
            return dims
        return None if self._lead is None else self._lead + dims

    def _choices(self, declared: str | Case) -> list[str]:
        if isinstance(declared, Case):
            declared = declared.shapes[int(self._attrs[declared.attribute])]
        return [choice.strip() for choice in declared.split("|")]

    def _unify(self, tokens: Sequence[str], shape: tuple[Dim, ...]) -> None:
        rest = [t for t in tokens if t not in ("...", "~...")]
        lead = len(shape) - len(rest)
        if lead < 0 or (lead and len(rest) == len(tokens)):
            raise ShapeError(f"has shape {_text(shape)}, wants {self._wanted(tokens)}")
        try:
            if "~..." in tokens and self._lead is not None:
                self._lead = _broadcast(self._lead, shape[:lead])
            if "..." in tokens:
                self._lead = shape[:lead] if self._lead is None else _merge(self._lead, shape[:lead])
            for token, dim in zip(rest, shape[lead:], strict=True):
                self._bind(token, dim)
        except _Clash:
            raise ShapeError(f"has shape {_text(shape)}, wants {self._wanted(tokens)}") from None

    def _bind(self, token: str, dim: Dim) -> None:
        name, _, by = token.partition("/")
        if not by:
            known = int(name) if name.isdigit() else self._dims.get(name)
            merged = _meet(known, dim)
            if not name.isdigit():
                self._dims[name] = merged
            return
        divisor = self._divisor(by)
        known = self._dims.get(name)
        if isinstance(known, int):
            if known % divisor:
                raise ShapeError(f"does not fit: {name}={known} is not a multiple of {divisor}")
            _meet(known // divisor, dim)
        elif isinstance(dim, int):
            self._dims[name] = dim * divisor

    def _value(self, token: str) -> Dim:
        return int(token) if token.isdigit() else self._dims.get(token)

    def _divisor(self, by: str) -> int:
        return int(by) if by.isdigit() else int(self._attrs[by])

    def _wanted(self, tokens: Sequence[str]) -> str:
        names = dict.fromkeys(t.partition("/")[0] for t in tokens)
        facts = "".join(f", {n}={d}" for n in names if isinstance(d := self._dims.get(n), int))
        lead = f", ...={_text(self._lead)}" if {"...", "~..."}.intersection(tokens) and self._lead else ""
        return f"[{', '.join(tokens)}]{facts}{lead}"


class _Clash(Exception):
    pass


def _meet(a: Dim, b: Dim) -> Dim:
    """The better known of two dims that must be the same."""
    if isinstance(a, int) and isinstance(b, int) and a != b:
        raise _Clash
    return b if a is None or (isinstance(a, str) and isinstance(b, int)) else a


def _merge(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    if len(a) != len(b):
        raise _Clash
    return tuple(_meet(x, y) for x, y in zip(a, b, strict=True))


def _broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    rank = max(len(a), len(b))
    dims: list[Dim] = []
    for x, y in zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True):
        if x == y or y == 1:
            dims.append(x)
        elif x == 1:
            dims.append(y)
        elif isinstance(x, int) and isinstance(y, int):
            raise _Clash
        else:
            dims.append(next((d for d in (x, y) if isinstance(d, int)), None))
    return tuple(dims)


def _text(shape: tuple[Dim, ...]) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
