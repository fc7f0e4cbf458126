"""Original against rewritten: both models run on the same samples, and their outputs are compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

from qpass.calibrate.plan import Tap, plan
from qpass.calibrate.sources import Batch, Samples, Source, source_of
from qpass.calibrate.synthetic import Synthetic
from qpass.calibrate.tokens import Mask, Tokens
from qpass.errors import QpassError
from qpass.graph import Model, Value, every_call
from qpass.graph.dtypes import to_numpy
from qpass.ops import DOMAIN
from qpass.rewriter import Ledger
from qpass.runtime import Runner, inputs_of, load

Array = NDArray[Any]

MEMORY = 512 << 20
_BLOCK = 1 << 18  # elements that are compared at a time
_JUMP = 4.0  # what multiple of the largest error so far counts as a jump
_FLOOR = 0.01  # below this no error counts as large


@dataclass
class Difference:
    """How far one array is from another, gathered over any number of pairs.

    What is not finite must be the same in both: `strays` counts where it is not, and any stray makes the
    cosine 0 and the relative error infinite.
    """

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    max_abs: float = 0.0
    equal: int = 0
    count: int = 0
    strays: int = 0

    @classmethod
    def of(cls, a: Array, b: Array) -> Difference:
        """Of `b` from `a`, of one shape and any dtypes, computed in fp64."""
        result = cls()
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        for start in range(0, a.size, _BLOCK):
            result._add(flat_a[start : start + _BLOCK], flat_b[start : start + _BLOCK])
        return result

    def _add(self, a: Array, b: Array) -> None:
        x, y = a.astype(np.float64), b.astype(np.float64)
        self.count += x.size
        self.equal += int(np.count_nonzero(a == b))
        good = np.isfinite(x) & np.isfinite(y)
        if not good.all():
            self.strays += int(np.count_nonzero(~good & ~((x == y) | (np.isnan(x) & np.isnan(y)))))
            x, y = np.where(good, x, 0), np.where(good, y, 0)
        d = x - y
        # einsum and not dot: BLAS threads and those of ONNX Runtime get in each other's way
        self.aa += float(np.einsum("i,i", x, x))
        self.bb += float(np.einsum("i,i", y, y))
        self.ab += float(np.einsum("i,i", x, y))
        self.dd += float(np.einsum("i,i", d, d))
        self.max_abs = max(self.max_abs, float(np.abs(d).max(initial=0)))

    def __iadd__(self, other: Difference) -> Difference:
        for name in ("aa", "bb", "ab", "dd", "equal", "count", "strays"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_abs = max(self.max_abs, other.max_abs)
        return self

    @property
    def cosine(self) -> float:
        """1 where both are zero throughout, 0 where one is."""
        if self.strays:
            return 0.0
        if self.dd == 0:
            return 1.0
        if self.aa == 0 or self.bb == 0:
            return 0.0
        return max(-1.0, min(1.0, self.ab / math.sqrt(self.aa) / math.sqrt(self.bb)))

    @property
    def relative_error(self) -> float:
        """‖a − b‖ / ‖a‖."""
        if self.strays:
            return math.inf
        if self.aa == 0:
            return 0.0 if self.dd == 0 else math.inf
        return math.sqrt(self.dd / self.aa)

    @property
    def share_equal(self) -> float:
        """The share of elements that are the same."""
        return self.equal / self.count if self.count else 1.0


@dataclass(frozen=True)
class OutputReport:
    """One output of the model over all samples.

    cosine: mean and worst over the samples, of floats. equal: share of equal values, of everything else.
    relative_error: ‖a − b‖ / ‖a‖ over all samples together. strays: values that are NaN or infinite in one
    model and not the same in the other. worst_sample: where the worst cosine is.
    """

    name: str
    dtype: str
    cosine: float | None
    worst_cosine: float | None
    worst_sample: str | None
    relative_error: float
    max_abs: float
    equal: float
    strays: int

    @property
    def likeness(self) -> float:
        """What the minimum is asked of: the worst cosine, or for what is no float the share of equal values."""
        return self.equal if self.worst_cosine is None else self.worst_cosine


@dataclass(frozen=True)
class SiteReport:
    """One site's output tensor, over all samples together. `op` is what the rewrite put there, None if nothing."""

    name: str
    tensor: str
    kind: str
    op: str | None
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class Report:
    """How a rewritten model compares with its original.

    inputs: what both ran on. sites: of `layers`, in the order of the graph. parted: the first of them where
    the relative error exceeds `threshold` or jumps.
    """

    original: Path
    rewritten: Path
    inputs: str
    samples: int
    mask: str | None
    minimum: float
    outputs: tuple[OutputReport, ...]
    sites: tuple[SiteReport, ...] = ()
    parted: SiteReport | None = None
    threshold: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every output reaches the minimum on every sample."""
        return all(o.likeness >= self.minimum for o in self.outputs)

    def worst_sites(self, count: int = 5) -> list[SiteReport]:
        """The sites with the largest relative errors, the worst first."""
        return sorted(self.sites, key=lambda s: -s.relative_error)[:count]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that JSON lacks are None."""
        document = asdict(self) | {"passed": self.passed}
        result: dict[str, Any] = plain(document)
        return result


def plain(value: Any) -> Any:
    """As JSON has it."""
    match value:
        case dict():
            return {k: plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
    return value


def verify(
    original: Path,
    rewritten: Path,
    *,
    data: Path | Sequence[Path] | Source | None = None,
    layers: bool = False,
    minimum: float = 0.99,
    threshold: float = 0.5,
    mask: str | None = None,
    ledger: Path | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Run two models on the same samples in ONNX Runtime and compare their outputs.

    Padding is left out as in `calibrate`. ONNX Runtime keeps to optimisations that leave the numbers as the
    models say.

    Args:
        original: the model as it was.
        rewritten: the model that `qpass rewrite` made of it.
        data: .npz files keyed by input name, folders of them, or another source; None for made-up inputs.
        layers: compare the outputs of all sites of the ledger too, to find the first where the models part.
        minimum: the least cosine similarity that passes, on every sample and output.
        threshold: the relative error of a site beyond which the models have parted there, as they have where
            it jumps to a multiple of what it was before.
        mask: the input that says which tokens count; by default attention_mask, if any.
        ledger: by default the file beside the rewritten model. Without one, the sites are the outputs of
            qpass nodes that the original has too.
        seed: of made-up inputs.
        memory: bound in bytes on the tensors compared at a time.
        progress: called with samples done and in all.

    Raises:
        QpassError: a model or the data cannot be used, or the models have different inputs or outputs.
    """
    original, rewritten = Path(original), Path(rewritten)
    before, after = Model.load(original, every_call if layers else None), load(rewritten)
    check_interface(before.proto, after, rewritten)
    notes: list[str] = []
    source = Synthetic(before.proto, seed=seed) if data is None else source_of(data)
    samples = Samples(source, inputs_of(before.proto), notes.append)
    tokens = Tokens(before.proto, mask)
    sites = _sites(before.proto, after, rewritten, ledger, notes) if layers else []
    outputs = [v for v in before.proto.graph.output if is_numbers(v)]
    notes += [f"output '{v.name}' is no tensor of numbers and not compared" for v in before.proto.graph.output
              if not is_numbers(v)]  # fmt: skip
    names = dict.fromkeys([*(s.tensor for s in sites), *(o.name for o in outputs)])
    layout = plan(_taps(before, names), samples, memory // 2)

    comparison = Comparison(tokens, outputs)
    runners = [Runner(p, m, layout.groups, optimize=False) for p, m in ((original, before.proto), (rewritten, after))]
    for batch in samples.batches(layout.limits.__getitem__):
        for groups in zip(*(r.run(batch.feeds, batch.name) for r in runners), strict=True):
            comparison.take(batch, *groups)
        if progress is not None:
            progress(batch.start + batch.size, samples.total)
    if not samples.total:
        raise QpassError("the data holds no sample; add some")

    found = [
        SiteReport(s.name, s.tensor, s.kind, s.op, d.cosine, d.relative_error)
        for s in sites
        if (d := comparison.whole.get(s.tensor)) is not None
    ]
    return Report(
        original, rewritten, str(source), samples.total, tokens.name, minimum,
        outputs=comparison.reports(),
        sites=tuple(found), parted=_first_parted(found, threshold), threshold=threshold, notes=tuple(notes),
    )  # fmt: skip


def _first_parted(sites: Sequence[SiteReport], threshold: float) -> SiteReport | None:
    """The first site that is off by more than the threshold, or by a multiple of all that came before it.

    Errors add up from layer to layer, so what counts as much is told by the sites before. The first of those
    is as good as the least error that quantizing a Linear costs anywhere in this model.
    """
    linear = [s.relative_error for s in sites if s.op is not None and s.kind in ("linear", "node")]
    highest = max(_FLOOR, min(linear, default=_FLOOR))
    for site in sites:
        if site.relative_error > min(threshold, _JUMP * highest):
            return site
        highest = max(highest, site.relative_error)
    return None


class Comparison:
    """The differences of all tensors between two runs, gathered batch by batch.

    Args:
        outputs: of the model; they are compared sample by sample, any other tensor as a whole.
    """

    def __init__(self, tokens: Tokens, outputs: Sequence[ValueInfoProto]) -> None:
        self.tokens, self.outputs, self.by_token = tokens, {o.name for o in outputs}, _token_outputs(outputs)
        self.whole: dict[str, Difference] = {}
        self.cosines: dict[str, list[tuple[float, str]]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}

    def take(self, batch: Batch, a: dict[str, Array], b: dict[str, Array]) -> None:
        """One group of tensors of a batch."""
        mask = self.tokens.mask(batch.feeds)
        for name, x in a.items():
            y = b[name]
            if x.shape != y.shape:
                raise QpassError(
                    f"'{name}' has shape {list(x.shape)} in the original and {list(y.shape)} in the rewritten model, "
                    f"in {batch.name}: they are not of the same network"
                )
            leading = x.shape if name in self.by_token else x.shape[:-1]
            counts = self.tokens.over(name, leading, mask, batch.feeds)
            whole = self.whole.setdefault(name, Difference())
            self.dtypes[name] = x.dtype
            for sample, p, q in _samples(batch, x, y, counts, name in self.outputs):
                difference = Difference.of(p, q)
                whole += difference
                if name in self.outputs:
                    self.cosines.setdefault(name, []).append((difference.cosine, sample))

    def reports(self) -> tuple[OutputReport, ...]:
        """Each output over everything taken."""
        return tuple(self._report(name) for name in self.whole if name in self.outputs)

    def _report(self, name: str) -> OutputReport:
        d, dtype = self.whole[name], self.dtypes[name]
        cosine = worst = sample = None
        if dtype.kind == "f":
            values = [c for c, _ in self.cosines[name]]
            cosine, (worst, sample) = math.fsum(values) / len(values), min(self.cosines[name])
        return OutputReport(
            name, str(dtype), cosine, worst, sample, d.relative_error, d.max_abs, d.share_equal, d.strays
        )


def _samples(batch: Batch, a: Array, b: Array, counts: Mask | None, apart: bool) -> Iterator[tuple[str, Array, Array]]:
    """The tokens that count, sample by sample where the first axis is the batch."""
    if apart and batch.size > 1 and a.ndim and len(a) == batch.size:
        for i in range(batch.size):
            keep = ... if counts is None or counts.ndim < 2 else counts[i]
            yield batch.sample(i), a[i][keep], b[i][keep]
    else:
        yield batch.name, *((a, b) if counts is None else (a[counts], b[counts]))


def is_numbers(value: ValueInfoProto) -> bool:
    """Whether a value is a tensor, and not of strings."""
    return value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.elem_type != TensorProto.STRING


def _token_outputs(outputs: Sequence[ValueInfoProto]) -> set[str]:
    """Outputs [batch, sequence] with a value and not a vector a token: their last dim is open too."""
    dims = {o.name: o.type.tensor_type.shape.dim for o in outputs}
    return {name for name, d in dims.items() if len(d) == 2 and not d[1].HasField("dim_value")}


def _taps(model: Model, names: Sequence[str] | dict[str, None]) -> list[Tap]:
    tensors = model.graph.tensors()
    taps = []
    for name in names:
        value = tensors.get(name)
        known = isinstance(value, Value) and value.dtype is not None
        taps.append(
            Tap(name, np.dtype(value.dtype if known else np.float32), value.shape if value is not None else None)
        )
    return taps


# -- what is compared


def check_interface(before: ModelProto, after: ModelProto, rewritten: Path) -> None:
    """A rewrite keeps all inputs and outputs."""
    for what in ("input", "output"):
        old, new = _interface(before, what), _interface(after, what)
        if lost := [n for n in old if n not in new]:
            raise QpassError(f"{rewritten} has no {what} '{lost[0]}', the original has: it is no rewrite of it")
        if added := [n for n in new if n not in old]:
            raise QpassError(f"{rewritten} has the {what} '{added[0]}', the original has not: it is no rewrite of it")
        for name, value in old.items():
            if (a := _described(value)) != (b := _described(new[name])):
                raise QpassError(f"the {what} '{name}' is {a} in the original but {b} in {rewritten}")


def _interface(proto: ModelProto, what: str) -> dict[str, ValueInfoProto]:
    """Inputs or outputs by name; inputs with a default are none that a caller must know."""
    defaults = {t.name for t in proto.graph.initializer} if what == "input" else set()
    return {v.name: v for v in getattr(proto.graph, what) if v.name not in defaults}


def _described(value: ValueInfoProto) -> str:
    """The type of an input or output; dims that are open are all the same."""
    kind = value.type.WhichOneof("value") or "nothing"
    if kind != "tensor_type":
        return kind.removesuffix("_type")
    tensor = value.type.tensor_type
    dims = [str(d.dim_value) if d.HasField("dim_value") else "?" for d in tensor.shape.dim]
    return f"{to_numpy(tensor.elem_type)}" + (f"[{', '.join(dims)}]" if tensor.HasField("shape") else "")


@dataclass(frozen=True)
class _Site:
    name: str
    tensor: str
    kind: str
    op: str | None


def _sites(
    before: ModelProto, after: ModelProto, rewritten: Path, ledger: Path | None, notes: list[str]
) -> list[_Site]:
    """Sites in the order of the original, with the tensor that both models compute for each."""
    count = Counter(n.name for n in before.graph.node)
    tensor_of = {
        n.name if n.name and count[n.name] == 1 else f"{n.op_type}@{n.output[0]}": n.output[0]
        for n in before.graph.node
    }
    both = _made(before.graph) & _made(after.graph)
    path = ledger if ledger is not None else rewritten.with_name(f"{rewritten.name.removesuffix('.onnx')}.ledger.json")
    if not path.exists():
        if ledger is not None:
            raise QpassError(f"no such file: {path}")
        notes.append(f"no ledger {path}: sites are the outputs of qpass nodes")
        ops = {n.output[0]: n.op_type for n in after.graph.node if n.domain == DOMAIN}
        return [_Site(name, t, "node", ops[t]) for name, t in tensor_of.items() if t in ops and t in both]
    try:
        listed = Ledger.from_json(path.read_text()).sites
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise QpassError(f"{path} is no ledger ({error}); rewrite the model again") from error
    # an activation that is as it was tells no more than the Linear before it
    listed = [s for s in listed if s.kind not in ("mlp", "activation") or s.status == "rewritten"]
    sites = [_Site(s.name, tensor_of.get(s.name, ""), s.kind, s.op) for s in listed]
    if lost := [s for s in sites if s.tensor not in both]:
        notes.append(
            f"{len(lost)} of {len(sites)} sites have no output that both models compute, such as '{lost[0].name}'"
        )
    return [s for s in sites if s.tensor in both]


def _made(graph: GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.output if name}
