"""What is remembered of one activation: a little per channel, a histogram and a sample of tokens.

All of it is gathered while token rows stream by, in memory that does not depend on their number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]

#: Elements of a block of rows: what is computed from it stays in the L2 cache.
_BLOCK = 1 << 16
#: Above this the square of an fp32 number overflows.
_HUGE = 1e18


class NonFinite(ValueError):
    """An activation holds NaN or infinity. `row` is the first such row, `channel` its first such channel."""

    def __init__(self, row: int, channel: int, value: float) -> None:
        super().__init__(f"{value} in row {row}, channel {channel}")
        self.row, self.channel, self.value = row, channel, value


@dataclass
class Histogram:
    """How many elements have their |x| in each bin, over the whole range of fp32.

    A bin holds what shares the upper 16 bits of its fp32 number, hence begins at a bfloat16 number and ends
    before the next: bins are 2⁻⁷ (0.8 %) of a power of two wide and nothing needs to be known of the range.
    """

    BINS: ClassVar[int] = 1 << 15

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(Histogram.BINS, np.int64))

    def add(self, x: NDArray[np.float32], scratch: NDArray[np.int64]) -> None:
        """Count the elements of `x`, finite and without sign; `scratch` has its size."""
        flat = scratch.reshape(-1)[: x.size]
        np.right_shift(x.view(np.uint32).reshape(-1), 16, out=flat, casting="unsafe")
        self.counts += np.bincount(flat, minlength=self.BINS)

    @property
    def edges(self) -> NDArray[np.float32]:
        """The bins' lower edges and the last one's upper edge: fp32 [BINS + 1]."""
        return np.left_shift(np.arange(self.BINS + 1, dtype=np.uint32), 16, dtype=np.uint32).view(np.float32)

    def quantile(self, q: float) -> float:
        """The value that the share `q` of all |x| does not exceed, within the width of a bin.

        As numpy's "linear" method counts, with the elements of a bin spread evenly over it. 0 where nothing
        was counted.
        """
        until = np.cumsum(self.counts)
        if not until[-1]:
            return 0.0
        rank = q * float(until[-1] - 1)
        i = int(np.searchsorted(until, rank, side="right"))
        low, high = (float(e) for e in self.edges[i : i + 2])
        inside = (rank - float(until[i] - self.counts[i]) + 0.5) / float(self.counts[i])
        return low + min(inside, 1.0) * (high - low)


@dataclass
class ActivationStats:
    """Statistics of one activation tensor [.., K] over all calibration tokens.

    amax: largest |x| of each channel, exact, fp32 [K].
    square_sum: sum of x² of each channel, fp64 [K].
    count: number of tokens.
    histogram: of all |x|.
    rows: whole tokens, R of them drawn with equal chances (all where there are fewer): [R, K], fp16 where
        that loses next to nothing and else fp32.
    tokens: which tokens these are, int64 [R], ascending. Tensors that saw as many tokens have the same ones.
    capacity, seed: the most rows to keep; what decides which.
    """

    amax: NDArray[np.float32]
    square_sum: NDArray[np.float64]
    count: int
    histogram: Histogram
    rows: Floats
    tokens: NDArray[np.int64]
    capacity: int = 256
    seed: int = 0

    @classmethod
    def empty(cls, channels: int, capacity: int = 256, seed: int = 0) -> ActivationStats:
        """Of no token yet."""
        return cls(
            amax=np.zeros(channels, np.float32),
            square_sum=np.zeros(channels, np.float64),
            count=0,
            histogram=Histogram(),
            rows=np.zeros((0, channels), np.float16),
            tokens=np.zeros(0, np.int64),
            capacity=capacity,
            seed=seed,
        )

    @classmethod
    def of(cls, x: Floats, capacity: int = 256, seed: int = 0) -> ActivationStats:
        """Of one array [.., K]."""
        stats = cls.empty(x.shape[-1], capacity, seed)
        stats.add(x.reshape(-1, x.shape[-1]))
        return stats

    @property
    def channels(self) -> int:
        """K."""
        return len(self.amax)

    @property
    def mean_square(self) -> NDArray[np.float32]:
        """Mean of x² of each channel, fp32 [K]."""
        return (self.square_sum / max(self.count, 1)).astype(np.float32)

    def percentile(self, p: float) -> float:
        """The |x| that p percent (0 to 100) of all elements do not exceed.

        Within a histogram bin, that is 2⁻⁷ of itself; p = 100 is exact.
        """
        top = float(self.amax.max(initial=0))
        return top if p >= 100 else min(self.histogram.quantile(p / 100), top)

    def channel_percentile(self, p: float) -> NDArray[np.float32]:
        """The same for each channel, fp32 [K], from the sampled rows.

        R rows tell percentiles apart in steps of 100 / (R − 1): 0.4 at 256 rows, where 99.9 lies between the
        two largest that were sampled. The exact maximum is `amax`.
        """
        if p >= 100 or not len(self.rows):
            return self.amax.copy()
        found = np.percentile(np.abs(self.rows, dtype=np.float32), p, axis=0)
        return np.minimum(found.astype(np.float32), self.amax)

    # -- gathering

    def add(self, x: Floats) -> None:
        """Take in tokens [n, K] of any float dtype. Raises NonFinite; what was taken in is then unusable."""
        step = max(1, _BLOCK // max(self.channels, 1))
        size = (min(step, len(x)), self.channels)
        scratch, indices = np.empty(size, np.float32), np.empty(size, np.int64)
        for start in range(0, len(x), step):
            block = x[start : start + step]
            absolute = np.abs(block.astype(np.float32, copy=False), out=scratch[: len(block)])
            peak = absolute.max(axis=0)
            if not np.isfinite(peak).all():
                row, channel = np.argwhere(~np.isfinite(absolute))[0].tolist()
                raise NonFinite(start + row, channel, float(block[row, channel]))
            np.maximum(self.amax, peak, out=self.amax)
            exact = absolute if peak.max(initial=0) < _HUGE else absolute.astype(np.float64)
            self.square_sum += np.einsum("nk,nk->k", exact, exact)
            self.histogram.add(absolute, indices)
        self._sample(x)
        self.count += len(x)

    def _sample(self, x: Floats) -> None:
        """Keep the tokens that have the smallest keys of all so far: a uniform sample without replacement.

        A token's key is a hash of its number, so the sample is the same however the stream is cut, and needs
        no state but the tokens' numbers. (Bottom-k sampling: Cohen and Kaplan, "Summarizing Data using
        Bottom-k Sketches", PODC 2007.)
        """
        held = len(self.tokens)
        tokens = np.concatenate([self.tokens, np.arange(self.count, self.count + len(x))])
        keep = np.arange(len(tokens))
        if len(tokens) > self.capacity:
            keep = np.sort(np.argpartition(_keys(tokens, self.seed), self.capacity)[: self.capacity])
        old = keep[keep < held]
        if len(old) == len(keep):
            return
        new = x[keep[len(old) :] - held]
        half = self.rows.dtype == np.float16 and _fits_half(new)
        self.rows = np.concatenate([self.rows[old], new], dtype=np.float16 if half else np.float32)
        self.tokens = tokens[keep]


def _fits_half(x: Floats) -> bool:
    """Whether fp16 holds the values: none overflows, and few lose more than rounding costs."""
    if x.dtype == np.float16:
        return True
    if np.abs(x).max(initial=0) > np.finfo(np.float16).max:
        return False
    exact = x.astype(np.float64)
    error = np.square(x.astype(np.float16) - exact).sum()
    return bool(error <= 1e-6 * np.square(exact).sum())  # rounding alone gives at most 2⁻²²


def _keys(tokens: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A well-mixed number for each token number.

    SplitMix64's output function (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
    OOPSLA 2014).
    """
    golden = 0x9E3779B97F4A7C15
    z = tokens.astype(np.uint64) * np.uint64(golden) + np.uint64((seed * 0xD1342543DE82EF95 + golden) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
