"""The smoother, and the error by which it is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.quantize.smoothing import FLOOR, OutputError, smoother


def test_formula() -> None:
    x, w = np.array([4.0, 16.0], np.float32), np.array([1.0, 4.0], np.float32)
    s = smoother(x, w, 0.5)
    plain = np.sqrt(x) / np.sqrt(w)
    assert s == pytest.approx(plain / np.sqrt(plain.prod()))
    assert s.dtype == np.float32


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_dead_channels_are_left_alone(strength: float) -> None:
    s = smoother(np.array([1.0, 0.0, 2.0], np.float32), np.array([0.0, 1.0, 2.0], np.float32), strength)
    assert np.isfinite(s).all()
    assert (s > 0).all()
    assert s[0] == 1  # its weights are zero: whatever the activation, nothing comes of it


def test_a_sleeping_channel_is_not_blown_up() -> None:
    x = np.array([1e-9, 1.0], np.float32)
    s = smoother(x, np.ones(2, np.float32), 0.5)
    assert s[1] / s[0] == pytest.approx(FLOOR**-0.5)


def test_all_zero_activation() -> None:
    assert (smoother(np.zeros(3, np.float32), np.ones(3, np.float32), 0.5) == 1).all()


class TestOutputError:
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        rows = random.standard_normal((64, 32)).astype(np.float32)
        rows[:, 3] *= 100  # the outlier channel that smoothing is for
        return rows, random.standard_normal((48, 32)).astype(np.float32)

    def test_is_the_error_of_the_int8_product(self) -> None:
        rows, w = self.rows()
        sx = np.abs(rows).max(1, keepdims=True) / np.float32(127)
        sw = np.abs(w).max(1, keepdims=True) / np.float32(127)
        got = (np.rint(rows / sx) * sx) @ (np.rint(w / sw) * sw).T
        want = rows.astype(np.float64) @ w.T.astype(np.float64)
        expected = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert OutputError(rows, [w]).of() == pytest.approx(expected, rel=1e-3)

    def test_smoothing_helps_where_a_channel_sticks_out(self) -> None:
        rows, w = self.rows()
        w[:, 3] /= 100  # the product does not come from that channel alone
        s = smoother(np.abs(rows).max(0), np.abs(w).max(0), 0.5)
        error = OutputError(rows, [w[:16], w[16:]])
        assert error.of(s) < 0.5 * error.of()

    def test_a_static_scale_that_clips_errs(self) -> None:
        rows, w = self.rows()
        error = OutputError(rows, [w])
        amax = float(np.abs(rows).max())
        assert error.of(scale=amax / 127) < error.of(scale=amax / 12700)

    def test_equal_smoothers_in_other_arrays_are_not_mixed_up(self) -> None:
        rows, w = self.rows()
        error = OutputError(rows, [w])
        s = smoother(np.abs(rows).max(0), np.abs(w).max(0), 0.5)
        assert [error.of(), error.of(s), error.of()] == [error.of(), error.of(s.copy()), error.of()]
