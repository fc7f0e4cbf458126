"""Runs a model over samples and gathers statistics of what its Linears read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qpass.calibrate.plan import Plan, Tap, plan
from qpass.calibrate.sources import Batch, Samples, Source, source_of
from qpass.calibrate.statistics import ActivationStats, NonFinite
from qpass.calibrate.stats import VERSION, Key, Stats, model_fingerprint, read_header
from qpass.calibrate.tokens import Mask, Tokens
from qpass.errors import QpassError
from qpass.graph import Model, Value, every_call
from qpass.graph.commit import Folder, explain
from qpass.runtime import Array, Runner, inputs_of

Progress = Callable[[int, int], None]
Note = Callable[[str], None]

MEMORY = 256 << 20
CHECKPOINT = 30.0


def calibrate(
    model: Path,
    data: Path | Sequence[Path] | Source,
    out: Path,
    *,
    mask: str | None = None,
    rows: int = 256,
    seed: int = 0,
    memory: int = MEMORY,
    force: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
    checkpoint: float = CHECKPOINT,
) -> Stats:
    """Run a model over samples and keep statistics of every activation that a Linear reads.

    Memory is bounded: samples stream, and when all those activations of a batch exceed `memory` the batch is
    cut, and then the model, see `plan` and `Runner`; the statistics of an activation [.., K] take 256 kB and
    `rows` × K numbers, mostly fp16. A finished file of the same model and data is used as it is. Progress is
    kept in `out` + ".partial"; a run that was interrupted goes on from there, with the result that it would
    have had.

    Args:
        model: the model; only read.
        data: .npz files keyed by input name, or folders of them; or another source.
        out: the file of statistics to write.
        mask: the input that says which tokens count, [batch, sequence]; by default attention_mask, if any.
        rows: token rows to sample of each activation.
        seed: which rows.
        memory: bound in bytes on the activations that are held at a time.
        force: run even where `out` has what is asked for.
        progress: called with samples done and in all.
        note: called with facts that a user should know, such as what was skipped.
        checkpoint: seconds between two savings of the progress.

    Returns:
        The statistics, as `Stats.load(out)`.

    Raises:
        QpassError: something is wrong with the model, the data, the mask or `out`, or an activation is NaN or
            infinite.
    """
    say = note if note is not None else lambda _: None
    model, out = Path(model), Path(out)
    source = source_of(data)
    _check_output(out)
    loaded = Model.load(model, every_call)  # Linears in functions are calibrated under the names that rules see
    tokens = Tokens(loaded.proto, mask)
    taps = _taps(loaded, say)
    key = Key(model.name, model_fingerprint(model), source.fingerprint(), tokens.name, rows, seed)
    partial = out.with_name(f"{out.name}.partial")
    if not force:
        found = _found(out, key, taps)
        if found is not None and found.done == found.total:
            say(f"{out} has them already, of this model and data")
            partial.unlink(missing_ok=True)
            return found

    samples = Samples(source, inputs_of(loaded.proto), say)
    layout = plan(taps, samples, memory)
    stats = Stats(key, 0, samples.total, {})
    if not force and (begun := _found(partial, key, taps)) is not None:
        stats = begun
        say(f"goes on after {stats.done} of {stats.total} samples, where the last run was interrupted")
    if stats.done < stats.total:
        gathering = _Gathering(Runner(model, loaded.proto, layout.groups), tokens, stats, partial)
        stats = gathering.run(samples, layout, progress, checkpoint)
    _check_counts(stats)
    stats.save(out)
    partial.unlink(missing_ok=True)
    return Stats.load(out)


def _check_output(out: Path) -> None:
    """An hour of work should not end with a file that can't be written, or with the loss of another."""
    if out.is_dir():
        raise QpassError(f"{out} is a folder; give the file to write, such as {out / 'stats.npz'}")
    if out.exists() and read_header(out) is None:
        raise QpassError(f"{out} is there and holds no statistics; choose another file with -o")
    try:
        with Folder(out.parent) as folder:
            folder.temporary(out.name)
    except OSError as error:
        raise explain(error, out, 0) from error


def _taps(model: Model, say: Note) -> list[Tap]:
    """What the Linears of the main graph read, each tensor once, in the order of the graph."""
    from qpass.rules import Lifted  # rules use statistics, so they import this package

    lifted = Lifted(model)
    taps: dict[str, Tap] = {}
    inner = 0
    for found in lifted.survey.found:
        if found.lifted is None or found.weight is None or found.site.kind != "linear":
            continue
        x = found.lifted.inputs[0]
        if found.tensor != x.name:
            inner += 1
        elif isinstance(x, Value):
            dtype = x.dtype if x.dtype is not None else np.dtype(np.float32)
            leading = (None,) if x.shape is None else x.shape[:-1]
            taps[x.name] = Tap(x.name, dtype, (*leading, found.weight.shape[0]))
    lifted.unlift()
    if inner:
        say(f"{inner} Linears lie in subgraphs (If, Loop, Scan) and are not calibrated")
    if not taps:
        raise QpassError(f"{model.path} has no Linear to calibrate; `qpass inspect {model.path}` shows why")
    return list(taps.values())


def _found(path: Path, key: Key, taps: Sequence[Tap]) -> Stats | None:
    """The statistics in a file if they are what is asked for."""
    if not path.exists() or (header := read_header(path)) is None or header["version"] != VERSION:
        return None
    stats = Stats.load(path)
    same = stats.key.same(key) and set(stats.tensors) == {t.name for t in taps}
    return stats if same else None


class _Gathering:
    """Takes samples in, a batch after the other, from where some statistics end."""

    def __init__(self, runner: Runner, tokens: Tokens, begun: Stats, partial: Path) -> None:
        self.runner, self.tokens, self.partial = runner, tokens, partial
        self.key, self.done, self.total, self.tensors = begun.key, begun.done, begun.total, dict(begun.tensors)

    def run(self, samples: Samples, layout: Plan, progress: Progress | None, checkpoint: float) -> Stats:
        """Take in what is left; whatever ends this early leaves the last good state behind."""
        whole, saved, pause, last = True, self.done, checkpoint, time.monotonic()
        try:
            for batch in samples.batches(layout.limits.__getitem__, self.done):
                mask = self.tokens.mask(batch.feeds)
                for group in self.runner.run(batch.feeds, batch.name):
                    whole = False  # until all groups are in: some tensors have the batch and others not
                    for name in list(group):
                        self._take(name, group.pop(name), mask, batch)
                self.done, whole = batch.start + batch.size, True
                if progress is not None:
                    progress(self.done, self.total)
                if (now := time.monotonic()) > last + pause:
                    self.stats.save(self.partial)
                    saved, last = self.done, time.monotonic()
                    pause = max(checkpoint, 10 * (last - now))  # never more than a tenth of the time
        except BaseException:
            if whole and self.done > saved:
                self.stats.save(self.partial)
            raise
        return self.stats

    @property
    def stats(self) -> Stats:
        return Stats(self.key, self.done, self.total, self.tensors)

    def _take(self, name: str, x: Array, mask: Mask | None, batch: Batch) -> None:
        """Add the tokens of one activation [.., K]."""
        if name not in self.tensors:
            self.tensors[name] = ActivationStats.empty(x.shape[-1], self.key.rows, self.key.seed)
        counts = self.tokens.over(name, x.shape[:-1], mask, batch.feeds)
        rows = x.reshape(-1, x.shape[-1]) if counts is None or counts.all() else x[counts]
        try:
            self.tensors[name].add(rows)
        except NonFinite as error:
            raise QpassError(
                f"{self.runner.path}: the activation '{name}' is {error.value} (channel {error.channel}) in "
                f"{batch.name}; leave that sample out, or calibrate the fp32 model if fp16 overflows"
            ) from error


def _check_counts(stats: Stats) -> None:
    if not stats.tensors:
        raise QpassError("the data holds no sample; add some")
    for name, s in stats.tensors.items():
        if not s.count:
            mend = "add samples" if stats.key.mask is None else f"choose another mask than '{stats.key.mask}'"
            raise QpassError(f"no token of the data counts for the activation '{name}'; {mend}")
