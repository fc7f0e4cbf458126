"""An engine against ONNX Runtime: what its arithmetic costs, and what quantization does, told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qpass.calibrate.sources import Samples, Source, source_of
from qpass.calibrate.synthetic import Synthetic
from qpass.calibrate.tokens import Tokens
from qpass.engine import sidecar
from qpass.engine.rounding import rounded
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.runtime import Runner, inputs_of, load
from qpass.verify import Comparison, OutputReport, check_interface, is_numbers, plain

TOLERANCE = 1e-2
"""The largest relative error of an engine from its own model that passes."""
ROUNDINGS = 2.0
"""Or this multiple of what rounding to float16 does, if that is more.

Where activations become int8 codes, a code is off by one wherever they were close to half, whatever moved them; so one
rounding does as much as another. In ONNX Runtime, every output of 42 small w8a8 models with their float32 weights
rounded as well is 0.84 to 1.18 times as far off as with activations alone. An engine twice as far off has other errors,
too, that are larger than its rounding (√3 times, as far as they are independent).
"""


@dataclass(frozen=True)
class EngineReport:
    """How an engine compares with the models that it comes from.

    Args:
        arithmetic: of the engine from the rewritten model in ONNX Runtime, where only kernels and types differ.
        quantization: of the rewritten model from the original, both in ONNX Runtime.
        outputs: of the engine from the original: both together.
        rounding: of the rewritten model with activations in float16 from itself as it is, both in ONNX Runtime; empty
            for an engine that keeps the model's types.
        minimum: the least cosine of `outputs` that passes.
        tolerance: the largest relative error of `arithmetic` that passes, where it was given; None for `TOLERANCE`, or
            where `rounding` is more `ROUNDINGS` times that.
    """

    original: Path
    rewritten: Path
    engine: Path
    backend: str
    inputs: str
    samples: int
    mask: str | None
    minimum: float
    tolerance: float | None
    arithmetic: tuple[OutputReport, ...]
    rounding: tuple[OutputReport, ...]
    quantization: tuple[OutputReport, ...]
    outputs: tuple[OutputReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def limits(self) -> dict[str, float]:
        """Output → the largest relative error of its arithmetic that passes."""
        if self.tolerance is not None:
            return {o.name: self.tolerance for o in self.arithmetic}
        owed = {o.name: ROUNDINGS * o.relative_error for o in self.rounding if math.isfinite(o.relative_error)}
        return {o.name: max(TOLERANCE, owed.get(o.name, 0.0)) for o in self.arithmetic}

    @property
    def failures(self) -> list[str]:
        """What does not reach its limit. Of integers the share that is equal counts alone."""
        limits = self.limits
        far = [o for o in self.outputs if o.likeness < self.minimum]
        off = [o for o in self.arithmetic if o.worst_cosine is not None and o.relative_error > limits[o.name]]
        return [
            *(f"{o.name}: {o.likeness:.6g} of the original, wants {self.minimum:g}" for o in far),
            *(f"{o.name}: arithmetic is off by {o.relative_error:.3g}, at most {limits[o.name]:.3g}" for o in off),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that JSON lacks are None."""
        result: dict[str, Any] = plain(asdict(self) | {"limits": self.limits, "passed": self.passed})
        return result


def verify_engine(
    original: Path,
    engine: Path,
    *,
    rewritten: Path | None = None,
    data: Path | Sequence[Path] | Source | None = None,
    minimum: float = 0.99,
    tolerance: float | None = None,
    mask: str | None = None,
    library: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EngineReport:
    """Run an engine on the GPU, and in ONNX Runtime the model it was built of and that model's original.

    Args:
        original: the model before it was rewritten.
        engine: what `qpass build` wrote, with its sidecar.
        rewritten: the model that the engine was built of; by default the sidecar's, beside the engine or the original.
        data: .npz files keyed by input name, folders of them, or another source, in shapes that the engine takes; None
            for made-up inputs of its usual shapes.
        minimum: the least cosine similarity of the engine with the original that passes, on every sample and output.
        tolerance: the largest relative error of the engine from the rewritten model that passes, on every output; by
            default `TOLERANCE`, or for an engine in float16 `ROUNDINGS` times what rounding does, if that is more.
        mask: the input that says which tokens count; by default attention_mask, if any.
        library: the plugins, by default those that the engine was built with.
        seed: of made-up inputs.
        progress: called with samples done and in all.

    Raises:
        QpassError: a file is missing or not of the others, the data does not fit, there is no GPU, or TensorRT failed.
    """
    loaded = Engine(engine, library=library)
    model = rewritten if rewritten is not None else _model_of(loaded, original)
    if sidecar.digest(model) != loaded.facts["model"]["sha256"]:
        raise QpassError(f"{engine.name} was not built of this {model}; build it again")
    before, after = load(original), load(model)
    check_interface(before, after, model)
    loaded.load()  # before ONNX Runtime works for what may be hours
    notes: list[str] = []
    shapes = {n: tuple(p["opt"]) for n, p in loaded.facts["profiles"].items()}
    source = Synthetic(before, seed=seed, shapes=shapes) if data is None else source_of(data)
    samples = Samples(source, inputs_of(before), notes.append)
    tokens = Tokens(before, mask)
    outputs = [v for v in before.graph.output if is_numbers(v)]
    arithmetic, rounding, quantization, both = (Comparison(tokens, outputs) for _ in range(4))
    names = [[o.name for o in outputs]]
    models = [(original, before), (model, after)]
    if loaded.facts.get("precision") == "fp16":
        models.append((model, rounded(model, after)))
    runners = [Runner(p, m, names, optimize=False) for p, m in models]
    for batch in samples.batches(lambda item: samples.sizes[item]):
        a, b, *halves = (next(r.run(batch.feeds, batch.name)) for r in runners)
        c = {n: y.astype(np.float32) if y.dtype.name == "bfloat16" else y for n, y in loaded.run(batch.feeds).items()}
        quantization.take(batch, a, b)
        arithmetic.take(batch, b, c)
        for half in halves:
            rounding.take(batch, b, half)
        both.take(batch, a, c)
        if progress is not None:
            progress(batch.start + batch.size, samples.total)
    if not samples.total:
        raise QpassError("the data holds no sample; add some")
    if any(not math.isfinite(r.relative_error) for r in rounding.reports()):
        notes.append(f"activations of {model.name} overflow float16 in ONNX Runtime: what rounding does is not known")
    who = loaded.facts["backend"]
    return EngineReport(
        original, model, engine, f"{who['name']} {who['version']}", str(source), samples.total, tokens.name, minimum,
        tolerance, arithmetic.reports(), rounding.reports(), quantization.reports(), both.reports(), tuple(notes),
    )  # fmt: skip


def _model_of(engine: Engine, original: Path) -> Path:
    name = str(engine.facts["model"]["name"])
    for folder in (engine.path.parent, original.parent):
        if (folder / name).is_file():
            return folder / name
    raise QpassError(f"{name}, of which {engine.path.name} was built, is not beside it; say --rewritten")
