"""The matcher: one goal stack, one undo trail, a step budget, and the best account of why there is no match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np

from qpass.graph import Const, Node, Value
from qpass.rewriter.pattern import COMMUTATIVE, FLOAT, LAST, Alt, Literal, Op, Pat, Pattern, PatternError, Uses, Var, size
from qpass.rewriter.view import FLOATS, MOVES_ONLY, View, describe, domain_of, producer

STEP_BUDGET = 20_000
"""Goals one match attempt may try; a pattern that needs more is ambiguous, and an error that names it."""

P = TypeVar("P", bound=Pattern)
Goals = tuple[tuple[Pat, Value], ...]
Done = Callable[[], bool]


class Kind(IntEnum):
    """What stopped a match, the most telling last: near misses are ranked by it."""

    OP = 1
    DETAIL = 2  # a constant, a shape, an attribute
    LEAK = 3
    FANOUT = 4
    GUARD = 5


@dataclass(frozen=True)
class Miss:
    """Why a pattern did not match at a node, or why its rule declined."""

    root: Node
    pattern: str
    matched: int
    total: int
    at: str
    why: str
    kind: Kind
    rule: str = ""

    @property
    def rank(self) -> tuple[float, int, int]:
        """Larger is nearer."""
        return (self.matched / max(self.total, 1), int(self.kind), self.matched)

    def __str__(self) -> str:
        where = f"{self.root.op} '{self.root.name or self.root.outputs[0].name}'"
        if self.kind is Kind.GUARD:
            return f"{where}: {self.rule or self.pattern} declined at {self.at}: {self.why}"
        return f"{where}: {self.pattern} matched {self.matched} of {self.total} nodes; stopped at {self.at}: {self.why}"


def match(pattern: type[P], node: Node, view: View) -> tuple[P | None, Miss | None]:
    """The match of `pattern` whose root is `node`, or the nearest miss.

    Raises:
        PatternError: the search exceeded STEP_BUDGET; the pattern's alternatives are ambiguous.
    """
    search = _Search(pattern, node, view)
    found = search.run()
    return (found, None) if found is not None else (None, search.miss())


@dataclass(frozen=True)
class _Stop:
    """Where a search got furthest."""

    matched: int
    kind: Kind
    at: Pat
    why: str
    goals: Goals
    bound: set[Pat]


class _Search:
    def __init__(self, pattern: type[Pattern], root: Node, view: View) -> None:
        self.pattern = pattern
        self.root = root
        self.view = view
        self.bound: dict[Pat, Any] = {}  # expression → the graph value it stands for (attributes: their value)
        self.captured: dict[Pat, Any] = {}  # capture → what the rule sees, where that is not the graph value
        self.used: dict[Node, Pat] = {}
        self.dims: dict[str, Any] = {}
        self.fanout: dict[str, Any] = {}
        self.trail: list[tuple[dict[Any, Any], Any, Any]] = []
        self.steps = 0
        self.stop: _Stop | None = None

    def run(self) -> Any:
        root, found = self.root.outputs[0], []

        def done() -> bool:
            if self.leaks(root) or not self.fan_out():
                return False
            found.append(self.instance())
            return True

        self.solve(((self.pattern.captures["y"], root),), done)
        return found[0] if found else None

    # -- the trail

    def put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self.trail.append((table, key, table.get(key, _ABSENT)))
        table[key] = value

    def undo(self, mark: int) -> None:
        while len(self.trail) > mark:
            table, key, old = self.trail.pop()
            if old is _ABSENT:
                del table[key]
            else:
                table[key] = old

    def fail(self, p: Pat, why: Callable[[], str], goals: Goals, kind: Kind = Kind.OP) -> bool:
        """Keep the failure that got furthest; what the rest of the pattern would need is counted once, at the end."""
        if self.stop is None or (len(self.used), kind) > (self.stop.matched, self.stop.kind):
            self.stop = _Stop(len(self.used), kind, p, why(), goals, set(self.bound))
        return False

    def miss(self) -> Miss | None:
        """The nearest miss, in the words of the user."""
        if (s := self.stop) is None:
            return None
        todo = size(s.at, s.bound) + sum(size(q, s.bound | {s.at}) for q, _ in s.goals if q is not s.at)
        total = s.matched + max(1 if s.kind is Kind.OP else 0, todo)
        return Miss(self.root, self.pattern.__name__, s.matched, total, s.at.label(), s.why, s.kind)

    # -- goals

    def solve(self, goals: Goals, done: Done) -> bool:
        self.steps += 1
        if self.steps > STEP_BUDGET:
            raise PatternError(
                f"{self.pattern.location}: {self.pattern.__name__} took more than {STEP_BUDGET} steps at "
                f"{self.root.op} '{self.root.name}'; give its alternatives different ops or name shared parts once"
            )
        if not goals:
            return done()
        (p, v), rest = goals[0], goals[1:]
        mark = len(self.trail)
        if p in self.bound:
            twins = self.view.same(self.bound[p], v)
            if twins is not None:
                for node in twins:
                    if node not in self.used:
                        self.put(self.used, node, p)
                if self.solve(rest, done):
                    return True
                self.undo(mark)
                return False
            if not isinstance(p, Alt):
                return self.fail(p, lambda: f"must be '{self.bound[p].name}' again, got {describe(v, self.view)}", goals)
        if isinstance(p, Alt):
            for option in p.options:
                self.put(self.bound, p, v)
                if self.solve(((option, v), *rest), done):
                    return True
                self.undo(mark)
            return False
        if isinstance(p, Op):
            return self.solve_op(p, v, goals, done)
        if isinstance(p, Literal):
            return self.solve_number(p, v, goals, done, p.value, p.value)
        assert isinstance(p, Var)
        if p.kind == "scalar":
            assert p.bounds is not None
            return self.solve_number(p, v, goals, done, *p.bounds)
        captured: Value | Const = v
        if p.kind == "const":
            c = self.view.constant(v)
            if c is None:
                return self.fail(p, lambda: f"wants a constant, got {describe(v, self.view)}", goals, Kind.DETAIL)
            captured = self.fit(p, c)
        why = self.unify(p.dims, captured) if p.dims is not None else None
        if why is None:
            self.put(self.bound, p, v)
            self.put(self.captured, p, captured)
            if self.solve(rest, done):
                return True
        else:
            self.fail(p, lambda: why, goals, Kind.DETAIL)
        self.undo(mark)
        return False

    def solve_number(self, p: Pat, v: Value, goals: Goals, done: Done, low: float, high: float) -> bool:
        c = self.view.constant(v)
        wants = f"{low:g}" if low == high else f"a number in [{low:g}, {high:g}]"
        if c is None:
            return self.fail(p, lambda: f"wants {wants}, got {describe(v, self.view)}", goals, Kind.DETAIL)
        if c.array.nbytes > 16 or int(np.prod(c.shape)) != 1:
            return self.fail(p, lambda: f"wants {wants}, got constant '{c.origin}' of shape {list(c.shape)}", goals, Kind.DETAIL)
        got = float(c.load().reshape(()))
        if not (np.isclose(got, low, rtol=1e-3, atol=0) if low == high else low <= got <= high):
            return self.fail(p, lambda: f"wants {wants}, got {got:g}", goals, Kind.DETAIL)
        mark = len(self.trail)
        self.put(self.bound, p, v)
        self.put(self.captured, p, got)
        if self.solve(goals[1:], done):
            return True
        self.undo(mark)
        return False

    def solve_op(self, p: Op, v: Value, goals: Goals, done: Done) -> bool:
        source = v if p.type in ("Cast", "Identity") else self.view.through(v)
        node = producer(source)
        if node is None or node.op != p.type or domain_of(node) != p.domain:
            return self.fail(p, lambda: f"wants {p.type}, got {describe(v, self.view)}", goals)
        if node not in self.view.inside:
            return self.fail(p, lambda: f"{node.op} '{node.name}' belongs to another graph", goals, Kind.LEAK)
        if node in self.used:
            return self.fail(p, lambda: f"{node.op} '{node.name}' is already matched as {self.used[node].label()}", goals)
        args, attributes, why = self.arguments(p, node)
        if why is not None:
            return self.fail(p, lambda: why, goals, Kind.DETAIL)
        mark = len(self.trail)
        self.put(self.bound, p, source)
        self.put(self.used, node, p)
        for var, got in attributes:
            self.put(self.bound, var, got)
        swap = len(args) == 2 and p.type in COMMUTATIVE and not p.domain
        for order in (args, args[::-1]) if swap else (args,):
            inner = len(self.trail)
            if self.solve((*zip(p.args, order, strict=True), *goals[1:]), done):
                return True
            self.undo(inner)
        self.undo(mark)
        return False

    # -- inputs, attributes, shapes

    def arguments(self, p: Op, node: Node) -> tuple[list[Value], list[tuple[Var, Any]], str | None]:
        """Inputs by position and attributes by keyword; the schema tells which keyword is which at this opset."""
        schema = self.view.signature(node)
        inputs: list[Value | None] = list(node.inputs)
        while inputs and inputs[-1] is not None and not inputs[-1].name:
            inputs.pop()  # omitted optional inputs at the end
        captured: list[tuple[Var, Any]] = []
        for name, want in p.keywords.items():
            if name in node.attrs:
                got = node.attrs[name]
            elif schema is not None and name in schema.inputs:
                at = schema.inputs.index(name)
                given = inputs[at] if at < len(inputs) else None
                if at < len(inputs):
                    inputs[at] = None
                if isinstance(want, Pat) and not (isinstance(want, Var) and want.kind == "attr"):
                    return [], [], f"{name} is an input; pass it by position"
                c = self.view.constant(given) if given is not None else None
                if given is not None and c is None:
                    return [], [], f"{name} is computed, wants a constant"
                got = c.load().ravel().tolist() if c is not None else None
            elif schema is not None and name in schema.defaults:
                got = schema.defaults[name]
            else:
                return [], [], f"{node.op} has no attribute '{name}'"
            if isinstance(want, Var):
                if want in self.bound and self.bound[want] != got:
                    return [], [], f"{name} is {got}, and {self.bound[want]} elsewhere in the match"
                captured.append((want, got))
            elif why := self.compare(name, want, got, node):
                return [], [], why
        for name, got in node.attrs.items():
            if name not in p.keywords and schema is not None and got != schema.defaults.get(name):
                return [], [], f"attribute {name}={got} is not in the pattern"
        left = [i for i in inputs if i is not None]
        if len(left) != len(p.args):
            return [], [], f"{node.op} has {len(left)} inputs, the pattern {len(p.args)}"
        return left, captured, None

    @staticmethod
    def compare(name: str, want: Any, got: Any, node: Node) -> str | None:
        if want is FLOAT:
            return None if got in FLOATS else f"{name} is {got}, wants a floating-point type"
        if want is LAST:
            axes = [got] if isinstance(got, int) else got
            shape = node.inputs[0].shape
            if axes == [-1] or (shape is not None and axes == [len(shape) - 1]):
                return None
            return f"{name} is {got}, wants the last axis"
        if isinstance(want, float):
            same = isinstance(got, int | float) and bool(np.isclose(got, want, rtol=1e-6))
        else:
            same = got == want
        return None if same else f"{name} is {got}, wants {want}"

    @staticmethod
    def fit(p: Var, c: Const) -> Const:
        """`c` without the leading dims of 1 that the wanted shape does not have."""
        if p.dims is None or p.dims[:1] == ("...",) or len(c.shape) <= len(p.dims):
            return c
        extra = len(c.shape) - len(p.dims)
        if any(d != 1 for d in c.shape[:extra]):
            return c
        return Const(c.name, c.array.reshape(*c.shape[extra:]), root=c.root, via=c.via)

    def unify(self, want: tuple[str, ...], v: Value | Const) -> str | None:
        """None where the dims agree with what is known; symbolic and unknown dims agree with anything."""
        shape = v.shape
        if shape is None:
            return None
        full = " ".join(want)
        if want[:1] == ("...",):
            want = want[1:]
            shape = shape[len(shape) - len(want) :] if len(shape) >= len(want) else shape
        if len(shape) != len(want):
            return f"wants [{full}], got {list(v.shape)}"
        for name, got in zip(want, shape, strict=True):
            if name == "_" or not isinstance(got, int):
                continue
            known = int(name) if name.isdigit() else self.dims.get(name)
            if known is None:
                self.put(self.dims, name, got)
            elif known != got:
                return f"wants {name}={known}, got {got} in {list(v.shape)}"
        return None

    # -- after every goal is met

    def leaks(self, root: Value) -> bool:
        """Whether an interior value is needed outside the match; views are kept for others and leak nothing."""
        for node, p in self.used.items():
            for out in node.outputs:
                if out is root or (node.op in MOVES_ONLY and not domain_of(node)):
                    continue
                users = [u for u in out.outputs if u not in self.used and not self._only_view(u)]
                if users or self.view.is_output(out):
                    by = f"{users[0].op} '{users[0].name}'" if users else "a graph output"
                    self.fail(p, lambda out=out, by=by: f"'{out.name}' is also used by {by}", (), Kind.LEAK)  # type: ignore[misc]
                    return True
        return False

    def _only_view(self, node: Node) -> bool:
        """A no-op between two matched nodes."""
        return node.op in ("Identity", "Cast") and bool(node.outputs[0].outputs) and all(
            u in self.used for u in node.outputs[0].outputs
        )

    def fan_out(self) -> bool:
        """Fill the `uses`, `every` and `others` fields."""
        self.fanout.clear()
        lists = {k: u for k, u in self.pattern.fanouts.items() if u.kind != "others"}
        for field, u in lists.items():
            element = self.pattern.elements[field]
            found, rest = self._matched_uses(u, element)
            if rest is not None and u.kind == "every":
                by = f"{rest.op} '{rest.name}'" if isinstance(rest, Node) else str(rest)
                return self.fail(u.of, lambda e=element, by=by: f"every use must be a {e.__name__}, but {by} is not", (), Kind.FANOUT)  # type: ignore[misc]
            self.fanout[field] = found
        for field, u in self.pattern.fanouts.items():
            if u.kind == "others":
                claimed = {n for name, l in lists.items() if l.of is u.of for m in self.fanout[name] for n in m.nodes}
                value = self.bound[u.of]
                self.fanout[field] = self.view.is_output(value) or any(n not in claimed for n, _ in self.view.uses(value))
        return True

    def _matched_uses(self, u: Uses, element: type[Pattern]) -> tuple[list[Pattern], Node | str | None]:
        value = self.bound[u.of]
        rest: Node | str | None = "a graph output" if self.view.is_output(value) else None
        found: list[Pattern] = []
        for user, taken in self.view.uses(value):
            if any(user in f.nodes for f in found):
                continue
            m = self._match_around(user, taken, element)
            if m is None:
                rest = rest or user
            else:
                found.append(m)
        return found, rest

    def _match_around(self, user: Node, taken: Value, element: type[Pattern]) -> Pattern | None:
        """The largest match of `element` that holds `user` and captures `taken`; its root may lie further down."""
        best, at = None, user
        for _ in range(size(element.captures["y"], largest=True)):
            m, _miss = match(element, at, self.view)
            if m is not None and user in m.nodes and any(
                getattr(m, k) is taken for k, p in element.captures.items() if isinstance(p, Var) and p.kind == "value"
            ):
                best = m
            if len(at.outputs[0].outputs) != 1:
                break
            at = at.outputs[0].outputs[0]
        return best

    def instance(self) -> Pattern:
        m = self.pattern.__new__(self.pattern)
        for name, p in self.pattern.captures.items():
            setattr(m, name, self.captured.get(p, self.bound.get(p)))
        for name, value in self.fanout.items():
            setattr(m, name, value)
        m.y = self.root.outputs[0]
        m.root = self.root
        m.nodes = tuple(self.used)
        return m


_ABSENT = object()


def declined(miss_root: Node, pattern: type[Pattern], nodes: int, at: str, why: str, rule: str) -> Miss:
    """The miss of a rule that matched and then said no."""
    return Miss(miss_root, pattern.__name__, nodes, nodes, at, why, Kind.GUARD, rule)


def of_rule(miss: Miss, rule: str) -> Miss:
    """The same miss, with the rule it belongs to."""
    return replace(miss, rule=rule)
