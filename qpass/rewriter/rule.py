"""Rules: a function of a match that emits what takes its place, or declines with `need`."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

import numpy as np

from qpass.graph import Const, Given, Lazy, Node, Value
from qpass.ops import DOMAIN, REGISTRY
from qpass.rewriter.location import Location, PatternError, caller
from qpass.rewriter.pattern import LIFTED, Pattern, roots

M = TypeVar("M", bound=Pattern)
C = TypeVar("C")

if TYPE_CHECKING:

    class Outputs(Value):
        """What emitting an op gives: its output, or a tuple of them."""

        def __iter__(self) -> Iterator[Value]: ...


Replacement = Value | Mapping[Value, Value]
"""What a rule returns: the value that replaces the root's, or old value → new value for several."""


class Decline(Exception):
    """A rule's refusal of a match; the graph stays as it was and the reason reaches the ledger."""

    status = "declined"

    def __init__(self, why: str, at: Location) -> None:
        super().__init__(why)
        self.why = why
        self.at = at


class Keep(Decline):
    """The spec asks nothing of this site."""

    status = "kept"


class Exclude(Decline):
    """The spec excludes this site."""

    status = "excluded"


def need(ok: object, why: str) -> None:
    """Decline the match unless `ok`; `why` states what was found, for the ledger and `qpass explain`.

    Raises:
        Decline: `ok` is false.
    """
    if not ok:
        raise Decline(why, caller())


def keep(why: str) -> NoReturn:
    """Leave the site as it is because the spec asks nothing of it."""
    raise Keep(why, caller())


def exclude(why: str) -> NoReturn:
    """Leave the site as it is because the spec excludes it."""
    raise Exclude(why, caller())


@dataclass(frozen=True, eq=False)
class Rule(Generic[M, C]):
    """A pattern and the function that rewrites its matches; made by `@rule`."""

    fn: Callable[[M, Emit, C], Replacement]
    pattern: type[M]
    location: Location
    emits: frozenset[str] = frozenset()  # op types rooting a rule of its own stage that it may emit
    respells: bool = False  # what it emits goes back at the end unless a later rule claims a part of it

    @property
    def name(self) -> str:
        return self.fn.__name__

    @property
    def benefit(self) -> int:
        """Within a stage larger patterns win."""
        return self.pattern.largest

    @property
    def roots(self) -> set[tuple[str, str]]:
        """The (domain, op type) pairs of the nodes that a match can have as its root."""
        casts = {("", "Cast")} if self.pattern.free_casts else set()
        return roots(self.pattern.captures["y"]) | casts

    @property
    def summary(self) -> str:
        """First paragraph of the docstring."""
        return " ".join((inspect.getdoc(self.fn) or "").partition("\n\n")[0].split())


def rule(fn: Callable[[M, Emit, C], Replacement]) -> Rule[M, C]:
    """Make a rule of a function whose first parameter is annotated with its pattern class.

    Raises:
        PatternError: the first parameter is not annotated with a Pattern.
    """
    code = fn.__code__
    at = Location(code.co_filename, code.co_firstlineno)
    first = next(iter(inspect.signature(fn).parameters), "")
    # rules may be defined inside a function (tests do), where annotations name that function's locals
    frame = inspect.currentframe()
    local = frame.f_back.f_locals if frame is not None and frame.f_back is not None else {}
    pattern = typing.get_type_hints(fn, None, local).get(first)
    if not (inspect.isclass(pattern) and issubclass(pattern, Pattern)):
        raise PatternError(f"{at}: annotate the first parameter of {fn.__name__} with a Pattern class")
    return Rule(fn, cast("type[M]", pattern), at)


def respelling(r: Rule[M, C]) -> Rule[M, C]:
    """Over `@rule`: it says the same in other nodes, which go back unless a later rule claims one of them."""
    return replace(r, respells=True)


def emitting(*op_types: str) -> Callable[[Rule[M, C]], Rule[M, C]]:
    """Over `@rule`: it may emit these, though they root rules of its stage, which leaves the new ones alone."""
    return lambda r: replace(r, emits=r.emits | set(op_types))


@dataclass(eq=False)
class Draft:
    """A node to be: it becomes part of the graph only when its rule has succeeded."""

    op: str
    domain: str
    inputs: list[Value | Const]
    attrs: dict[str, Any]
    outputs: list[Value]
    site: Node
    """The matched node that it is emitted for: gives it its name, and its place in the ledger."""
    absent: set[Value] = field(default_factory=set)
    """Outputs that it does not have: they get no name."""


@dataclass
class Emit:
    """Builds nodes for one match.

    `new.SmoothQuantGemm(q, weight, …)` emits a qpass op by its declaration in `qpass.ops`: inputs by position or by
    name, absent ones None; flags such as `has_bias` follow from what is there. `new.onnx("Reshape", …)` emits a
    standard op, `new.lifted("Linear", …)` an in-memory one. Arrays and lazy arrays become initializers.
    """

    constant: Callable[[Lazy, str], Const]
    """Makes (or finds) the initializer of a lazy array; the second argument is a name to start from."""
    site: Node
    label: Callable[[Node], str]
    drafts: list[Draft] = field(default_factory=list)
    shape_of: dict[Value, Value] = field(default_factory=dict)
    notes: dict[Node, str] = field(default_factory=dict)

    def at(self, m: Pattern) -> Emit:
        """The same emitter for another part of the match: what it emits is named for, and accounted to, `m`."""
        return replace(self, site=m.root)

    def note(self, text: str) -> None:
        """A remark on the site for the ledger, such as why it was not smoothed."""
        self.notes[self.site] = text

    def __getattr__(self, op_type: str) -> Callable[..., Outputs]:
        if op_type not in REGISTRY:
            raise AttributeError(f"qpass has no op '{op_type}'; it has {', '.join(sorted(REGISTRY))}")

        def build(*args: Any, outputs: str | None = None, **keywords: Any) -> Any:
            return self._qpass(op_type, args, outputs, keywords)

        return build

    def onnx(
        self,
        op_type: str,
        *inputs: Any,
        dtype: Any = None,
        shape: Any = None,
        like: Value | None = None,
        domain: str = "",
        **attrs: Any,
    ) -> Value:
        """A standard ONNX node (or one of another domain) with one output of the given dtype and shape, or `like`'s."""
        dtype, shape = (dtype, shape) if like is None else (like.dtype, like.shape)
        (out,) = self.nodes(op_type, inputs, [(dtype, shape)], domain, **attrs)
        return out

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[Any],
        outputs: Sequence[tuple[Any, Any] | None],
        domain: str = "",
        **attrs: Any,
    ) -> list[Value]:
        """A node with several outputs, each given as (dtype, shape); absent inputs and outputs are None."""
        hints = [f"{op_type}.{k}" for k in range(len(inputs))]
        values = [Value("") if i is None else self._input(i, h) for i, h in zip(inputs, hints, strict=True)]
        made = [Value("") if o is None else Value("", dtype=o[0], shape=o[1]) for o in outputs]
        absent = {v for v, o in zip(made, outputs, strict=True) if o is None}
        self.drafts.append(Draft(op_type, domain, values, attrs, made, self.site, absent))
        return made

    def lifted(self, op_type: str, *inputs: Value | Const | None, like: Value, **attrs: Any) -> Value:
        """An in-memory node that stands for a whole norm or Linear; its output has dtype and shape of `like`."""
        # views stay views: a lifted node is never written
        values = [_without_identities(i) if isinstance(i, Const) else i for i in inputs if i is not None]
        out = Value("", dtype=like.dtype, shape=like.shape)
        self.drafts.append(Draft(op_type, LIFTED, values, attrs, [out], self.site))
        return out

    def same_shape(self, old: Value, like: Value) -> None:
        """Shape nodes that read `old`, which goes, read `like` instead, a value of the same shape."""
        self.shape_of[old] = like

    def _qpass(self, op_type: str, args: Sequence[Any], outputs: str | None, keywords: dict[str, Any]) -> Any:
        op = REGISTRY[op_type]
        names = [i.name for i in op.inputs]
        if len(args) > len(names):
            raise PatternError(f"{caller()}: {op_type} takes {len(names)} inputs, got {len(args)}")
        given = dict(zip(names, args, strict=False))
        for n in names:
            if n in keywords and n in given:
                raise PatternError(f"{caller()}: {op_type} got '{n}' by position and by name")
        given |= {n: keywords.pop(n) for n in names if n in keywords}
        tensors = {n: self._input(given[n], f"{op_type}.{n}") for n in names if given.get(n) is not None}
        wanted = outputs.split() if outputs is not None else [o.name for o in op.outputs if not o.optional]
        try:
            attrs = op.attributes_for(set(tensors), set(wanted), keywords)
            kinds = [self._kind(op_type, n, tensors[n]) if n in tensors else None for n in names]
            made = [Value("", dtype=d, shape=s) for d, s in op.infer(kinds, attrs)]
        except ValueError as error:
            raise PatternError(f"{caller()}: {error}") from error
        self.drafts.append(Draft(op_type, DOMAIN, list(tensors.values()), attrs, made, self.site))
        return made[0] if len(made) == 1 else tuple(made)

    @staticmethod
    def _kind(op_type: str, name: str, v: Value | Const) -> tuple[Any, Any]:
        if v.dtype is None:
            raise ValueError(f"{op_type}: {name} is '{v.name}', whose dtype is not known; decline such a match")
        return v.dtype, v.shape

    def _input(self, x: Any, hint: str) -> Value | Const:
        if isinstance(x, Const):
            return x if x.root is x else self.constant(x.array, x.name)
        if isinstance(x, Value):
            return x
        array = x if isinstance(x, Lazy) else Given(np.asarray(x))
        return self.constant(array, f"{self.label(self.site)}.{hint.rpartition('.')[2]}")


def derived(c: Const, array: Lazy) -> Const:
    """A constant computed from `c`, which stays known as its origin (for names, the ledger and shared weights)."""
    # `via` tells views of one tensor apart; what is computed anew is like none of the others
    step = Node("Derived", attrs={"serial": next(_SERIAL)})
    return Const(c.name, array, root=c.root, via=(*c.via, step))


def transposed(c: Const) -> Const:
    """A matrix seen the other way round, as through a Transpose node."""
    step = Node("Transpose", attrs={"perm": [1, 0]})
    return Const(c.name, c.array.T, root=c.root, via=(*c.via, step))


def _without_identities(c: Const) -> Const:
    """The same view; whether Identity nodes led to it tells no views apart."""
    via = tuple(n for n in c.via if n.op != "Identity")
    return c if len(via) == len(c.via) else Const(c.name, c.array, root=c.root, via=via)


_SERIAL = count()
