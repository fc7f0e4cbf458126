"""The pattern language: a pattern is a class, its fields are captures, an expression over them is the subgraph.

    class Linear(Pattern):
        x: Value = val("... K")
        w: Const = const("K N")
        b: Const | None = const("N")
        mm = op.MatMul(x, w)
        y = mm + b | mm                    # alternatives, the larger form first

`y` is the root. An expression object used twice stands for one graph value; two expression objects stand for two
different nodes. Matching itself is in `match.py`; this module only declares.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from qpass.rewriter.location import Location, PatternError, caller

if TYPE_CHECKING:
    from qpass.graph import Node, Value

LIFTED = "qpass.ir"
"""Domain of the in-memory nodes that stand for a whole norm, Linear or MLP; never written to a file."""

COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min", "And", "Or", "Xor", "Equal", "Sum"})

MAY_BE_NOOP = frozenset({"Cast", "Dropout", "Expand", "Identity", "Slice"})
"""Ops that the matcher looks through where they change nothing, unless a pattern asks for them."""


class Pat:
    """One expression of a pattern. Python's operators build larger ones."""

    __slots__ = ("at", "name", "starts")

    def __init__(self) -> None:
        self.name: str | None = None
        self.at = caller()
        self.starts: frozenset[tuple[str, str]] | None = None
        """The (domain, op type) pairs that a value's producer may have; None where it may be anything."""

    def __or__(self, other: object) -> Alt:
        return Alt(self, _lift(other))

    def __add__(self, other: object) -> Op:
        return Op("Add", (self, other))

    def __radd__(self, other: object) -> Op:
        return Op("Add", (other, self))

    def __sub__(self, other: object) -> Op:
        return Op("Sub", (self, other))

    def __rsub__(self, other: object) -> Op:
        return Op("Sub", (other, self))

    def __mul__(self, other: object) -> Op:
        return Op("Mul", (self, other))

    def __rmul__(self, other: object) -> Op:
        return Op("Mul", (other, self))

    def __truediv__(self, other: object) -> Op:
        return Op("Div", (self, other))

    def __rtruediv__(self, other: object) -> Op:
        return Op("Div", (other, self))

    def __pow__(self, other: object) -> Op:
        return Op("Pow", (self, other))

    def __neg__(self) -> Op:
        return Op("Neg", (self,))

    def __bool__(self) -> NoReturn:
        raise PatternError(f"{self.at}: a pattern has no truth value; write alternatives with |, not `or`")

    def label(self) -> str:
        return f"{self.name} ({self.at})" if self.name else f"({self.at})"


class Literal(Pat):
    """A number that the graph must hold as a constant of one element."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = float(value)
        self.name = f"{value:g}"


class Var(Pat):
    """A capture: any value, a constant tensor, a constant of one element, or an attribute."""

    __slots__ = ("bounds", "dims", "kind")

    def __init__(self, kind: str, shape: str | None = None, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.dims = tuple(shape.split()) if shape is not None else None
        self.bounds = bounds
        if self.dims and "..." in self.dims[1:]:
            raise PatternError(f"{self.at}: '...' may only lead a shape, got '{shape}'")


class Alt(Pat):
    """Alternatives, tried in order. Used twice it is one value, spelt in one way."""

    __slots__ = ("options",)

    def __init__(self, *options: Pat) -> None:
        super().__init__()
        self.options = options
        starts = [o.starts for o in options if o.starts is not None]
        self.starts = frozenset().union(*starts) if len(starts) == len(options) else None


class Absent(Pat):
    """An optional input that is left out though later ones are there."""

    __slots__ = ()


class MaybeCast(Alt):
    """A value or a Cast of it. Used twice it is one value too, but one use may have the Cast and the other not."""

    __slots__ = ()


class Op(Pat):
    """A node: positional arguments are its inputs, keywords its attributes or inputs by schema name."""

    __slots__ = ("args", "domain", "keywords", "type")

    def __init__(
        self, type_: str, args: tuple[object, ...], keywords: dict[str, object] | None = None, domain: str = ""
    ) -> None:
        super().__init__()
        self.type = type_
        self.domain = domain
        self.args = tuple(_lift(a) for a in args)
        self.starts = None if type_ in MAY_BE_NOOP else frozenset({(domain, type_)})
        self.keywords = dict(keywords or {})
        if any(isinstance(a, Var) and a.kind == "attr" for a in self.args):
            raise PatternError(f"{self.at}: attr() captures an attribute; pass it to {type_} by keyword")
        for name, want in self.keywords.items():
            if isinstance(want, Pat) and not (isinstance(want, Var) and want.kind == "attr"):
                raise PatternError(
                    f"{self.at}: {type_}'s {name} wants attr() or the value it must have; inputs go by position"
                )

    def label(self) -> str:
        return f"{self.name or self.type} ({self.at})"


@dataclass(frozen=True, eq=False, slots=True)
class Uses:
    """What a pattern says of all uses of one of its values: a list of sub-matches, or whether there are others."""

    of: Pat
    kind: str  # "uses" | "every" | "others"
    at: Location


@dataclass(frozen=True, eq=False, slots=True)
class OtherOutput:
    """A further output of the node that gives one of a pattern's values."""

    of: Pat
    index: int
    at: Location


class _Marker:
    """A named constant of the language, such as LAST."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


LAST: Any = _Marker("LAST")
"""As an axis or axes: −1 or rank − 1, alone."""

FLOAT: Any = _Marker("FLOAT")
"""As Cast's `to`: any floating-point type."""


def _lift(value: object) -> Pat:
    if isinstance(value, Pat):
        return value
    if isinstance(value, int | float):
        return Literal(value)
    raise PatternError(f"{caller()}: a pattern is built from captures, ops and numbers, not from {value!r}")


# The functions below return Any: at class level they initialise fields whose declared type is the type of the
# captured value (`w: Const = const("K N")`), which is what rules and mypy see.


def val(shape: str | None = None) -> Any:
    """Any value. `shape` names its dims, such as "... K"; equal names must agree across the pattern."""
    return Var("value", shape)


def const(shape: str | None = None) -> Any:
    """A constant tensor, seen through Identity, Transpose, Cast and Reshape; leading dims of 1 are dropped to fit."""
    return Var("const", shape)


def scalar(low: float = float("-inf"), high: float = float("inf")) -> Any:
    """A constant of one element within [low, high]; captured as a float."""
    return Var("scalar", None, (low, high))


def attr() -> Any:
    """As a keyword of an op: captures the attribute (its default where it is left out)."""
    return Var("attr")


def absent() -> Any:
    """In place of an input: it is left out. `zero | absent()` takes both; at the end of a node nothing is written."""
    return Absent()


def cast(p: Any) -> Any:
    """`p`, or `p` behind a Cast to a floating-point type."""
    inner = _lift(p)
    return MaybeCast(Op("Cast", (inner,), {"to": FLOAT}), inner)


def uses(value: Any) -> Any:
    """Field `heads: list[Linear] = uses(y)`: the uses of y that match Linear; may be empty."""
    return Uses(_lift(value), "uses", caller())


def every(value: Any) -> Any:
    """Like `uses`, but no match where one use of the value is something else, or it is a graph output."""
    return Uses(_lift(value), "every", caller())


def others(value: Any) -> Any:
    """Field `rest: bool = others(y)`: whether anything but the match and its uses, and Shape nodes, needs y.

    An interior value that a pattern asks this of may be needed elsewhere: the rule makes it anew, or leaves it alone.
    """
    return Uses(_lift(value), "others", caller())


def output(value: Any, index: int) -> Any:
    """Field `total: Value | None = output(y, 3)`: that output of y's node; None where nothing needs it."""
    return OtherOutput(_lift(value), index, caller())


class Pattern:
    """Base of every pattern; an instance is a match, its fields hold what was captured.

    Fields bound to values are `Value` or `Const`, scalars and attributes plain numbers, absent optional parts None.
    """

    if TYPE_CHECKING:
        y: Value
    else:
        y: Any
    root: Node
    """The graph node whose output is `y`."""
    nodes: tuple[Node, ...]
    """Every matched node, root first."""

    captures: ClassVar[dict[str, Pat]] = {}
    fanouts: ClassVar[dict[str, Uses]] = {}
    other_outputs: ClassVar[dict[str, OtherOutput]] = {}
    elements: ClassVar[dict[str, type[Pattern]]] = {}
    """What each `uses` and `every` field is a list of."""
    free_casts: ClassVar[bool] = False
    largest: ClassVar[int]
    """Nodes of the largest match."""
    location: ClassVar[Location]

    def __init_subclass__(cls, free_casts: bool | None = None) -> None:
        """`class P(Pattern, free_casts=True)`: Casts between floating-point types may stand anywhere in a match."""
        cls.location = caller()
        if free_casts is not None:
            cls.free_casts = free_casts
        members = {k: v for base in reversed(cls.__mro__) for k, v in vars(base).items()}
        cls.captures = {k: v for k, v in members.items() if isinstance(v, Pat)}
        cls.fanouts = {k: v for k, v in members.items() if isinstance(v, Uses)}
        cls.other_outputs = {k: v for k, v in members.items() if isinstance(v, OtherOutput)}
        for name, pat in cls.captures.items():
            pat.name = pat.name or name
        if "y" not in cls.captures:
            raise PatternError(f"{cls.location}: pattern {cls.__name__} has no `y`, the expression of its result")
        _check(cls)
        cls.largest = size(cls.captures["y"], largest=True)
        scope = sys._getframe(1)
        cls.elements = dict(cls.elements) | {
            k: _element(cls, k, u, scope) for k, u in vars(cls).items() if isinstance(u, Uses) and u.kind != "others"
        }


def _check(cls: type[Pattern]) -> None:
    """Refuse what cannot be meant: a field that no match fills, an alternative that is never tried."""
    parts = reached(cls.captures["y"])
    roots(cls.captures["y"])
    for name, pat in cls.captures.items():
        if pat not in parts:
            what = "capture" if isinstance(pat, Var) else "expression"
            raise PatternError(f"{pat.at}: {what} '{name}' of {cls.__name__} is not part of `y`")
    asked: dict[str, Uses | OtherOutput] = {**cls.fanouts, **cls.other_outputs}
    for name, field in asked.items():
        if field.of not in parts:
            raise PatternError(f"{field.at}: '{name}' of {cls.__name__} is of a value that is not part of `y`")
    readers = Counter(q for p in parts for q in _parts(p))
    for p in parts:
        for i, option in enumerate(p.options[:-1] if isinstance(p, Alt) else ()):
            if _is_anything(option, readers):
                raise PatternError(
                    f"{p.at}: alternative {i + 1} of {p.label()} is any value, so those behind it are never tried; "
                    "put it last"
                )


def _parts(p: Pat) -> tuple[Pat, ...]:
    if isinstance(p, Op):
        return p.args
    return p.options if isinstance(p, Alt) else ()


def _is_anything(p: Pat, readers: Counter[Pat]) -> bool:
    """Whether nothing can refuse `p`. What is used elsewhere too may be refused there."""
    if readers[p] != 1:
        return False
    if isinstance(p, Alt):
        return any(_is_anything(o, readers) for o in p.options)
    return isinstance(p, Var) and p.kind == "value" and p.dims in (None, ("...",))


def _element(cls: type[Pattern], field: str, fan: Uses, scope: FrameType) -> type[Pattern]:
    """The pattern class `P` of a field annotated `list[P]`, looked up where the class statement stands."""
    note: object = vars(cls).get("__annotations__", {}).get(field)
    if isinstance(note, str):
        try:
            note = eval(note, scope.f_globals, dict(scope.f_locals))
        except NameError as error:
            raise PatternError(f"{fan.at}: {cls.__name__}.{field}: {error}; define it above this class") from None
    args = typing.get_args(note)
    if len(args) == 1 and inspect.isclass(args[0]) and issubclass(args[0], Pattern):
        return args[0]
    raise PatternError(f"{fan.at}: annotate {cls.__name__}.{field} as list[SomePattern]")


def reached(root: Pat) -> set[Pat]:
    """Every expression that `root` is built from; shared ones are visited once."""
    seen: set[Pat] = set()
    todo = [root]
    while todo:
        p = todo.pop()
        if p not in seen:
            seen.add(p)
            todo += _parts(p)
            if isinstance(p, Op):
                todo += [k for k in p.keywords.values() if isinstance(k, Pat)]
    return seen


def roots(p: Pat) -> set[tuple[str, str]]:
    """The (domain, op type) pairs that the root node of `p` can have. PatternError where it can be anything."""
    if isinstance(p, Op):
        return {(p.domain, p.type)}
    if isinstance(p, Alt):
        return set().union(*(roots(o) for o in p.options))
    raise PatternError(f"{p.at}: the root of a pattern must be an op")


def size(p: Pat, bound: Iterable[Pat] = (), largest: bool = False) -> int:
    """How many nodes a match of `p` needs at least (or has at most), not counting what `bound` already covers."""
    return _count(p, frozenset(bound), max if largest else min)[0]


def _count(p: Pat, seen: frozenset[Pat], pick: Callable[..., tuple[int, frozenset[Pat]]]) -> tuple[int, frozenset[Pat]]:
    """Nodes of `p` that are not `seen`, and all that has been seen then: a shared expression is one node."""
    if p in seen:
        return 0, seen
    if isinstance(p, Alt):
        return pick((_count(o, seen, pick) for o in p.options), key=lambda found: found[0])
    if not isinstance(p, Op):
        return 0, seen
    total, seen = 1, seen | {p}
    for a in p.args:
        nodes, seen = _count(a, seen, pick)
        total += nodes
    return total, seen
