"""What a pattern says of all uses of a value: the fields made by `uses`, `every` and `others`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from qpass.graph import Node, Value
from qpass.rewriter.pattern import Pat, Pattern, Uses, Var
from qpass.rewriter.view import View, named

Match = Callable[[type[Pattern], Node], Pattern | None]


def fan_out(
    pattern: type[Pattern], bound: Mapping[Pat, Any], held: Set[Node], view: View, match: Match
) -> dict[str, Any] | tuple[Pat, str]:
    """The fields by name, or the value that has a use which no sub-match covers, and that use in words.

    Args:
        bound: expression → the graph value that it stands for; a part that is absent has no uses.
        held: the nodes of the match, which are no others.
        match: finds a sub-match whose root is a given node.
    """
    fields: dict[str, Any] = {}
    claimed: dict[Pat, set[Node]] = {}
    for name, u in pattern.fanouts.items():
        if u.kind != "others":
            element = pattern.elements[name]
            found, rest = _matched(u, element, bound, view, match)
            if rest is not None and u.kind == "every":
                return u.of, f"every use must be a {element.__name__}, but {rest} is not"
            fields[name] = found
            claimed.setdefault(u.of, set()).update(n for m in found for n in m.nodes)
    for name, u in pattern.fanouts.items():
        if u.kind == "others":
            mine, value = held | claimed.get(u.of, set()), bound.get(u.of)
            fields[name] = value is not None and (
                view.is_output(value) or any(n not in mine for n, _ in view.uses(value))
            )
    return fields


def _matched(
    u: Uses, element: type[Pattern], bound: Mapping[Pat, Any], view: View, match: Match
) -> tuple[list[Pattern], str | None]:
    """The uses of a value that match, and the first that does not, in words."""
    value = bound.get(u.of)
    if value is None:
        return [], None
    rest = "a graph output" if view.is_output(value) else None
    found: list[Pattern] = []
    for user, taken in view.uses(value):
        if any(user in f.nodes for f in found):
            continue
        m = _around(user, taken, element, match)
        if m is not None:
            found.append(m)
        elif rest is None:
            rest = named(user)
    return found, rest


def _around(user: Node, taken: Value, element: type[Pattern], match: Match) -> Pattern | None:
    """The largest match of `element` that holds `user` and captures `taken`; its root may lie further down."""
    captures = [k for k, p in element.captures.items() if isinstance(p, Var) and p.kind == "value"]
    best, at = None, user
    for _ in range(element.largest):
        m = match(element, at)
        if m is not None and user in m.nodes and any(getattr(m, k) is taken for k in captures):
            best = m
        if len(at.outputs[0].outputs) != 1:
            break
        at = at.outputs[0].outputs[0]
    return best
