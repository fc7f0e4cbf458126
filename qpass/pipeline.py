"""The main job from file to file: load, lift, rewrite, unlift, write, and account for every site."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from qpass.calibrate import Stats
from qpass.errors import QpassError
from qpass.graph import Model, Node, SaveResult, every_call
from qpass.ops import DOMAIN, REGISTRY
from qpass.rewriter import LIFTED, Ledger, Outcome, Rule, Site
from qpass.rewriter.ledger import WEIGHTED_KINDS
from qpass.rewriter.pattern import Op, Pat, reached
from qpass.rules import MERGE, NORM_PLUGINS, RULES, Found, Lifted
from qpass.rules.quantizer import Quantizer
from qpass.spec import QuantSpec

Progress = Callable[[int, int], None]

DEFAULT_PRESET = "w8a16"


@dataclass
class Rewritten:
    """What a rewrite did. `saved` is None for a dry run."""

    model: Path
    output: Path
    ledger_path: Path
    ledger: Ledger
    outcome: Outcome
    spec: QuantSpec
    proto: onnx.ModelProto
    """The original, without the weights that stay outside."""
    found: list[Found] = field(default_factory=list)
    """The sites of the ledger, in its order, with what of the graph lies behind each."""
    remarks: list[str] = field(default_factory=list)
    """Facts about the whole run that a user should know, such as that nothing was smoothed."""
    saved: SaveResult | None = None


def rewrite(
    model: str | Path,
    output: str | Path | None = None,
    *,
    spec: QuantSpec | str = DEFAULT_PRESET,
    calibration: str | Path | Stats | None = None,
    rules: Sequence[Rule[Any, Any]] = (),
    progress: Progress | None = None,
    max_memory: int | None = None,
    dry_run: bool = False,
    only_rules: bool = False,
) -> Rewritten:
    """Rewrite the norms, Linears and MatMuls of an ONNX model into quantized plugin nodes.

    Args:
        model: the model; it and its external data are only read.
        output: the rewritten model, by default the model's name with `.qpass.onnx`. The ledger is written beside it.
        spec: what to quantize and how, or the name of a preset.
        calibration: statistics of its activations, made by `qpass.calibrate`.
        rules: rules of your own. Those over lifted nodes run before the built-in ones, all others before lifting.
        progress: called with bytes of weights written and in all.
        max_memory: bound in bytes on the weights that the writer holds at a time.
        dry_run: do everything but write.
        only_rules: run none of the built-in quantizing rules, only `rules`.

    Returns:
        The ledger, what each rule did, and the files.

    Raises:
        QpassError: anything wrong with the model, the spec, the statistics or the place to write to.
    """
    path = Path(model)
    if isinstance(spec, str):
        spec = QuantSpec.preset(spec)
    output = Path(output) if output is not None else default_output(path)
    ledger_path = ledger_of(output)
    stats = Stats.load(Path(calibration)) if isinstance(calibration, str | Path) else calibration
    job = _Job(path, spec, stats, rules, only_rules)
    run = job.run(every_call)
    loaded, sites = job.as_little_expanded(run)
    _define_functions(loaded, path)

    ledger = Ledger(path.name, spec.to_dict(), version("qpass"), sites)
    ledger.bytes_before, ledger.bytes_after = run.bytes_before, loaded.weight_bytes
    found = run.lifted.survey.found
    done = Rewritten(path, output, ledger_path, ledger, run.lifted.outcome, spec, loaded.proto, found)
    done.remarks = run.quantizer.remarks()
    if run.already:
        done.remarks.append(_rewritten_before(path, run.already, ledger))
    if not dry_run:
        sidecars = {ledger_path: ledger.to_json().encode()}
        done.saved = loaded.save(output, sidecars=sidecars, progress=progress, max_memory=max_memory)
    return done


@dataclass(frozen=True)
class _Run:
    """A model in memory after all rules have run."""

    model: Model
    lifted: Lifted
    quantizer: Quantizer
    bytes_before: int
    already: int
    """qpass nodes that were there."""

    @property
    def sites(self) -> list[Site]:
        return [f.site for f in self.lifted.survey.found]

    def rewritten(self) -> dict[tuple[str, ...], Site]:
        """The rewritten sites by their nodes."""
        return {tuple(s.nodes): s for s in self.sites if s.status == "rewritten"}

    def calls_needed(self) -> set[str]:
        """Of the expanded calls those of which some node has been replaced."""
        needed: set[str] = set()
        for prefix, r in self.lifted.graphs:
            for gone in (prefix + r.labels[n] for n in r.before if n not in r.position):
                needed.update(gone[:i] for i, c in enumerate(gone) if c == "/")
        return needed.intersection(self.model.expanded)


@dataclass(frozen=True)
class _Job:
    """What to do with a model."""

    path: Path
    spec: QuantSpec
    stats: Stats | None
    rules: Sequence[Rule[Any, Any]]
    only_rules: bool

    def run(self, calls: Callable[[str], bool], again: bool = False) -> _Run:
        """Load the model with some calls of functions expanded, lift, rewrite, unlift."""
        model = Model.load(self.path, calls)
        bytes_before = model.weight_bytes
        already = sum(n.domain == DOMAIN for n in model.nodes())
        if self.stats is not None and not already and not again:
            self.stats.check(self.path)
        lifted = Lifted(model, [r for r in self.rules if not _over_lifted(r)])
        quantizer = Quantizer(self.spec, lifted.survey, self.stats, rewritten_before=again or already > 0)
        if self.stats is not None and already and not again and quantizer.quantizes_activations:
            self.stats.check(self.path)  # those of the original are no mistake where nothing is left to quantize
        if quantizer.merges_siblings and not self.only_rules:
            lifted.run(MERGE, quantizer)
            lifted.survey.merged(lifted.outcome)
        late = [r for r in self.rules if _over_lifted(r)]
        for stage in ((late,) if late else ()) + (() if self.only_rules else RULES):
            lifted.run(stage, quantizer)
        if self.spec.norm_plugins and not self.only_rules:  # those that no quantizing norm took
            lifted.run(NORM_PLUGINS, quantizer)
        lifted.unlift()
        lifted.survey.settle(lifted.outcome)
        return _Run(model, lifted, quantizer, bytes_before, already)

    def as_little_expanded(self, run: _Run) -> tuple[Model, list[Site]]:
        """The model with only those calls expanded of which something was rewritten, and all of its sites.

        What is expanded shows more than what is rewritten, so the sites stay those of the first run.
        """
        needed = run.calls_needed()
        if len(needed) == len(run.model.expanded):
            return run.model, run.sites
        less, before = self.run(needed.__contains__, again=True), run.rewritten()
        after = less.rewritten()
        if {k: s.op for k, s in before.items()} != {k: s.op for k, s in after.items()}:
            return run.model, run.sites  # a call that no rule touched was in sight of one that did
        for nodes, site in before.items():
            site.new_nodes = after[nodes].new_nodes
        return less.model, run.sites


def default_output(model: Path) -> Path:
    """`model.onnx` → `model.qpass.onnx`, in the same folder."""
    return model.with_name(f"{model.name.removesuffix('.onnx')}.qpass.onnx")


def ledger_of(output: Path) -> Path:
    """The ledger's path: the output's with `.onnx` replaced by `.ledger.json`."""
    return output.with_name(f"{output.name.removesuffix('.onnx')}.ledger.json")


def load_rules(path: str | Path) -> list[Rule[Any, Any]]:
    """The rules that a Python file defines, in their order.

    Raises:
        QpassError: the file is missing, fails to run (with file and line), or defines no rule.
    """
    path = Path(path)
    if not path.is_file():
        raise QpassError(f"{path}: no such rule file")
    name = f"qpass_rules_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise QpassError(f"{path}: a rule file is Python and ends in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # annotations of its patterns are looked up there
    try:
        found.loader.exec_module(module)
    except SyntaxError as error:
        raise QpassError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever the user's code raises
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = f":{frames[-1].lineno}" if frames else ""
        raise QpassError(f"{path}{line}: {type(error).__name__}: {error}") from error
    rules = [v for v in vars(module).values() if isinstance(v, Rule)]
    rules = [r for r in rules if Path(r.location.file).resolve() == path.resolve()]
    if not rules:
        raise QpassError(f"{path}: defines no rule; decorate a function with @qpass.rule")
    return rules


def _over_lifted(r: Rule[Any, Any]) -> bool:
    """Whether a rule's pattern mentions lifted nodes."""
    patterns = [r.pattern, *r.pattern.elements.values()]
    parts: list[Pat] = [p for pattern in patterns for p in reached(pattern.captures["y"])]
    return any(isinstance(p, Op) and p.domain == LIFTED for p in parts)


def _rewritten_before(path: Path, nodes: int, ledger: Ledger) -> str:
    """What to know of a run over a model that has qpass's nodes."""
    count = f"{nodes} of its nodes are qpass's and stay as they are"
    if any(s.status == "rewritten" for s in ledger.sites):
        return f"{path.name} was rewritten before: {count}; what was left is rewritten now"
    return (
        f"{path.name} was rewritten before: {count}, and nothing else is changed; "
        "to quantize it in another way, rewrite the original"
    )


def _define_functions(model: Model, path: Path) -> None:
    """Give every qpass node its body: one function a signature, in order of first use."""
    opset = model.opset
    known = {(f.name, f.overload): f for f in model.functions if f.domain == DOMAIN}
    node: Node
    for node in model.nodes():
        if node.domain != DOMAIN or node.proto is not None:
            continue
        op, present = REGISTRY[node.op], iter(node.inputs)
        dtypes = [next(present).dtype if i.present(node.attrs) else None for i in op.inputs]
        function = op.body(node.attrs, dtypes, opset)
        node.overload = function.overload
        if (there := known.get((node.op, function.overload))) is None:
            known[node.op, function.overload] = function
            model.functions.append(function)
        elif there != function:
            raise QpassError(
                f"{path} was rewritten by another version of qpass, whose {node.op} means something else; "
                "rewrite the original instead"
            )


def check_coverage(ledger: Ledger, least: float) -> str | None:
    """None where the share of rewritten Linears is at least `least` (0..1), else what is missing.

    Raises:
        QpassError: `least` is no share.
    """
    if not 0 <= least <= 1:
        raise QpassError(f"--require-coverage {least:.0%}: wants a share between 0% and 100%")
    got = ledger.coverage()
    if got >= least:
        return None
    weighted = (s for s in ledger.sites if s.kind in WEIGHTED_KINDS)
    left = [s.name for s in weighted if s.status not in ("rewritten", "excluded")]
    return (
        f"coverage is {got:.1%}, below {least:.1%}; not rewritten: {', '.join(left[:5])}{' …' if len(left) > 5 else ''}"
    )
