"""What rules ask of the spec, the weights and the calibration: the `cfg` of every quantizing rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qpass.calibrate import ActivationStats, Stats
from qpass.errors import QpassError
from qpass.graph import Blockwise, Const, Given, Joined, Kept, Lazy, Node, Value, rows_of
from qpass.graph.dtypes import to_onnx
from qpass.quant_mode import QuantMode
from qpass.quantize import weight as numbers
from qpass.quantize.activation import scale_of
from qpass.rewriter import Pattern, derived, exclude, keep, need
from qpass.rewriter.ledger import WEIGHTED_KINDS
from qpass.rules.linears import Linear
from qpass.rules.quantized_linears import Static, static
from qpass.rules.sites import Found, Survey
from qpass.rules.smoothing import Choice, choose
from qpass.rules.stored import StoredWeight, find, stored
from qpass.rules.weights import BLOCK, blocks, naming
from qpass.spec import LinearSpec, QuantSpec

INT8, FLOAT32 = np.dtype(np.int8), np.dtype(np.float32)


@dataclass(frozen=True)
class QuantizedWeight:
    """Promises of a quantized weight, [N, K] or packed [N, K/2], with what dequantizes it."""

    weight: Lazy
    scale: Lazy
    zero: Lazy | None = None


@dataclass(frozen=True)
class Activation:
    """How one activation is quantized, for all Linears that read it."""

    smoother: Lazy | None
    """float32 [K]; the activation is divided by it, the weights are multiplied."""
    scale: Lazy | None
    """float32 [1], static; None for a scale per token."""
    note: str
    zero: Lazy | None = None
    """int8 [1], of a static scale that the model came with."""

    def folded(self, c: Const | None) -> Const | None:
        """A norm's gamma or beta, divided by the smoother."""
        if c is None or self.smoother is None:
            return c
        return derived(c, c.array.astype(FLOAT32) / self.smoother)


class Quantizer:
    """Resolves the spec for every Linear and every stack of experts of a model and promises quantized weights.

    Args:
        rewritten_before: some sites are plugin nodes already, so a filter that matches nothing is no mistake.

    Raises:
        QpassError: a filter of the spec that matches nothing, or static scales asked for without statistics.
    """

    def __init__(self, spec: QuantSpec, survey: Survey, stats: Stats | None, *, rewritten_before: bool = False) -> None:
        self._survey = survey
        self._stats = stats
        self._remarks: Counter[str] = Counter()
        resolver = spec.resolver()
        self._specs: dict[Found, LinearSpec | str] = {}
        self._notes: dict[Found, str] = {}
        self._place = {f: i for i, f in enumerate(survey.found)}
        self._excluded_norms: dict[Node, str] = {}
        for f in survey.found:
            may_plug = spec.norm_plugins and f.site.kind == "norm"
            if may_plug and f.lifted is not None and (why := resolver.norm(f.names)) is not None:
                self._excluded_norms[f.lifted] = why
            if f.site.kind in WEIGHTED_KINDS:
                resolved = resolver.linear(f.names)
                if f.lifted is not None:
                    self._specs[f] = resolved
                    if f.site.kind == "experts":
                        self._specs[f], self._notes[f] = _weights_alone(resolved)
        try:
            resolver.check()
        except QpassError as error:
            if not rewritten_before:
                raise
            self._remarks[f"{error} (what a filter is for may be rewritten already)"] += 1
        self._weights: dict[Any, QuantizedWeight] = {}
        self._stored: dict[Any, StoredWeight | str | None] = {}
        self._activations: dict[Any, Activation] = {}
        linears = (f for f in self._specs if f.site.kind == "linear")
        wanted = (self._activation_quantization(f.lifted, f.weight) for f in linears if f.lifted and f.weight)
        if stats is None and any(isinstance(s, LinearSpec) and s.needs_calibration for s in wanted):
            raise QpassError(
                f"{spec.name} needs activation statistics for its static scales; make them with "
                "`qpass calibrate MODEL --data FOLDER -o stats.npz` and pass --calibration stats.npz"
            )

    # -- the spec

    def spec(self, m: Linear | Pattern) -> LinearSpec:
        """What the spec wants of a lifted Linear, or of lifted experts.

        Raises:
            Exclude, Keep: it excludes the site, or asks nothing of it.
        """
        resolved = self.spec_of(m)
        if isinstance(resolved, str):
            exclude(resolved)
        if not resolved.mode:
            keep("the spec leaves it in full precision")
        return resolved

    def spec_of(self, m: Linear | Pattern) -> LinearSpec | str:
        """What the spec says of a lifted Linear or of lifted experts: the settings, or why it is excluded."""
        return self._specs[self._survey.by_lifted[m.root][0]]

    def check_norm(self, norm: Node) -> None:
        """Raise Exclude where the spec leaves a lifted norm as it is."""
        if (why := self._excluded_norms.get(norm)) is not None:
            exclude(why)

    def in_order(self, heads: Sequence[Linear]) -> list[Linear]:
        """Linears in the order of the model."""
        return sorted(heads, key=lambda h: self._place[self._survey.by_lifted[h.root][0]])

    @property
    def merges_siblings(self) -> bool:
        """Whether any Linear is to be merged with those on the same input."""
        return any(s.merge_siblings for s in self._specs.values() if not isinstance(s, str))

    @property
    def quantizes_activations(self) -> bool:
        """Whether the spec quantizes the activations of any Linear."""
        return any(isinstance(s, LinearSpec) and s.mode.has_act_and_weight_quant() for s in self._specs.values())

    def note(self, m: Pattern) -> str:
        """What the ledger should say of how the spec was applied to a site."""
        return self._notes.get(self._survey.by_lifted[m.root][0], "")

    def quantized_alike(self, heads: Sequence[Linear]) -> list[Linear]:
        """Of Linears on one activation, those that quantize it as the first does that quantizes it at all."""
        wanted: LinearSpec | Static | None = None
        out = []
        for h in heads:
            how = self.activation_quantization(h)
            wanted = wanted or how
            if how is not None and how == wanted:
                out.append(h)
        return out

    def activation_quantization(self, m: Linear) -> LinearSpec | Static | None:
        """How the activation that a Linear reads is quantized: as the model came, or by the spec; None if it is not.

        A weight that came quantized is not smoothed, which would change its integers.
        """
        return self._activation_quantization(m.root, m.w)

    def _activation_quantization(self, linear: Node, w: Const) -> LinearSpec | Static | None:
        sites = self._survey.by_lifted.get(linear)
        s = self._specs.get(sites[0]) if sites else None
        if not isinstance(s, LinearSpec) or not s.mode:
            return None
        came = self._came(w)
        if came is None:
            return s if s.mode.has_act_and_weight_quant() else None
        if isinstance(came, str) or not came.is_symmetric_int8:
            return None
        if (given := static(linear)) is not None:
            return given
        return s.model_copy(update={"smoothing": None}) if s.mode.has_act_and_weight_quant() else None

    def remarks(self) -> list[str]:
        """What a user should know of the whole run."""
        return list(self._remarks)

    # -- dtypes and constants

    def onnx_dtype(self, v: Value) -> int:
        """A value's TensorProto type."""
        need(v.dtype is not None, f"the dtype of '{v.name}' is not known")
        assert v.dtype is not None
        return to_onnx(v.dtype)

    def like(self, c: Const | None, v: Value) -> Const | None:
        """A constant in a value's dtype."""
        if c is None or c.dtype == v.dtype:
            return c
        assert v.dtype is not None
        return derived(c, c.array.astype(v.dtype))

    def bias(self, m: Linear) -> Const | None:
        """The Linear's bias in the dtype of its output."""
        return self.like(m.b, m.y)

    def corrected_bias(self, m: Linear, act: Activation, w: QuantizedWeight | StoredWeight) -> Const:
        """The bias with what the activation's zero point adds to the sums taken out: the int8 GEMM knows of none.

        Σ (q - zero) · w · scale_a · scale_w[n] = (Σ q · w - zero · Σ w) · scale_a · scale_w[n], float32.
        """
        assert act.zero is not None
        assert act.scale is not None
        assert m.y.dtype is not None
        zero, scale, (n, _) = act.zero, act.scale, w.weight.shape

        def make() -> Any:
            step = max(1, BLOCK // max(m.w.shape[0], 1))
            sums = [w.weight.rows(i, min(i + step, n)).sum(axis=1, dtype=np.int64) for i in range(0, n, step)]
            total = -np.concatenate(sums) * int(zero.load()[0]) * (scale.load().astype(np.float64) * w.scale.load())
            return (total if m.b is None else total + m.b.load().reshape(-1)).astype(FLOAT32)

        array = Kept((n,), FLOAT32, make).astype(m.y.dtype)
        return derived(m.b, array) if m.b is not None else Const(f"{m.w.origin}.bias", array)

    # -- weights: promises of [N, K]

    def came(self, m: Linear) -> StoredWeight | None:
        """The weight of a Linear as the model came with it, where that was quantized.

        Raises:
            Decline: it was, in a way that no op of qpass has.
        """
        found = self._came(m.w)
        need(not isinstance(found, str), str(found))
        assert not isinstance(found, str)
        return found

    def came_quantized(self, m: Linear) -> bool:
        """Whether the model came with integers for a Linear's weight, be they of use or not."""
        return self._came(m.w) is not None

    def _came(self, w: Const) -> StoredWeight | str | None:
        key = _view_of(w)
        if key not in self._stored:
            self._stored[key] = stored(w)
        return self._stored[key]

    def int8(self, w: Const, smoother: Lazy | None = None, per_channel: bool = True) -> QuantizedWeight:
        """int8 of w [K, N], of w · smoother where there is one: scale [N], or [1] where not per output channel."""
        k, n = w.shape

        def make() -> QuantizedWeight:
            s = None if smoother is None else smoother.load()
            if per_channel:
                results = [((n, k), INT8), ((n,), FLOAT32)]
                return QuantizedWeight(*self._promise(w, lambda b: numbers.int8_per_channel(b, s), results))
            scale = Kept((1,), FLOAT32, lambda: self._tensor_scale(w, s))
            (q,) = self._promise(w, lambda b: numbers.int8_per_tensor(b, scale.load(), s), [((n, k), INT8)], [scale])
            return QuantizedWeight(q, scale)

        return self._cached((_view_of(w), "int8", id(smoother), per_channel), make)

    @staticmethod
    def _tensor_scale(w: Const, smoother: Any) -> Any:
        """amax / 127 of a whole weight, float32 [1]; streams it once."""
        with naming(w):
            return scale_of(np.max([numbers.amax(b, smoother=smoother) for b in blocks(w)], axis=0, initial=0))

    def int4(self, w: Const, spec: LinearSpec) -> QuantizedWeight:
        """Packed int4 per output channel of w [K, N]."""
        k, n = w.shape

        def make() -> QuantizedWeight:
            results = [((n, k // 2), INT8), ((n,), FLOAT32)]
            return QuantizedWeight(*self._promise(w, lambda b: numbers.int4_per_channel(b, spec.rounding), results))

        return self._cached((_view_of(w), "int4", spec.rounding), make)

    def int4_groups(self, w: Const, spec: LinearSpec) -> QuantizedWeight:
        """Packed int4 with a scale, and maybe a zero point, for each group of K of w [K, N]."""
        k, n = w.shape
        group = spec.group_size
        per_group = (n, k // group)

        def make() -> QuantizedWeight:
            results = [((n, k // 2), INT8), (per_group, FLOAT32), *([(per_group, INT8)] if spec.zero_point else [])]
            groups = self._promise(
                w, lambda b: numbers.int4_groupwise(b, group, spec.rounding, spec.zero_point), results
            )
            return QuantizedWeight(*groups)

        return self._cached((_view_of(w), "groups", group, spec.rounding, spec.zero_point), make)

    def experts(self, w: Const, spec: LinearSpec) -> QuantizedWeight:
        """A stack w [E, N, K], quantized like E Linears: weight [E, N, K] (or K/2), scale [E, N] or [E, N, groups]."""
        e, n, k = w.shape
        matrices = Joined([w.array.cut(i, i + 1).reshape(n, k) for i in range(e)])  # each is streamed by itself
        rows = Const(w.name, matrices.T, root=w.root, via=(*w.via, Node("Reshape", attrs={"stack": e})))
        if spec.mode.is_int8_weight_only():
            q = self.int8(rows)
        else:
            q = self.int4_groups(rows, spec) if spec.mode.has_per_group_scaling() else self.int4(rows, spec)

        def stacked(a: Lazy) -> Lazy:
            return a.reshape(e, n, *a.shape[1:])

        def make() -> QuantizedWeight:
            return QuantizedWeight(stacked(q.weight), stacked(q.scale), None if q.zero is None else stacked(q.zero))

        return self._cached(("stacked", id(q.weight)), make)

    def _cached(self, key: Any, make: Callable[[], QuantizedWeight]) -> QuantizedWeight:
        """Linears that share a weight share its quantized form too."""
        if key not in self._weights:
            self._weights[key] = make()
        return self._weights[key]

    def _promise(
        self,
        w: Const,
        fn: Callable[[Any], tuple[Any, ...]],
        results: Sequence[tuple[tuple[int, ...], Any]],
        needs: Sequence[Lazy] = (),
    ) -> tuple[Lazy, ...]:
        """The results of `fn` over blocks [n, K] of the output channels of w [K, N]."""

        def quantize(block: Any) -> tuple[Any, ...]:
            with naming(w):
                return fn(block)

        return Blockwise(w.array.T, quantize, results, w.origin, needs).results

    # -- activations

    def activation(self, x: Value, heads: Sequence[Linear]) -> Activation:
        """Smoother and static scale of an activation, chosen for all Linears that read it.

        Raises:
            Decline: static scales are wanted and there are no statistics of it.
        """
        key = (id(x), tuple(id(h.root) for h in heads))
        if key not in self._activations:
            self._activations[key] = self._decide(x, heads)
        return self._activations[key]

    def _decide(self, x: Value, heads: Sequence[Linear]) -> Activation:
        spec = self.activation_quantization(heads[0])
        if isinstance(spec, Static):
            zero = np.array([spec.zero], np.int8) if spec.zero else None
            scale = Given(np.array([spec.scale], np.float32))
            return Activation(None, scale, "static scale from the model", None if zero is None else Given(zero))
        assert spec is not None
        stats = self._stats_of(x, heads)
        static = spec.needs_calibration
        need(not static or stats is not None, f"the calibration has no statistics of '{x.name}'")
        if stats is None:
            if spec.smoothing is not None:
                self._remarks["without calibration nothing is smoothed; `qpass calibrate` makes statistics"] += 1
            return Activation(None, None, "")
        foreign = self._shared_outside(heads)
        if foreign is not None:
            spec = spec.model_copy(update={"smoothing": None})
        # merged or not, the same weights decide
        weights = [f.weight for h in heads for f in self._survey.by_lifted[h.root] if f.weight is not None]
        choice: Choice = choose(stats, weights, spec)
        note = f"unsmoothed: its weight is also used by '{foreign}'" if foreign is not None else choice.note
        return Activation(
            None if choice.smoother is None else Given(choice.smoother),
            None if choice.scale is None else Given(np.array([choice.scale], np.float32)),
            note,
        )

    def _stats_of(self, x: Value, heads: Sequence[Linear]) -> ActivationStats | None:
        if self._stats is None:
            return None
        names = [x.name, *(h.x.name for h in heads)]
        return next((s for n in names if (s := self._stats.get(n)) is not None), None)

    def _shared_outside(self, heads: Sequence[Linear]) -> str | None:
        """A Linear outside `heads` that uses one of their weights; both could not have their own smoother."""
        mine = [f for h in heads for f in self._survey.by_lifted[h.root]]
        for f in mine:
            if f.weight is None:
                continue
            start, stop = rows_of(f.weight)
            for other in self._survey.sharers[id(f.weight.root)]:
                first, last = rows_of(other.weight or f.weight)
                if other not in mine and start < last and first < stop:
                    return other.site.name
        return None


def _weights_alone(spec: LinearSpec | str) -> tuple[LinearSpec | str, str]:
    """What experts get of a spec, and a remark where that is not all of it."""
    if isinstance(spec, str) or not spec.mode.has_act_and_weight_quant():
        return spec, ""
    note = "weights alone, int8 per output channel: each token has experts of its own, so activations stay as they are"
    return LinearSpec(mode=QuantMode.use_weight_only()), note


def _view_of(w: Const) -> Any:
    """What tells two views of a tensor apart: its root, the nodes between, the scales if it is quantized, the shape."""
    quantized = find(w.array)
    scales = () if quantized is None else tuple(map(id, quantized.sources))
    return id(w.root), tuple((n.op, str(n.attrs)) for n in w.via), scales, w.shape
