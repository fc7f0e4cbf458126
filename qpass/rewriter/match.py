"""The matcher: one goal stack, one undo trail, a step budget, and the best account of why there is no match."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qpass.graph import Const, Node, Value
from qpass.graph.dtypes import DType
from qpass.rewriter.fanout import fan_out
from qpass.rewriter.inputs import arguments
from qpass.rewriter.location import PatternError
from qpass.rewriter.miss import Kind, Miss
from qpass.rewriter.pattern import COMMUTATIVE, MAY_BE_NOOP, Absent, Alt, Literal, MaybeCast, Op, Pat, Pattern, Var
from qpass.rewriter.view import MOVES_ONLY, View, describe, domain_of, named, producer

STEP_BUDGET = 20_000
"""Goals one match attempt may try; a pattern that needs more is ambiguous, and an error that names it."""

P = TypeVar("P", bound=Pattern)
Goals = tuple[tuple[Pat, Value], ...]
Done = Callable[[], bool]


def match(pattern: type[P], node: Node, view: View) -> tuple[P | None, Miss | None]:
    """The match of `pattern` whose root is `node`, or the nearest miss.

    Raises:
        PatternError: the search exceeded STEP_BUDGET; the pattern's alternatives are ambiguous.
    """
    search = Search(pattern, node, view)
    found = search.run()
    return (found, None) if found is not None else (None, search.miss())


@dataclass(frozen=True)
class _Stop:
    """Where a search got furthest."""

    kind: Kind
    at: Pat
    why: str
    goals: Goals
    bound: frozenset[Pat]
    nodes: tuple[Node, ...]


class Search:
    """One attempt to match a pattern whose root is a given node."""

    def __init__(self, pattern: type[Pattern], root: Node, view: View) -> None:
        self.pattern = pattern
        self.root = root
        self.view = view
        self.free_casts = pattern.free_casts
        self.bound: dict[Pat, Any] = {}  # expression → the graph value it stands for (attributes: their value)
        self.captured: dict[Pat, Any] = {}  # capture → what the rule sees, where that is not the graph value
        self.used: dict[Node, Pat] = {}  # graph node → the pattern node it is
        self.aside: dict[Node, Pat] = {}  # twins of used nodes, and Casts between them
        self.dims: dict[str, int] = {}
        self.fanout: dict[str, Any] = {}
        self.starts: dict[Value, tuple[str, str] | None] = {}
        self.trail: list[tuple[dict[Any, Any], Any, Any]] = []
        self.steps = 0
        self.stop: _Stop | None = None

    def run(self) -> Any:
        """The match, or None."""
        root, found = self.root.outputs[0], []

        def done() -> bool:
            if self._adds_dims() or self._leaks(root) or not self._fan_out():
                return False
            found.append(self._instance())
            return True

        self._solve(((self.pattern.captures["y"], root),), done)
        return found[0] if found else None

    @property
    def near(self) -> bool:
        """Whether more was found than a root of the right type."""
        return self.stop is not None and (len(self.stop.nodes) > 1 or self.stop.kind > Kind.OP)

    def miss(self, rule: str = "") -> Miss | None:
        """The nearest miss of a search that found nothing."""
        if (s := self.stop) is None:
            return None
        unmet = (s.at, *(p for p, _ in s.goals if p is not s.at))
        op = s.at.type if isinstance(s.at, Op) else ""
        name = self.pattern.__name__
        return Miss(self.root, name, s.nodes, s.at.label(), s.why, s.kind, rule, op, unmet, s.bound)

    # -- the trail

    def _put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self.trail.append((table, key, table.get(key, _ABSENT)))
        table[key] = value

    def _undo(self, mark: int) -> None:
        while len(self.trail) > mark:
            table, key, old = self.trail.pop()
            if old is _ABSENT:
                del table[key]
            else:
                table[key] = old

    def _fail(self, p: Pat, why: Callable[[], str], goals: Goals = (), kind: Kind = Kind.DETAIL) -> bool:
        """Keep the failure that got furthest; what the rest of the pattern would need is counted at the end."""
        if self.stop is None or (len(self.used), kind) > (len(self.stop.nodes), self.stop.kind):
            self.stop = _Stop(kind, p, why(), goals, frozenset(self.bound), tuple(self.used))
        return False

    # -- goals

    def _solve(self, goals: Goals, done: Done) -> bool:
        self.steps += 1
        if self.steps > STEP_BUDGET:
            raise PatternError(
                f"{self.pattern.location}: {self.pattern.__name__} took more than {STEP_BUDGET} steps at "
                f"{named(self.root)}; give its alternatives different ops or name shared parts once"
            )
        if not goals:
            return done()
        p, v = goals[0]
        if p in self.bound:
            twins = self.view.same(self.bound[p], v, self.free_casts)
            if twins is not None:
                return self._go_on(goals, done, aside=twins)
            if not isinstance(p, MaybeCast):
                return self._fail(
                    p, lambda: f"must be '{self.bound[p].name}' again, got {describe(v, self.view)}", goals, Kind.OP
                )
        if isinstance(p, Alt):
            return self._solve_alternatives(p, v, goals, done)
        if isinstance(p, Op):
            return self._solve_op(p, v, goals, done)
        if isinstance(p, Literal):
            return self._solve_number(p, v, goals, done, p.value, p.value)
        if isinstance(p, Absent):
            if v.name:
                return self._fail(p, lambda: f"wants no such input, got {describe(v, self.view)}", goals)
            return self._solve(goals[1:], done)
        assert isinstance(p, Var)
        if p.kind == "scalar":
            assert p.bounds is not None
            return self._solve_number(p, v, goals, done, *p.bounds)
        return self._solve_capture(p, v, goals, done)

    def _solve_alternatives(self, p: Alt, v: Value, goals: Goals, done: Done) -> bool:
        mark, start, tried = len(self.trail), self._start(v), False
        for option in p.options:
            if option.starts is None or start in option.starts:
                tried = True
                self._put(self.bound, p, v)
                if self._solve(((option, v), *goals[1:]), done):
                    return True
                self._undo(mark)
        if not tried:
            self._fail(p, lambda: self._wants(p, v), goals, Kind.OP)
        return False

    def _go_on(self, goals: Goals, done: Done, aside: list[Node]) -> bool:
        """The first goal is met by a value known already; `aside` are the nodes that compute it once more."""
        mark = len(self.trail)
        for node in aside:
            if node not in self.used and node not in self.aside:
                self._put(self.aside, node, goals[0][0])
        if self._solve(goals[1:], done):
            return True
        self._undo(mark)
        return False

    def _solve_capture(self, p: Var, v: Value, goals: Goals, done: Done) -> bool:
        captured: Value | Const = v
        if p.kind == "const":
            c = self.view.constant(v)
            if c is None:
                return self._fail(
                    p, lambda: f"{self._asks(p, v)} a constant, got {describe(v, self.view)}", goals, Kind.COMPUTED
                )
            captured = _without_leading_ones(p, c)
        mark = len(self.trail)
        why = self._unify(p.dims, captured) if p.dims is not None else None
        if why is None:
            self._put(self.bound, p, v)
            self._put(self.captured, p, captured)
            if self._solve(goals[1:], done):
                return True
        else:
            self._fail(p, lambda: f"{self._asks(p, v)} {why}", goals)
        self._undo(mark)
        return False

    def _solve_number(self, p: Pat, v: Value, goals: Goals, done: Done, low: float, high: float) -> bool:
        c = self.view.constant(v)
        wants = f"{low:g}" if low == high else f"a number in [{low:g}, {high:g}]"

        def why(got: str) -> str:
            return f"{self._asks(p, v)} {wants}, got {got}"

        if c is None:
            return self._fail(p, lambda: why(describe(v, self.view)), goals, Kind.COMPUTED)
        if c.array.size != 1 or c.dtype.kind in "OSU":
            return self._fail(p, lambda: why(f"constant '{c.origin}' of shape {list(c.shape)}"), goals)
        got = float(c.load().reshape(()))
        if not (np.isclose(got, low, rtol=_precision(c), atol=0) if low == high else low <= got <= high):
            return self._fail(p, lambda: why(f"{got:g}"), goals)
        mark = len(self.trail)
        self._put(self.bound, p, v)
        self._put(self.captured, p, got)
        if self._solve(goals[1:], done):
            return True
        self._undo(mark)
        return False

    def _solve_op(self, p: Op, v: Value, goals: Goals, done: Done) -> bool:
        source, casts = self._seen_through(p, v)
        node = producer(source)
        if node is None or node.op != p.type or domain_of(node) != p.domain:
            return self._fail(p, lambda: self._wants(p, v), goals, Kind.OP)
        if node not in self.view.inside:
            return self._fail(p, lambda: f"{named(node)} belongs to another graph", goals, Kind.LEAK)
        if node in self.used:
            why = f"is already matched as {self.used[node].label()}"
            return self._fail(p, lambda: f"{named(node)} {why}", goals, Kind.OP)
        if source is not node.outputs[0]:
            return self._fail(p, lambda: f"'{source.name}' is not the first output of {named(node)}", goals)
        found = arguments(p, node, self.view, self.bound)
        if isinstance(found, str):
            return self._fail(p, lambda: f"{named(node)}: {found}", goals)
        mark = len(self.trail)
        for c in casts:
            if c not in self.aside:
                self._put(self.aside, c, p)
        self._put(self.bound, p, source)
        self._put(self.used, node, p)
        for var, got in found.attributes:
            self._put(self.bound, var, got)
        swap = len(found.inputs) == 2 and p.type in COMMUTATIVE and not p.domain
        starts = [self._start(i) for i in found.inputs]
        for turn in (1, -1) if swap else (1,):
            args = tuple(zip(p.args, found.inputs[::turn], strict=True))
            for odd, start in zip(args, starts[::turn], strict=True):
                if odd[0].starts is not None and start not in odd[0].starts:
                    break  # refused at once, not when it is its turn
            else:
                odd = None
            if odd is not None:
                self._fail(odd[0], lambda odd=odd: self._wants(*odd), goals, Kind.OP)  # type: ignore[misc]
                continue
            inner = len(self.trail)
            if self._solve((*args, *goals[1:]), done):
                return True
            self._undo(inner)
        self._undo(mark)
        return False

    def _start(self, v: Value) -> tuple[str, str] | None:
        """The domain and op of a value's producer, as patterns see it."""
        if v not in self.starts:  # alternatives ask again
            node = producer(self.view.uncast(v)[0] if self.free_casts else self.view.through(v))
            self.starts[v] = None if node is None else (domain_of(node), node.op)
        return self.starts[v]

    def _wants(self, p: Pat, v: Value) -> str:
        ops = " or ".join(sorted({op for _, op in p.starts or ()}))
        seen = self.view.uncast(v)[0] if self.free_casts else self.view.through(v)
        return f"wants {ops}, got {describe(seen, self.view)}"

    def _asks(self, p: Pat, v: Value) -> str:
        """Who asks for a value, and as what: "Add 'n': eps wants"."""
        user = next((n for n in reversed(self.used) if any(v is i for i in n.inputs)), None)
        words = [f"{named(user)}:"] if user is not None else []
        return " ".join([*words, *([p.name] if isinstance(p, Var) and p.name else []), "wants"])

    def _seen_through(self, p: Op, v: Value) -> tuple[Value, list[Node]]:
        """The value whose producer a pattern node is compared with, and the Casts between."""
        if p.type in MAY_BE_NOOP:
            while (node := producer(v)) is not None and node.op != p.type and self.view.is_noop(node):
                v = node.inputs[0]
            return v, []
        return self.view.uncast(v) if self.free_casts else (self.view.through(v), [])

    def _unify(self, want: tuple[str, ...], v: Value | Const) -> str | None:
        """None where the dims agree with what is known; symbolic and unknown dims agree with anything."""
        shape = v.shape
        if shape is None:
            return None
        all_dims = list(shape)
        full = " ".join(f"{n}={self.dims[n]}" if n in self.dims else n for n in want)
        if want[:1] == ("...",):
            want = want[1:]
            shape = shape[len(shape) - len(want) :] if len(shape) >= len(want) else shape
        if len(shape) != len(want):
            return f"[{full}], got {all_dims}"
        for name, got in zip(want, shape, strict=True):
            if name == "_" or not isinstance(got, int):
                continue
            known = int(name) if name.isdigit() else self.dims.get(name)
            if known is None:
                self._put(self.dims, name, got)
            elif known != got:
                return f"{name}={known}, got {got} in {all_dims}"
        return None

    # -- after every goal is met

    def _adds_dims(self) -> bool:
        """Whether a constant that the rule sees with fewer dims gives the result dims that no other operand has."""
        wide = next((p for p, c in self._constants() if len(c.shape) > max(1, self._seen_dims(p))), None)
        if wide is None:
            return False
        for node in self.used:
            fixed = [c for v in node.inputs if v.name and (c := self.view.constant(v)) is not None]
            other = [v for v in node.inputs if v.name and self.view.constant(v) is None]
            most = max((len(c.shape) for c in fixed), default=0)
            if other and most > 1 and not any(v.shape is not None and len(v.shape) >= most for v in other):
                why = f"a constant of {named(node)} has {most} dims, which may be more than its input has"
                return not self._fail(wide, lambda why=why: why)  # type: ignore[misc]
        return False

    def _constants(self) -> Iterator[tuple[Pat, Const]]:
        for p, v in self.bound.items():
            if isinstance(p, Literal) or (isinstance(p, Var) and p.kind in ("const", "scalar")):
                c = self.view.constant(v)
                assert c is not None
                yield p, c

    def _seen_dims(self, p: Pat) -> int:
        """Dims of what the rule sees of a constant: none of a number."""
        seen = self.captured[p]
        return len(seen.shape) if isinstance(seen, Const) else 0

    def _leaks(self, root: Value) -> bool:
        """Whether an interior value is needed outside the match; a view of what goes in is kept for others.

        What the pattern asks about is none of these: `others` of a value, and outputs that it names.
        """
        told = {self.bound.get(u.of) for u in self.pattern.fanouts.values() if u.kind == "others"}
        told.update(self._other_outputs().values())
        for node, p in (*self.used.items(), *self.aside.items()):
            if not self._computes(node):
                continue
            for out in node.outputs:
                if out is root or out in told:
                    continue
                user = next((u for u in out.outputs if not self._holds(u)), None)
                if user is not None or self.view.is_output(out):
                    by = named(user) if user is not None else "a graph output"
                    why = f"{node.op}'s result '{out.name}' is also used by {by}"
                    self._fail(p, lambda why=why: why, (), Kind.LEAK)  # type: ignore[misc]
                    return True
        return False

    def _computes(self, node: Node) -> bool:
        """Whether to keep a node would be to keep more than moves of what comes into the match."""
        if node.op not in MOVES_ONLY or domain_of(node):
            return True
        makers = (producer(v) for v in node.inputs)
        return any(n is not None and (n in self.used or n in self.aside) and self._computes(n) for n in makers)

    def _holds(self, node: Node) -> bool:
        """Whether a node is of the match, or a no-op within it."""
        if node in self.used or node in self.aside:
            return True
        out = node.outputs[0]
        return (
            self.view.is_noop(node)
            and not self.view.is_output(out)
            and bool(out.outputs)
            and all(map(self._holds, out.outputs))
        )

    def _fan_out(self) -> bool:
        """Fill the `uses`, `every` and `others` fields; those of an absent part are empty."""
        held = {*self.used, *self.aside}
        found = fan_out(self.pattern, self.bound, held, self.view, lambda p, n: Search(p, n, self.view).run())
        if isinstance(found, tuple):
            return self._fail(found[0], lambda: found[1], (), Kind.FANOUT)
        self.fanout = found
        return True

    def _other_outputs(self) -> dict[str, Value | None]:
        """The further outputs that the pattern names, those that are needed."""
        found: dict[str, Value | None] = {}
        for name, other in self.pattern.other_outputs.items():
            node = producer(self.bound[other.of]) if other.of in self.bound else None
            out = node.outputs[other.index] if node is not None and other.index < len(node.outputs) else None
            needed = out is not None and (out.outputs or self.view.is_output(out))
            found[name] = out if needed else None
        return found

    def _instance(self) -> Pattern:
        m = self.pattern.__new__(self.pattern)
        for name, p in self.pattern.captures.items():
            setattr(m, name, self.captured.get(p, self.bound.get(p)))
        for name, value in (*self.fanout.items(), *self._other_outputs().items()):
            setattr(m, name, value)
        m.y = self.root.outputs[0]
        m.root = self.root
        m.nodes = tuple(dict.fromkeys((self.root, *self.used, *self.aside)))
        return m


_ABSENT = object()


def _without_leading_ones(p: Var, c: Const) -> Const:
    """`c` without the leading dims of 1 that the wanted shape does not have."""
    if p.dims is None or p.dims[:1] == ("...",) or len(c.shape) <= len(p.dims):
        return c
    extra = len(c.shape) - len(p.dims)
    if any(d != 1 for d in c.shape[:extra]):
        return c
    return Const(c.name, c.array.reshape(*c.shape[extra:]), root=c.root, via=c.via)


def _precision(c: Const) -> float:
    """How close a constant can be to the number meant: half a unit in the last place, rounded up, of each dtype that it
    has had."""
    root = c.root.dtype if isinstance(c.root, Const) and c.root.dtype.kind in "fV" else c.dtype
    return max(_unit(c.dtype), _unit(root))


def _unit(dtype: DType) -> float:
    return {2: 1e-3, 4: 1e-6, 8: 1e-9}.get(dtype.itemsize, 1e-6) if dtype.name != "bfloat16" else 4e-3
