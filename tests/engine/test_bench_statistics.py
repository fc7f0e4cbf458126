"""Ratios of medians and their intervals, on runs whose ratio is known."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.engine.bench.statistics import Timing, ratio

RANDOM = np.random.default_rng(7)


def timing(us: np.ndarray) -> Timing:
    return Timing(tuple(us.tolist()))


def noisy(us: float, runs: int = 100) -> Timing:
    """Runs with the long tail that runs have: 3 % of their median and more."""
    return timing(us * (1 + 0.03 * RANDOM.exponential(size=runs)))


def test_an_interval_holds_the_true_ratio() -> None:
    """Nearly as often as it says; a bootstrap's is a little narrow."""
    found = [ratio(noisy(130.0), noisy(100.0)).interval for _ in range(60)]
    held = [low <= 1.3 <= high for low, high in filter(None, found)]
    assert len(held) == 60
    assert sum(held) >= 52
    assert all(high - low < 0.05 for low, high in filter(None, found))


def test_what_may_be_no_difference_is_marked() -> None:
    same, faster = noisy(100.0), noisy(80.0)
    assert str(ratio(noisy(100.0), same)).endswith(") ~")
    told = ratio(same, faster)
    assert told.interval is not None
    low, high = told.interval
    assert 1 < low <= told.times <= high
    assert str(told) == f"{told.times:.2f}x ({low:.2f}-{high:.2f})"


def test_the_same_runs_give_the_same_interval() -> None:
    a, b = noisy(100.0), noisy(90.0)
    assert ratio.__wrapped__(a, b) == ratio.__wrapped__(a, b)


def test_what_disturbs_both_engines_of_a_round_is_no_noise() -> None:
    clock = 1 + 0.2 * RANDOM.random(100)
    interval = ratio(timing(100 * clock), timing(50 * clock)).interval
    assert interval == pytest.approx((2, 2))


def test_few_runs_tell_no_interval() -> None:
    assert str(ratio(noisy(100.0, 19), timing(np.full(19, 50.0)))).endswith("x")
    assert ratio(noisy(100.0, 20), timing(np.full(20, 50.0))).interval is not None
