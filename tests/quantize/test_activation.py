from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qpass.quantize.activation import quantize, quantize_per_token

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=8),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(FLOATS)
def test_per_token_is_within_half_a_step(x: np.ndarray) -> None:
    q, scale = quantize_per_token(x)
    assert q.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == (*x.shape[:-1], 1)
    step = np.maximum(scale.astype(np.float64), 2.0**-149)  # below it float32 has no finer scales
    assert np.all(np.abs(q * scale.astype(np.float64) - x) <= step * 0.50001 + 127 * 2.0**-149)
    assert np.all(q[np.broadcast_to(scale == 0, x.shape)] == 0)


@given(FLOATS)
def test_the_largest_value_of_a_token_is_127(x: np.ndarray) -> None:
    q, scale = quantize_per_token(x)
    normal = scale > 1e-30
    assert np.all(np.abs(q).max(axis=-1, keepdims=True)[normal] == 127)


@given(FLOATS, st.floats(2.0**-60, 2.0**40, width=32))
def test_static_is_the_formula(x: np.ndarray, scale: float) -> None:
    q = quantize(x, np.array([scale], np.float32))
    with np.errstate(over="ignore"):
        assert np.array_equal(q, np.clip(np.rint(x / np.float32(scale)), -128, 127).astype(np.int8))


def test_a_scale_of_zero_gives_zero() -> None:
    assert not quantize(np.array([1.0, -3e38, 0.0], np.float32), np.zeros(1, np.float32)).any()
