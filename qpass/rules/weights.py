"""Reading a Linear's weight while rules decide: in blocks, and with its name in every error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from qpass.errors import QpassError
from qpass.graph import Const
from qpass.quantize.weight import NonFinite

BLOCK = 1 << 22
"""Elements of a weight read at a time."""


def blocks(w: Const) -> Iterator[NDArray[Any]]:
    """A weight [K, N] in blocks [n, K] of output channels, streamed once."""
    k, n = w.shape
    step = max(1, BLOCK // max(k, 1))
    for start in range(0, n, step):
        yield w.array.T.rows(start, min(start + step, n))


@contextmanager
def naming(w: Const) -> Iterator[None]:
    """Names the weight that turns out not to be finite."""
    try:
        yield
    except NonFinite as error:
        raise QpassError(
            f"weight '{w.origin}' holds NaN or infinite values; repair it, or exclude its Linear in the spec"
        ) from error
