"""What is said of runs: percentiles of one engine's, and how many times as fast as the baseline another is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FOR_P99, FOR_INTERVAL = 100, 20
"""Runs without which a 99th percentile, or an interval, would be made of one or two of them."""
RESAMPLES, CONFIDENCE, SEED = 1000, 95, 0


@dataclass(frozen=True)
class Timing:
    """GPU time in µs of one engine at one point, execution by execution."""

    runs: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """By linear interpolation between the two nearest runs; `share` is 0 to 100."""
        return float(np.percentile(self.runs, share))

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def tail(self) -> int:
        """The highest percentile that so many runs tell: 99, or 90 of fewer than a hundred."""
        return 99 if len(self.runs) >= FOR_P99 else 90

    def to_dict(self) -> dict[str, float]:
        """min, mean and percentiles: 50, 90, and of a hundred runs or more 99."""
        told = {"min": min(self.runs), "mean": float(np.mean(self.runs))}
        told |= {f"p{share}": self.percentile(share) for share in sorted({50, 90, self.tail})}
        return {name: round(us, 3) for name, us in told.items()}


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a baseline: by the medians, with an interval that is None of fewer than 20 runs."""

    times: float
    interval: tuple[float, float] | None

    @property
    def may_be_one(self) -> bool:
        """Whether the interval holds 1: then the runs show no difference."""
        return self.interval is not None and self.interval[0] <= 1 <= self.interval[1]

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.times:.2f}x"
        low, high = self.interval
        return f"{self.times:.2f}x ({low:.2f}-{high:.2f})" + (" ~" if self.may_be_one else "")


@lru_cache(1024)  # results are written after every point
def ratio(baseline: Timing, other: Timing) -> Ratio:
    """The median of the baseline's runs over that of another engine's, of runs in turns and so of the same number.

    The interval is a percentile bootstrap: rounds, a run of both engines each, are drawn with replacement as many times
    as there are, a thousand times over, and the ratio's 2.5th and 97.5th percentiles taken. Rounds are drawn whole
    because what disturbs both engines in a round is no difference between them. The same runs give the same interval.
    It tells of the noise within this bench alone, and nothing of what another bench, build or GPU would measure.
    """
    a, b = np.array(baseline.runs), np.array(other.runs)
    times = float(np.median(a) / np.median(b))
    if len(a) < FOR_INTERVAL:
        return Ratio(times, None)
    rng = np.random.default_rng(SEED)
    draws = (rng.integers(0, len(a), len(a)) for _ in range(RESAMPLES))
    ratios = [np.median(a[rounds]) / np.median(b[rounds]) for rounds in draws]
    low, high = np.percentile(ratios, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return Ratio(times, (float(low), float(high)))


def described() -> str:
    """How `ratio` comes to its interval, in words."""
    return (
        f"of the medians; in brackets a {CONFIDENCE}% interval by a bootstrap of {RESAMPLES} resamples of the rounds "
        f"(seed {SEED}), of {FOR_INTERVAL} runs or more; ~ marks one that holds 1, where the runs show no difference"
    )
