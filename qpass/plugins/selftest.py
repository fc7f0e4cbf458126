"""Every kernel against the NumPy reference, on the GPU: random data, poisoned outputs, guarded memory, odd sizes.
Matrix products go by the library's own choice and then by every variant that can do them.

What must hold: floats have a relative error ‖out - ref‖ / ‖ref‖ against a float64 reference of the same quantized
inputs of at most `LIMITS`; integers are the reference's, but where a norm or activation is computed first may be off by
one, at most once in 100,000; nothing is written beside the outputs and the workspace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass import gpu
from qpass.errors import QpassError
from qpass.ops.activation_quantization import ActivationQuantization
from qpass.ops.base import Op, Tensors
from qpass.ops.examples import Case
from qpass.ops.norm_quantization import NormQuantization
from qpass.plugins.library import DEFAULT, DeviceTensor, Library

Array = NDArray[Any]

LIMITS = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}
"""Largest relative error by the output's dtype."""
OFF_BY_ONE = 1e-5
"""Share of integers that may be off by one where a norm or activation is computed first."""
GUARD = 512
_POISON, _FENCE = 0xFF, 0xA5


@dataclass
class Tally:
    """What was seen of one op on one dtype of activations."""

    op: str
    dtype: str
    cases: int = 0
    variants: dict[str, int] = field(default_factory=dict)
    """How many cases went by which."""
    worst: float = 0.0
    limit: float = 0.0
    integers: int = 0
    off_by_one: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures and self.off_by_one <= max(1, OFF_BY_ONE * self.integers)


def selftest(
    library: Library, cases: Sequence[Callable[[], Case]], progress: Callable[[int, int], None] | None = None
) -> list[Tally]:
    """Run cases and compare; a failure is noted and the next case runs.

    Raises:
        QpassError: there is no GPU, or an error of CUDA's after which nothing runs any more.
    """
    tallies: dict[tuple[str, str], Tally] = {}
    for done, make in enumerate(cases, 1):
        case = make()
        dtype = activation_dtype(case)
        tally = tallies.setdefault((case.op.name, dtype), Tally(case.op.name, dtype))
        tally.cases += 1
        try:
            _by_every_variant(OnGpu(library, case), case, tally)
        except QpassError as error:
            tally.failures.append(f"{describe(case)}: {error}")
            gpu.synchronize()  # raises where the context is lost
        if progress is not None:
            progress(done, len(cases))
    return list(tallies.values())


def _by_every_variant(there: OnGpu, case: Case, tally: Tally) -> None:
    wanted = references(case)
    for variant in (DEFAULT, *there.variants):
        tally.variants[variant] = tally.variants.get(variant, 0) + 1
        how = "" if variant == DEFAULT else f" by {variant}"
        try:
            compare(case, there.run(variant), wanted, tally)
        except Wrong as wrong:
            tally.failures.append(f"{describe(case)}{how}: {wrong}")
        except QpassError as error:
            tally.failures.append(f"{describe(case)}{how}: {error}")
            gpu.synchronize()


class Wrong(Exception):
    """A kernel did what it must not."""


def run(library: Library, case: Case) -> list[Array]:
    """The outputs of a case from the GPU.

    Raises:
        Wrong: something was written beside the outputs.
        QpassError: the kernel could not run.
    """
    return OnGpu(library, case).run(DEFAULT)


class OnGpu:
    """A case in GPU memory: its inputs, outputs and workspace, with a fence behind each that is written."""

    def __init__(self, library: Library, case: Case) -> None:
        self._names = [*(o.name for o in case.outputs), "workspace"]
        self._given, self._inputs, self._buffers, self._outputs = [], [], [], []
        for x in case.inputs:
            if x is not None:
                buffer = gpu.Buffer(x.nbytes)
                buffer.upload(x)
                self._given.append(buffer)
                self._inputs.append(DeviceTensor(buffer.address, x.dtype, x.shape))
        for dtype, shape in case.op.infer(case.kinds, case.attrs):
            dims = tuple(int(d or 0) for d in shape or ())
            buffer = gpu.Buffer(int(np.prod(dims, dtype=np.int64)) * dtype.itemsize + GUARD)
            self._buffers.append(buffer)
            self._outputs.append(DeviceTensor(buffer.address, dtype, dims))
        self._node = library.node(case.op.name, case.attrs)
        workspace = gpu.Buffer(self._node.workspace(self._inputs, self._outputs) + GUARD)
        self._buffers.append(workspace)
        self.variants = self._node.choice(self._inputs, self._outputs).variants

    def run(self, variant: str) -> list[Array]:
        """What is computed by a variant into poisoned outputs. Raises as `run` of this module."""
        self._node.take(variant)
        self.poison()
        self.enqueue(0)
        gpu.synchronize()
        return self.outputs()

    def poison(self) -> None:
        """Fill outputs and workspace with what no kernel writes, and put up the fences."""
        for buffer in self._buffers:
            buffer.fill(_POISON, 0, buffer.size - GUARD)
            buffer.fill(_FENCE, buffer.size - GUARD, GUARD)

    def enqueue(self, stream: int) -> None:
        self._node.run(self._inputs, self._outputs, self._buffers[-1].address, stream)

    def outputs(self) -> list[Array]:
        """What was computed. Raises Wrong where a fence is broken."""
        for name, buffer in zip(self._names, self._buffers, strict=True):
            fence = buffer.download(np.dtype(np.uint8), (GUARD,), buffer.size - GUARD)
            if np.any(fence != _FENCE):
                raise Wrong(f"writes behind its {name}")
        pairs = zip(self._buffers, self._outputs, strict=False)  # behind the outputs comes the workspace
        return [b.download(o.dtype, o.shape) for b, o in pairs]


References = tuple[Sequence[Array], Sequence[Array]]
"""A case's outputs by its op's reference, and in float64."""


def references(case: Case) -> References:
    """What a case's outputs are compared with."""
    return case.op.reference(case.inputs, case.attrs), _in_float64(case.op, case)


def compare(case: Case, actual: Sequence[Array], wanted: References, tally: Tally) -> None:
    """Note a case's errors.

    Raises:
        Wrong: they are above the limits.
    """
    computed_first = isinstance(case.op, NormQuantization | ActivationQuantization)
    for tensor, y, ref, wide in zip(case.outputs, actual, *wanted, strict=True):
        if y.dtype == np.int8:
            off = np.abs(y.astype(np.int32) - ref.astype(np.int32))
            tally.integers += y.size
            tally.off_by_one += int(np.count_nonzero(off))
            if (most := int(np.max(off, initial=0))) > computed_first:
                count = int(np.count_nonzero(off))
                raise Wrong(f"{count} of {y.size} integers of {tensor.name} are off, by up to {most}")
            continue
        if tensor.name == "scale" and not computed_first:
            if not np.array_equal(y, ref):
                raise Wrong("scales are not the reference's bit for bit")
            continue
        limit = LIMITS[y.dtype.name]
        error = relative_error(y, wide)
        tally.limit = max(tally.limit, limit)
        tally.worst = max(tally.worst, error / limit)
        if not error <= limit:
            raise Wrong(f"relative error of {tensor.name} is {error:.2e}, above {limit:.0e}")


def relative_error(actual: Array, wanted: Array) -> float:
    """‖actual - wanted‖ / ‖wanted‖ in float64; NaN where one is not finite and the other is."""
    a, w = actual.astype(np.float64), wanted.astype(np.float64)
    if not a.size:
        return 0.0
    return float(np.linalg.norm(a - w) / max(float(np.linalg.norm(w)), 1e-30))


def _in_float64(op: Op, case: Case) -> list[Array]:
    """The reference on inputs in float64: what float outputs are measured by."""
    given = op.tensors(case.inputs, case.attrs)
    wide = Tensors((n, x.astype(np.float64) if x.dtype == np.float32 else x) for n, x in given.items())
    wide.t = given.t
    with np.errstate(over="ignore"):
        return [np.asarray(y) for y in op.compute(wide, case.attrs)]


def activation_dtype(case: Case) -> str:
    """The dtype of a case's activations: its T, or its output_type."""
    for tensor, x in zip(case.op.inputs, case.inputs, strict=True):
        if tensor.kind == "T" and x is not None:
            return x.dtype.name
    return next(str(d) for d, _ in case.op.infer(case.kinds, case.attrs) if d != np.int8)


def describe(case: Case) -> str:
    """The op with the shapes of a case and the attributes that are not 0."""
    shapes = ", ".join(
        f"{t.name} {list(x.shape)}" for t, x in zip(case.op.inputs, case.inputs, strict=True) if x is not None
    )
    attrs = ", ".join(f"{k}={v}" for k, v in case.attrs.items() if v and not str(k).startswith("plugin_"))
    return f"{case.op.name} {activation_dtype(case)} ({shapes}) {attrs}"


def by_op(tallies: Sequence[Tally]) -> dict[str, list[Tally]]:
    """Tallies under their ops."""
    grouped: dict[str, list[Tally]] = defaultdict(list)
    for t in tallies:
        grouped[t.op].append(t)
    return grouped
