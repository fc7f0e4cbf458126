"""One run of `qpass plugins tune`: products timed one by one, each written into the table when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.measure import Clock
from qpass.plugins.library import Choice
from qpass.plugins.tune.choice import Row, entries
from qpass.plugins.tune.products import Product, job
from qpass.plugins.tune.table import update


class Choosing(Protocol):
    """What `bench.ours.Run` does."""

    def __call__(self, stream: int) -> Any: ...
    def choice(self) -> Choice: ...
    def take(self, variant: str) -> None: ...


class Timed(Protocol):
    """What `bench.ours.Ours` does."""

    @property
    def dtype(self) -> str: ...
    def bytes(self, job: Job) -> int: ...
    def calls(self, job: Job, copies: int) -> Sequence[Choosing]: ...


class Tuner:
    """Times every variant of products in the bench's way.

    Args:
        device: the GPU's name, which the table goes by.
        target: the table's file.
    """

    def __init__(self, timer: Clock, ours: Timed, device: str, target: Path) -> None:
        self._timer = timer
        self._ours = ours
        self._device = device
        self._target = target

    def run(
        self, products: Sequence[Product], tokens: Sequence[int], progress: Callable[[int, int], None] | None = None
    ) -> list[Row]:
        """Time products at all these numbers of tokens, and write what follows.

        Raises:
            QpassError: the rule's variant failed, the GPU cannot be used any more, or the table cannot be written;
                products that were done before are in it.
        """
        rows: list[Row] = []
        for product in products:
            mine: list[Row] = []
            for m in sorted(set(tokens)):
                mine.append(self.time(product, m))
                if progress is not None:
                    progress(len(rows) + len(mine), len(products) * len(set(tokens)))
            update(self._target, self._device, entries(mine))
            rows += mine
        return rows

    def time(self, product: Product, m: int) -> Row:
        """All variants on the same tensors. One that fails, but for the rule's, is left out."""
        asked = job(product, m, self._ours.dtype)
        calls = self._ours.calls(asked, self._timer.copies(self._ours.bytes(asked)))
        choice = calls[0].choice()
        us: dict[str, float] = {}
        for variant in choice.variants:
            calls[0].take(variant)
            try:
                us[variant] = self._timer.time(calls).us
            except QpassError as error:
                self._timer.check()
                if variant == choice.rule:
                    kind, n, k = product
                    raise QpassError(f"{kind} {n}×{k} at M {m} by {variant}: {error}") from error
        return Row(*product, m, choice.rule, us)
