"""Filters of a spec, and the Resolver that says by them what each Linear of a model gets. See `qpass.spec`."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpass.errors import QpassError
from qpass.spec_yaml import At, SpecError

if TYPE_CHECKING:
    from qpass.spec import LinearSpec, QuantSpec


def compile_filter(pattern: str) -> Callable[[str], object]:
    """A function that tells whether a name matches. Raises ValueError for a pattern that can't be one."""
    if not pattern.removeprefix("re:").strip():
        raise ValueError("the filter is empty; for all Linears write '*'")
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern)).match
    try:
        with warnings.catch_warnings(action="ignore"):  # of syntax that may change meaning one day
            return re.compile(pattern.removeprefix("re:")).search
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{quote(pattern)} is not a regular expression: {error}") from None


def quote(pattern: str) -> str:
    # as the user wrote it: repr would double a regex's backslashes
    return f"'{pattern}'" if pattern.isprintable() else repr(pattern)


def check_filter(pattern: str) -> str:
    compile_filter(pattern)
    return pattern


@dataclass(frozen=True)
class SiteNames:
    """All that a Linear, or another site, of a model can be called."""

    nodes: tuple[str, ...]
    weight: str | None
    scopes: tuple[str, ...]
    tied: bool  # a head whose weight is the embedding's own initializer


class Filter:
    """A glob or re: pattern of a spec, and whether it has had an effect on the model at hand."""

    def __init__(self, key: str, at: At, pattern: str) -> None:
        self.quoted = quote(pattern)
        self.label = f"{key}[{at[1]}] {self.quoted}"
        self.at = at
        self.pattern = pattern
        self.search = compile_filter(pattern)
        self.catches_all = all(self.search(name) for name in ("/", "0", "a"))  # these have nothing in common
        self.effective = False
        self.obstacle = ""  # why it had no effect on a Linear that it does match

    def matches(self, names: Iterable[str | None]) -> bool:
        return any(self.search(name) for name in names if name)

    def says_by_name(self, site: SiteNames) -> bool:
        # a glob that meets the weight's name may well mean the embedding, so that one has to be spelt out
        return not self.catches_all and (self.matches(site.nodes + site.scopes) or self.pattern == site.weight)


class Resolver:
    """What each Linear of one model gets, which norms stay, and whether every filter of the spec has an effect."""

    def __init__(self, spec: QuantSpec) -> None:
        self._source = spec._source
        self._base, *overrides = spec._linears()
        self._exclude = [Filter("exclude", ("exclude", i), text) for i, text in enumerate(spec.exclude)]
        self._include = [Filter("include", ("include", i), text) for i, text in enumerate(spec.include)]
        matches = enumerate(override.match for override in spec.overrides)
        filters = [Filter("overrides", ("overrides", i, "match"), match) for i, match in matches]
        self._overrides = dict(zip(filters, overrides, strict=True))
        self._names: dict[str, str] = {}  # a part of a name -> the first name that has it, for suggestions

    def linear(self, site: SiteNames) -> LinearSpec | str:
        """What the Linear gets, or why it is excluded, such as "excluded by exclude[0] '*.lm_head'"."""
        names = self._learn(site)
        excluding, including, overriding = (
            [one for one in filters if one.matches(names)]
            for filters in (self._exclude, self._include, self._overrides)
        )
        for one in excluding:
            one.effective = True
        if excluding:
            reason = f"excluded by {excluding[0].label}"
        elif self._include and not including:
            reason = "not in include"
        elif site.tied and not any(one.says_by_name(site) for one in including + overriding):
            reason = f"its weight {site.weight!r} is the embedding's own; include it by name to quantize it"
        else:
            for one in including + overriding[:1]:
                one.effective = True
            for one in overriding[1:]:
                one.obstacle = f"{overriding[0].label} comes first"
            return self._overrides[overriding[0]] if overriding else self._base
        for one in including + overriding:
            one.obstacle = f"{names[0]!r}: {reason}"
        return reason

    def norm(self, site: SiteNames) -> str | None:
        """Why a norm that would become a plugin is excluded, as of a Linear; None where it is not."""
        names = self._learn(site)
        excluding = [one for one in self._exclude if one.matches(names)]
        for one in excluding:
            one.effective = True
        return f"excluded by {excluding[0].label}" if excluding else None

    def _learn(self, site: SiteNames) -> list[str]:
        """All names of a site, known from now on for suggestions."""
        names = [name for name in (*site.nodes, *site.scopes, site.weight) if name]
        for name in names:
            for part in re.split(r"[./]", name):
                self._names.setdefault(part, name)
        return names

    def check(self) -> None:
        """After all Linears and norms: raises QpassError that names each filter without effect, and why."""
        idle = [one for one in (*self._exclude, *self._include, *self._overrides) if not one.effective]
        if idle:
            mistakes = [SpecError(self._complaint(one), one.at, self._source) for one in idle]
            raise QpassError("; ".join(map(str, mistakes)))

    def _complaint(self, one: Filter) -> str:
        if one.obstacle:
            return f"{one.quoted} has no effect: {one.obstacle}"
        words = re.findall(r"\w{3,}", one.pattern.removeprefix("re:"))[::-1]  # the last is the most telling
        close = [near for word in words for near in difflib.get_close_matches(word, self._names, n=1)]
        if close:
            mend = f"did you mean {self._names[close[0]]!r}?"
        elif self._names:
            mend = f"they have names like {next(iter(self._names.values()))!r}"
        else:
            mend = "it has none"
        return f"{one.quoted} matches no Linear of the model; {mend}"
