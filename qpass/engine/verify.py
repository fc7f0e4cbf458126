"""An engine against ONNX Runtime: what its arithmetic costs, and what quantization does, told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qpass.calibrate.sources import Samples, Source, source_of
from qpass.calibrate.synthetic import Synthetic
from qpass.calibrate.tokens import Tokens
from qpass.engine import sidecar
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.runtime import Runner, inputs_of, load
from qpass.verify import Comparison, OutputReport, check_interface, is_numbers, plain


@dataclass(frozen=True)
class EngineReport:
    """How an engine compares with the models that it comes from.

    Args:
        arithmetic: of the engine from the rewritten model in ONNX Runtime, where only kernels and types differ.
        quantization: of the rewritten model from the original, both in ONNX Runtime.
        outputs: of the engine from the original: both together.
        minimum: the least cosine of `outputs` that passes.
        tolerance: the largest relative error of `arithmetic` that passes.
    """

    original: Path
    rewritten: Path
    engine: Path
    backend: str
    inputs: str
    samples: int
    mask: str | None
    minimum: float
    tolerance: float
    arithmetic: tuple[OutputReport, ...]
    quantization: tuple[OutputReport, ...]
    outputs: tuple[OutputReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """What does not reach its limit. Of integers the share that is equal counts alone."""
        far = [o for o in self.outputs if o.likeness < self.minimum]
        off = [o for o in self.arithmetic if o.worst_cosine is not None and o.relative_error > self.tolerance]
        return [
            *(f"{o.name}: {o.likeness:.6g} of the original, wants {self.minimum:g}" for o in far),
            *(f"{o.name}: arithmetic is off by {o.relative_error:.3g}, at most {self.tolerance:g}" for o in off),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that JSON lacks are None."""
        result: dict[str, Any] = plain(asdict(self) | {"passed": self.passed})
        return result


def verify_engine(
    original: Path,
    engine: Path,
    *,
    rewritten: Path | None = None,
    data: Path | Sequence[Path] | Source | None = None,
    minimum: float = 0.99,
    tolerance: float = 1e-2,
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
        tolerance: the largest relative error of the engine from the rewritten model that passes, on every output.
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
    arithmetic, quantization, both = (Comparison(tokens, outputs) for _ in range(3))
    names = [[o.name for o in outputs]]
    runners = [Runner(p, m, names, optimize=False) for p, m in ((original, before), (model, after))]
    for batch in samples.batches(lambda item: samples.sizes[item]):
        (a,), (b,) = (list(r.run(batch.feeds, batch.name)) for r in runners)
        c = {n: y.astype(np.float32) if y.dtype.name == "bfloat16" else y for n, y in loaded.run(batch.feeds).items()}
        quantization.take(batch, a, b)
        arithmetic.take(batch, b, c)
        both.take(batch, a, c)
        if progress is not None:
            progress(batch.start + batch.size, samples.total)
    if not samples.total:
        raise QpassError("the data holds no sample; add some")
    who = loaded.facts["backend"]
    return EngineReport(
        original, model, engine, f"{who['name']} {who['version']}", str(source), samples.total, tokens.name, minimum,
        tolerance, arithmetic.reports(), quantization.reports(), both.reports(), tuple(notes),
    )  # fmt: skip


def _model_of(engine: Engine, original: Path) -> Path:
    name = str(engine.facts["model"]["name"])
    for folder in (engine.path.parent, original.parent):
        if (folder / name).is_file():
            return folder / name
    raise QpassError(f"{name}, of which {engine.path.name} was built, is not beside it; say --rewritten")
