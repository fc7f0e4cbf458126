from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qpass.quantize import tiles
from qpass.quantize.pack import unpack_int4
from qpass.quantize.weight import (
    NonFinite,
    Rounding,
    amax,
    int4_groupwise,
    int4_per_channel,
    int8_per_channel,
    int8_per_tensor,
)

Array = NDArray[Any]

INT8, F32 = np.dtype(np.int8), np.dtype(np.float32)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ROUNDINGS: tuple[Rounding, ...] = ("amax", "signed_max", "mse")


def weight(n: int, k: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    """Like a layer's: most values small, a few far out, not centred."""
    rng = np.random.default_rng(seed)
    return (0.03 * rng.standard_t(5, (n, k)) + 0.005).astype(dtype)


def orders(w: Array) -> list[Array]:
    """The same block as C-ordered, as a transpose, and as slices of larger arrays."""
    n, k = w.shape
    wide, tall = np.zeros((n, k + 7), w.dtype), np.zeros((k, n + 5), w.dtype)
    wide[:, 3 : k + 3], tall[:, 2 : n + 2] = w, w.T
    return [w, np.ascontiguousarray(w.T).T, wide[:, 3 : k + 3], tall[:, 2 : n + 2].T]


def dequantized(packed: Array, scale: Array, zero: Array | None = None) -> Array:
    q = unpack_int4(packed).astype(np.float32)
    groups = q.reshape(len(q), -1, q.shape[1] // (scale.size // len(q)))
    if zero is not None:
        groups = groups - zero[..., None]
    return np.asarray(groups * scale.reshape(len(q), -1, 1)).reshape(q.shape)


def squared_error(w: Array, result: tuple[Array, ...]) -> Array:
    error = dequantized(*result) - w.astype(np.float32)
    groups = error.reshape(len(w), result[1].size // len(w), -1)
    return np.asarray(np.sum(groups.astype(np.float64) ** 2, axis=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 300), (300, 1), (70, 4096), (2100, 130)], ids=str)
def test_int8_is_the_formula(shape: tuple[int, int], dtype: Any) -> None:
    w = weight(*shape, dtype)
    w[0] = 0
    wide = w.astype(np.float32)
    scale = np.abs(wide).max(axis=1) / np.float32(127)
    with np.errstate(invalid="ignore"):
        q = np.nan_to_num(np.rint(wide / scale[:, None])).astype(np.int8)
    for block in orders(w):
        got_q, got_scale = int8_per_channel(block)
        assert got_q.flags.c_contiguous
        assert (got_q.dtype, got_scale.dtype) == (INT8, F32)
        assert np.array_equal(got_q, q)
        assert np.array_equal(got_scale, scale)
        one = np.array([scale.max()])
        (per_tensor,) = int8_per_tensor(block, one)
        expected = np.rint(wide / one) if one[0] else np.zeros_like(wide)
        assert np.array_equal(per_tensor, expected)


def test_int8_with_a_smoother() -> None:
    w = weight(40, 96, np.float16)
    s = np.linspace(0.1, 10, 96).astype(np.float32)
    smoothed = w.astype(np.float32) * s
    for block in orders(w):
        for got, expected in zip(int8_per_channel(block, s), int8_per_channel(smoothed), strict=True):
            assert np.array_equal(got, expected)
        scale = np.array([0.01], np.float32)
        assert np.array_equal(*int8_per_tensor(block, scale, s), *int8_per_tensor(smoothed, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_any_memory_order_gives_the_same_int4(group: int, zero_point: bool, rounding: Rounding, dtype: Any) -> None:
    w = weight(70, 384, dtype)
    w[:, :group] = 0
    results = [int4_groupwise(block, group, rounding, zero_point) for block in orders(w)]
    for result in results:
        for got, expected in zip(result, results[0], strict=True):
            assert got.flags.c_contiguous
            assert np.array_equal(got, expected)
    packed, scale, *zero = results[0]
    assert (packed.dtype, packed.shape) == (INT8, (70, 192))
    assert (scale.dtype, scale.shape) == (F32, (70, 384 // group))
    assert [(z.dtype, z.shape) for z in zero] == [(INT8, scale.shape)] * zero_point
    assert not dequantized(*results[0])[:, :group].any()
    assert all(z.min() >= -8 and z.max() <= 7 for z in zero)


@pytest.mark.parametrize("rounding", ["amax", "signed_max"])
def test_symmetric_int4_is_the_formula(rounding: Rounding) -> None:
    w = weight(33, 256)
    groups = w.reshape(33, 4, 64)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1)[..., None], -1)
    scale = np.abs(largest) / np.float32(7) if rounding == "amax" else -largest / np.float32(8)
    q = np.clip(np.rint(groups / scale), -8, 7).reshape(33, 256)
    packed, got = int4_groupwise(w, 64, rounding)
    assert np.array_equal(got, scale[..., 0])
    assert np.array_equal(unpack_int4(packed), q)
    assert unpack_int4(packed).min() == (-7 if rounding == "amax" else -8)
    assert rounding == "amax" or np.any(got < 0)


def test_zero_points_are_the_formula() -> None:
    w = weight(33, 256) + np.float32(0.02)
    groups = w.reshape(33, 4, 64)
    low, high = groups.min(axis=-1, keepdims=True).clip(max=0), groups.max(axis=-1, keepdims=True).clip(min=0)
    scale = high / 15 - low / 15
    zero = np.rint(-8 - low / scale)
    q = np.clip(np.rint(groups / scale) + zero, -8, 7)
    packed, got_scale, got_zero = int4_groupwise(w, 64, "amax", zero_point=True)
    assert np.array_equal(got_scale, scale[..., 0])
    assert np.array_equal(got_zero, zero[..., 0])
    assert np.array_equal(unpack_int4(packed), q.reshape(w.shape))


def test_per_channel_is_one_group_a_row() -> None:
    w = weight(40, 128)
    for rounding in ROUNDINGS[:2]:
        packed, scale = int4_per_channel(w, rounding)
        expected = int4_groupwise(w, 128, rounding)
        assert np.array_equal(packed, expected[0])
        assert np.array_equal(scale, expected[1][:, 0])
    for block in orders(w):
        packed, scale = int4_per_channel(block)
        np.testing.assert_allclose(dequantized(packed, scale), dequantized(*int4_per_channel(w)), rtol=1e-6)


def test_the_search_beats_the_formulas() -> None:
    w = weight(64, 1024)
    error = {r: squared_error(w, int4_groupwise(w, 128, r)) for r in ROUNDINGS}
    assert np.all(error["mse"] <= error["signed_max"] * (1 + 1e-5))  # it tries that scale first
    assert error["mse"].sum() < 0.95 * error["signed_max"].sum() < 0.9 * error["amax"].sum()
    asymmetric = {r: squared_error(w, int4_groupwise(w, 128, r, True)) for r in ("amax", "mse")}
    assert asymmetric["mse"].sum() < 0.95 * asymmetric["amax"].sum() < 0.9 * error["amax"].sum()
    channel = {r: squared_error(w, int4_per_channel(w, r)).sum() for r in ROUNDINGS}
    assert channel["mse"] < 0.7 * channel["signed_max"] < 0.7 * channel["amax"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused(dtype: Any, bad: float) -> None:
    w = weight(50, 128, dtype)
    w[37, 101] = bad
    for block in orders(w):
        for quantize in (
            int8_per_channel,
            lambda b: int8_per_channel(b, np.full(128, 1e-3, np.float32)),
            lambda b: int8_per_tensor(b, np.array([bad / 127], np.float32)),
            int4_per_channel,
            lambda b: int4_groupwise(b, 32, "mse"),
            lambda b: int4_groupwise(b, 128, "amax", True),
            amax,
        ):
            with pytest.raises(NonFinite):
                quantize(block)


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax(dtype: Any) -> None:
    w = weight(150, 70, dtype)
    magnitude = np.abs(w.astype(np.float32))
    for block in orders(w):
        assert np.array_equal(amax(block), magnitude.max(keepdims=True)[0])
        assert np.array_equal(amax(block, 0), magnitude.max(axis=0))
        assert np.array_equal(amax(block, 1), magnitude.max(axis=1))


def test_groups_that_do_not_fit_are_refused() -> None:
    for k, group in (100, 32), (96, 64), (33, 33):
        with pytest.raises(ValueError, match=f"K={k}"):
            int4_groupwise(weight(4, k), group)
    with pytest.raises(ValueError, match="K=7"):
        int4_per_channel(weight(4, 7))


def test_blocks_of_any_height_give_the_same() -> None:
    w = weight(100, 256, np.float16)
    whole = int4_groupwise(w, 64, "mse", True)
    for cuts in ([1, 99], [33, 34], [50]):
        parts = [int4_groupwise(b, 64, "mse", True) for b in np.split(w, cuts)]
        for i, expected in enumerate(whole):
            assert np.array_equal(np.concatenate([p[i] for p in parts]), expected)


def test_no_rows() -> None:
    assert [r.shape for r in int8_per_channel(np.zeros((0, 8), np.float16))] == [(0, 8), (0,)]
    assert [r.shape for r in int4_groupwise(np.zeros((0, 64)), 32, "mse", True)] == [(0, 32), (0, 2), (0, 2)]


def test_every_float16_becomes_its_float32() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    out = np.empty(halves.shape, np.float32)
    tiles.to_float32(halves, out)
    finite = np.isfinite(halves)
    assert np.array_equal(out[finite].view(np.uint32), halves[finite].astype(np.float32).view(np.uint32))
    assert np.all(np.abs(out[~finite]) >= 65536)


BLOCKS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.just(64)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(BLOCKS)
@settings(deadline=None)
def test_int8_is_within_half_a_step(w: Array) -> None:
    q, scale = int8_per_channel(w)
    step = np.maximum(scale.astype(np.float64), 2.0**-149)[:, None]
    assert np.all(np.abs(q * scale[:, None].astype(np.float64) - w) <= step * 0.50001 + 127 * 2.0**-149)


@given(BLOCKS, st.sampled_from(["amax", "signed_max"]), st.booleans())
@settings(deadline=None)
def test_int4_is_within_a_step(w: Array, rounding: Rounding, zero_point: bool) -> None:
    result = int4_groupwise(w, 32, rounding, zero_point)
    step = np.abs(result[1].astype(np.float64)).repeat(32, axis=1)
    # signed_max: the value opposite to the largest one may need code 8, and gets 7; zero points round to half a step
    assert np.all(np.abs(dequantized(*result) - w.astype(np.float64)) <= step * 1.00001 + 16 * 2.0**-149)
