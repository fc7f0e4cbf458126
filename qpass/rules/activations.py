"""Lifting activations: every spelling becomes `ir.Activation(x, kind=)`, its product with an up projection
`ir.GatedActivation(gate, up, kind=)`; kinds are the names of `qpass.ops.activation_quantization.Activation`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from qpass.graph import Const, Node, Value
from qpass.rewriter import LIFTED, Domain, Emit, Miss, Pattern, Replacement, attr, ir, need, op, rule, val
from qpass.rewriter.view import domain_of, producer, width
from qpass.rules.norms import in_dtype

MS = Domain("com.microsoft")

CUBIC = 0.044715
ROOT = math.sqrt(2 / math.pi)
_SLOPES = {1.0: "silu", 1.702: "quick_gelu"}


def half(v: Any) -> Any:
    return v * 0.5 | v / 2


def half_of_product(x: Any, t: Any, one_plus_t: Any) -> Any:
    """x · (1 + t) / 2, the half at any place."""
    return half(x) * one_plus_t | half(x * one_plus_t) | x * half(one_plus_t) | x * (half(t) + 0.5)


def negative(v: Any) -> Any:
    return -v | v * -1


def one_plus_exp(v: Any) -> Any:
    """1 + exp(−v), what a sigmoid divides by."""
    return op.Exp(negative(v)) + 1


def sigmoid(v: Any, below: Any) -> Any:
    """sigmoid(v), by the operator or over `below`, which is 1 + exp(−v)."""
    return op.Sigmoid(v) | 1 / below | op.Reciprocal(below)


class Gelu(Pattern, free_casts=True):
    x: Value = val("... K")
    root = op.Sqrt(2) | math.sqrt(2)
    scaled = x / root | x * math.sqrt(0.5)
    mirrored = negative(x) / root | negative(x) * math.sqrt(0.5) | negative(scaled) | x * -math.sqrt(0.5)
    t = op.Erf(scaled)
    y = (
        half_of_product(x, t, t + 1 | 1 - op.Erf(mirrored))  # JAX has it by erfc
        | op.Gelu(x, approximate="none")
        | MS.Gelu(x)
    )


class GeluTanh(Pattern, free_casts=True):
    x: Value = val("... K")
    square = x * x | x**2
    part = x * CUBIC
    cubed = (square * x | x**3) * CUBIC | part * square | part * x * x | square * CUBIC * x
    rising = square * CUBIC + 1
    z = x + cubed | x * rising
    inner = (
        z * ROOT
        | x * ROOT * rising
        | x * (rising * ROOT)
        | x * ROOT + (square * x | x**3) * (CUBIC * ROOT)
        | x * (square * (CUBIC * ROOT) + ROOT)
    )
    t = op.Tanh(inner)
    y = (
        half_of_product(x, t, t + 1)
        | x * op.Sigmoid(z * (2 * ROOT) | inner * 2)  # (1 + tanh z) / 2 = sigmoid(2 z)
        | op.Gelu(x, approximate="tanh")
        | MS.FastGelu(x)
    )


class Silu(Pattern, free_casts=True):
    x: Value = val("... K")
    below = one_plus_exp(x)
    y = x * sigmoid(x, below) | x / below | Domain("").Swish(x, alpha=1.0)


class QuickGelu(Pattern, free_casts=True):
    x: Value = val("... K")
    steeper = x * 1.702
    below = one_plus_exp(steeper)
    y = x * sigmoid(steeper, below) | x / below | Domain("").Swish(x, alpha=1.702)


class QuickGeluNode(Pattern):
    """ONNX Runtime's, which is a SiLU where alpha is 1."""

    x: Value = val("... K")
    alpha: float | None = attr()
    y = MS.QuickGelu(x, alpha=alpha) | MS.QuickGelu(x)


class Relu(Pattern, free_casts=True):
    x: Value = val("... K")
    y = op.Relu(x) | op.Max(x, 0) | op.Clip(x, 0)


class SquaredRelu(Pattern, free_casts=True):
    x: Value = val("... K")
    r = op.Relu(x) | op.Max(x, 0) | op.Clip(x, 0)
    y = r * r | r**2


class Gated(Pattern, free_casts=True):
    x: Value = val("... K")
    up: Value = val("... K")
    kind: str = attr()
    y = ir.Activation(x, kind=kind) * up


class GatedLinearUnit(Pattern, free_casts=True):
    x: Value = val("... K")
    up: Value = val("... K")
    below = one_plus_exp(x)
    y = sigmoid(x, below) * up | up / below


@rule
def lift_gelu(m: Gelu, new: Emit, cfg: object) -> Replacement:
    """x · (1 + erf(x / √2)) / 2, or a Gelu node."""
    return _lifted(new, m, m.x, "gelu")


@rule
def lift_gelu_tanh(m: GeluTanh, new: Emit, cfg: object) -> Replacement:
    """x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2, or a Gelu node that approximates."""
    return _lifted(new, m, m.x, "gelu_tanh")


@rule
def lift_silu(m: Silu, new: Emit, cfg: object) -> Replacement:
    """x · sigmoid(x), or a Swish node."""
    return _lifted(new, m, m.x, "silu")


@rule
def lift_quick_gelu(m: QuickGelu, new: Emit, cfg: object) -> Replacement:
    """x · sigmoid(1.702 · x)."""
    return _lifted(new, m, m.x, "quick_gelu")


@rule
def lift_quick_gelu_node(m: QuickGeluNode, new: Emit, cfg: object) -> Replacement:
    """ONNX Runtime's QuickGelu, with the slope of a SiLU or of a quick GELU."""
    slope = 1.702 if m.alpha is None else m.alpha
    kinds = (kind for known, kind in _SLOPES.items() if math.isclose(slope, known, rel_tol=1e-6))
    kind = next(kinds, "")
    need(kind, f"alpha is {slope:g}; 1 is a SiLU, 1.702 a quick GELU")
    return _lifted(new, m, m.x, kind)


@rule
def lift_relu(m: Relu, new: Emit, cfg: object) -> Replacement:
    """max(x, 0)."""
    return _lifted(new, m, m.x, "relu")


@rule
def lift_squared_relu(m: SquaredRelu, new: Emit, cfg: object) -> Replacement:
    """max(x, 0)²."""
    return _lifted(new, m, m.x, "relu2")


@rule
def lift_gated(m: Gated, new: Emit, cfg: object) -> Replacement:
    """activation(gate) · up, such as SwiGLU and GeGLU."""
    return _gated(new, m, m.x, m.up, m.kind)


@rule
def lift_glu(m: GatedLinearUnit, new: Emit, cfg: object) -> Replacement:
    """sigmoid(gate) · up, where up is not the gate itself: that were a kind of swish."""
    need(not _computed_from(m.x, m.up), "the sigmoid is of what it is multiplied with: a swish of no known slope")
    return _gated(new, m, m.x, m.up, "sigmoid")


def _lifted(new: Emit, m: Pattern, x: Value, kind: str) -> Value:
    """The activation, its x in the dtype of its result where a Cast between them allows that."""
    return new.lifted("Activation", in_dtype(x, m.y), like=m.y, kind=kind)


def _gated(new: Emit, m: Pattern, gate: Value, up: Value, kind: str) -> Value:
    need(not isinstance(up, Const), "it is multiplied with a constant, not with an up projection")
    gate, up = in_dtype(gate, m.y), in_dtype(up, m.y)
    need(gate.dtype == up.dtype, f"the gate is {gate.dtype}, what it is multiplied with {up.dtype}")
    need(same_shape(gate, up), "gate and up are not known to be of one shape: one may be broadcast")
    return new.lifted("GatedActivation", gate, up, like=m.y, kind=kind)


def _computed_from(v: Value | Const, source: Value | Const, nodes: int = 16) -> bool:
    """Whether `v` is `source` or computed from it, by no more than so many nodes and no norm or Linear."""
    source, todo = _uncast(source), [v]
    while todo and nodes:
        v = _uncast(todo.pop())
        if v is source:
            return True
        maker, nodes = producer(v), nodes - 1
        if maker is not None and maker.domain != LIFTED:
            todo += maker.inputs
    return False


def _uncast(v: Value | Const) -> Value | Const:
    while (maker := producer(v)) is not None and maker.op in ("Cast", "Identity") and not domain_of(maker):
        v = maker.inputs[0]
    return v


def same_shape(a: Value | Const, b: Value | Const) -> bool:
    """Whether two values are of one shape for certain, by inference or by how they are made."""
    if a is b or (a.shape is not None and a.shape == b.shape and None not in a.shape):
        return True
    wide = width(a)
    return wide is not None and wide == width(b) and _same_rows(a, b)


def _same_rows(a: Value | Const, b: Value | Const) -> bool:
    """Whether all dims but the last agree."""
    a, b = _rows_of(a), _rows_of(b)
    if a is b:
        return True
    x, y = producer(a), producer(b)
    if x is None or y is None or x.op != "Reshape" or y.op != "Reshape" or domain_of(x) or domain_of(y):
        return False
    return _same_target(x, y) and x.attrs.get("allowzero") == y.attrs.get("allowzero") and same_shape(*_sources(x, y))


def _sources(x: Node, y: Node) -> tuple[Value | Const, Value | Const]:
    return x.inputs[0], y.inputs[0]


def _same_target(x: Node, y: Node) -> bool:
    s, t = x.inputs[1], y.inputs[1]
    return s is t or (isinstance(s, Const) and isinstance(t, Const) and s.load().tolist() == t.load().tolist())


def _rows_of(v: Value | Const) -> Value | Const:
    """The value furthest up that has all dims of `v` but the last."""
    while (node := producer(v)) is not None and keeps_leading(node):
        v = node.inputs[0]
    return v


def keeps_leading(node: Node) -> bool:
    """Whether a node gives its first input's dims, but maybe for the last one."""
    if node.domain == LIFTED:
        return True  # norms, Linears and activations alike
    if domain_of(node):
        return False
    if node.op in ("Cast", "Identity", "Dropout"):
        return True
    if node.op == "Split":
        return _is_last(node.attrs.get("axis", 0), node)
    if node.op == "Slice" and len(node.inputs) > 3:
        axes = node.inputs[3]
        return isinstance(axes, Const) and all(_is_last(a, node) for a in axes.load().ravel().tolist())
    return False


def _is_last(axis: int, node: Node) -> bool:
    shape = node.inputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


LIFT_ACTIVATIONS = (
    lift_gelu,
    lift_gelu_tanh,
    lift_silu,
    lift_quick_gelu,
    lift_quick_gelu_node,
    lift_relu,
    lift_squared_relu,
)
LIFT_GATES = (lift_gated, lift_glu)

_RULES = {r.name for r in (*LIFT_ACTIVATIONS, *LIFT_GATES)}
_TELLING = frozenset({"Erf", "Tanh", "Sigmoid", "Exp", "Activation"})


def telling(misses: Iterable[Miss]) -> list[Miss]:
    """All misses but those of an activation of which only a product or a sum was in sight: any Mul may be that."""
    return [m for m in misses if m.rule not in _RULES or not _TELLING.isdisjoint(n.op for n in m.nodes)]
