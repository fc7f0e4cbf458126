from __future__ import annotations

import numpy as np
import pytest

from qpass.quantize.smoothing import OutputError, smoother


def test_smoother_is_the_papers_formula_up_to_a_factor() -> None:
    x, w = np.array([1.0, 4.0, 9.0, 2.0]), np.array([0.5, 0.25, 1.0, 2.0])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        s = smoother(x, w, alpha)
        expected = x**alpha / w ** (1 - alpha)
        assert s.dtype == np.float32
        np.testing.assert_allclose(s / s[0], expected / expected[0], rtol=1e-6)
        assert np.exp(np.log(s).mean()) == pytest.approx(1)


def test_dead_channels() -> None:
    s = smoother(np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 1.0]), 0.5)
    assert np.all(np.isfinite(s))
    assert np.all(s > 0)
    assert s[1] == 1
    assert np.array_equal(smoother(np.zeros(3), np.zeros(3), 0.5), np.ones(3))


def test_smoothing_helps_where_one_channel_is_an_outlier() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 128)).astype(np.float32)
    x[:, 5] *= 100
    w = rng.normal(size=(32, 128)).astype(np.float32)
    error = OutputError(x, [w[:16], w[16:]])
    s = smoother(np.abs(x).max(axis=0), np.abs(w).max(axis=0), 0.5)
    assert error.of(s) < 0.5 * error.of()


def test_error_is_that_of_the_quantized_product() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 64)).astype(np.float32), rng.normal(size=(16, 64)).astype(np.float32)
    error = OutputError(x, [w])
    assert 0.001 < error.of() < 0.02
    per_tensor = error.of(scale=float(np.abs(x).max() / 127))
    assert error.of() < per_tensor < 0.03
    assert error.of(scale=1e-3) > 0.5  # clips nearly everything


def test_zeros_have_no_error() -> None:
    assert OutputError(np.zeros((4, 8), np.float32), [np.ones((2, 8), np.float32)]).of() == 0
