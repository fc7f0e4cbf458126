from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qpass.calibrate import ActivationStats, Histogram
from qpass.calibrate.statistics import NonFinite

Floats = NDArray[np.floating]

FLOATS = st.floats(-1e6, 1e6, width=32)
ARRAYS = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 9)), elements=FLOATS)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=80, deadline=None)
@given(x=ARRAYS, cuts=st.lists(st.integers(0, 40), max_size=4), capacity=st.integers(0, 12), seed=st.integers(0, 5))
def test_a_stream_gives_what_the_whole_array_gives(x: Floats, cuts: list[int], capacity: int, seed: int) -> None:
    streamed = ActivationStats.empty(x.shape[1], capacity, seed)
    for part in np.split(x, sorted(cuts)):
        streamed.add(part)
    whole = ActivationStats.of(x, capacity, seed)
    np.testing.assert_array_equal(streamed.amax, np.abs(x).max(axis=0))
    np.testing.assert_allclose(streamed.mean_square, np.square(x, dtype=np.float64).mean(axis=0), rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(streamed.histogram.counts, whole.histogram.counts)
    np.testing.assert_array_equal(streamed.tokens, whole.tokens)
    assert streamed.count == len(x)
    assert len(streamed.rows) == min(capacity, len(x))
    np.testing.assert_allclose(streamed.rows, x[streamed.tokens], rtol=2e-3, atol=2e-3 * np.abs(x).max(initial=0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_blocks_do_not_show(dtype: type[np.floating]) -> None:
    x = rng().standard_normal((1500, 300)).astype(dtype)  # several blocks
    stats = ActivationStats.of(x)
    np.testing.assert_array_equal(stats.amax, np.abs(x).max(axis=0).astype(np.float32))
    np.testing.assert_allclose(stats.mean_square, np.square(x, dtype=np.float64).mean(axis=0), rtol=1e-6)
    assert stats.histogram.counts.sum() == x.size


@settings(max_examples=60, deadline=None)
@given(x=ARRAYS, p=st.floats(0, 100))
def test_percentiles_are_within_a_bin(x: Floats, p: float) -> None:
    got = ActivationStats.of(x).percentile(p)
    flat = np.abs(x).reshape(-1)
    low, high = (float(np.percentile(flat, p, method=m)) for m in ("lower", "higher"))
    assert low * (1 - 2**-7) - 1e-38 <= got <= high * (1 + 2**-7) + 1e-38


def test_percentiles_of_a_known_distribution() -> None:
    x = rng().standard_normal((4000, 50)).astype(np.float32)
    stats = ActivationStats.of(x)
    for p in (1, 50, 90, 99, 99.9, 99.99):
        assert stats.percentile(p) == pytest.approx(np.percentile(np.abs(x), p), rel=2**-8)
    assert stats.percentile(100) == np.abs(x).max()


def test_histogram_bins_are_bfloat16_numbers() -> None:
    edges = Histogram().edges
    assert edges[0] == 0
    normal = edges[(edges > 1e-37) & np.isfinite(edges)]
    widths = np.diff(normal) / normal[:-1]
    assert widths.min() >= 2**-8
    assert widths.max() <= 2**-7
    counts = ActivationStats.of(np.array([[1.0, -1.0, 1.004, 1.01]], np.float32)).histogram.counts
    at = int(np.flatnonzero(edges == 1)[0])
    assert counts[at : at + 2].tolist() == [3, 1]


def test_channel_percentiles_come_from_the_rows() -> None:
    x = rng().standard_normal((200, 6)).astype(np.float16)
    stats = ActivationStats.of(x)  # fewer tokens than rows: all are kept
    np.testing.assert_array_equal(stats.rows, x)
    expected = np.percentile(np.abs(x.astype(np.float32)), 75, axis=0)
    np.testing.assert_allclose(stats.channel_percentile(75), expected, rtol=1e-6)
    np.testing.assert_array_equal(stats.channel_percentile(100), stats.amax)


def test_rows_are_drawn_with_equal_chances() -> None:
    x = np.zeros((60, 1), np.float32)
    hits = np.zeros(60)
    for seed in range(600):
        hits[ActivationStats.of(x, capacity=10, seed=seed).tokens] += 1
    assert hits.mean() == 100
    assert hits.min() > 60  # 4.4 standard deviations
    assert hits.max() < 140


def test_tensors_that_saw_as_many_tokens_sample_the_same_ones() -> None:
    a, b = ActivationStats.of(np.ones((500, 2), np.float32)), ActivationStats.of(np.ones((500, 7), np.float32))
    np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("scale", [1e6, 1e30, 1e-6, 1e-30])
def test_rows_are_fp32_where_fp16_would_lose_them(scale: float) -> None:
    x = (rng().standard_normal((20, 4)) * scale).astype(np.float32)
    stats = ActivationStats.of(x)
    assert stats.rows.dtype == np.float32
    np.testing.assert_array_equal(stats.rows, x)


def test_rows_turn_fp32_when_the_first_large_ones_come() -> None:
    stats = ActivationStats.empty(3, capacity=8)
    stats.add(np.ones((4, 3), np.float32))
    assert stats.rows.dtype == np.float16
    stats.add(np.full((4, 3), 1e5, np.float32))
    assert stats.rows.dtype == np.float32
    np.testing.assert_array_equal(stats.rows[:, 0], [1] * 4 + [1e5] * 4)


def test_squares_do_not_overflow() -> None:
    x = np.full((3, 2), 3e38, np.float32)
    assert ActivationStats.of(x).square_sum[0] == pytest.approx(2.7e77, rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    x = np.zeros((700, 200), np.float32)
    x[650, 17] = value
    with pytest.raises(NonFinite) as error:
        ActivationStats.of(x)
    assert (error.value.row, error.value.channel) == (650, 17)


def test_no_token_is_no_error() -> None:
    stats = ActivationStats.empty(5)
    stats.add(np.zeros((0, 5), np.float32))
    assert stats.count == 0
    assert stats.percentile(50) == 0
    assert stats.mean_square.tolist() == [0] * 5
