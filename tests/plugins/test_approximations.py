"""The arithmetic of the row kernels where it is not the reference's, step by step in float32 on the CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qpass.ops.activation_quantization import Activation, activate
from qpass.plugins.compile import source_folder
from qpass.quantize.activation import quantize, scale_of

Array = NDArray[Any]
F32 = np.float32

SIXTEEN_BITS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
EX2_ULPS, RCP_ULPS = 2, 1
"""What PTX promises of ex2.approx and rcp.approx."""


# clip(rint(y / scale) + zero) without a division


def test_no_quotient_rounds_to_another_integer() -> None:
    """Of all pairs of mantissas whose quotient, below 256, is so close to where it would round to another integer that
    the error before the last rounding could matter (rounding.cuh), none does; with the product alone many would."""
    pairs = list(_hard_quotients())
    assert len(pairs) > 3000
    products = 0
    for y, scale in pairs:
        wanted = round(_float32(y / scale))
        inverse = _float32(1 / scale)
        rest = _float32(1 - inverse * scale)
        off = _float32(_float32(rest + rest * rest) * inverse)
        products += round(_float32(y * inverse)) != wanted
        assert round(_float32(y * inverse + _float32(y * off))) == wanted
    assert products > 500


def test_rows_own_scales_need_no_clipping() -> None:
    """Quotients about halves and integers up to 127, with the scale that the largest gives."""
    rng = np.random.default_rng(0)
    amax = rng.uniform(1e-3, 1e3, (20_000, 1)).astype(F32)
    near = 1 + rng.integers(-3, 4, (20_000, 16)) * 2.0**-24
    y = (amax * (rng.integers(-254, 255, near.shape) / 254) * near).astype(F32)
    y = np.clip(y, -amax, amax)
    y[:, :1] = amax
    scale = scale_of(amax)
    q = _corrected(y, scale)
    assert np.array_equal(_low_byte(q + F32(1.5 * 2**23)), quantize(y, scale))


def test_scales_of_rows_are_the_quotients() -> None:
    """amax / 127 for every mantissa: the remainder is exact in float64, and no sum is near the middle of two floats."""
    amax = np.arange(2**23, 2**24, dtype=np.float64)
    inverse = np.float64(F32(1 / 127))
    q = (amax * inverse).astype(F32).astype(np.float64)
    corrected = q + (amax - q * 127) * inverse
    assert np.array_equal(corrected.astype(F32), amax.astype(F32) / F32(127))
    assert np.min(np.abs(corrected / np.spacing(corrected.astype(F32)) % 1 - 0.5)) > 1e-3


@pytest.mark.parametrize("worst", [-1, 1])
def test_the_inverse_of_a_norms_root_is_right_to_an_ulp(worst: int) -> None:
    """However rsqrt.approx errs, by 2^-22.9 at most: one step of Newton's mends it."""
    x = np.random.default_rng(0).uniform(1, 4, 300_000).astype(F32)
    exact = 1 / np.sqrt(x.astype(np.float64))
    y = (exact * (1 + worst * 2.0**-22.9)).astype(F32).astype(np.float64)
    residue = (1 - (x * y.astype(F32)).astype(np.float64) * y).astype(F32)
    better = (residue.astype(np.float64) * (F32(0.5) * y.astype(F32)) + y).astype(F32)
    assert np.max(np.abs(better - exact) / np.spacing(exact.astype(F32))) < 1


@pytest.mark.parametrize("zero", [None, -128, -7, 0, 1, 127])
def test_static_scales_of_any_size(zero: int | None) -> None:
    """Subnormal, zero, negative and huge scales, with activations around every half and far beyond all of them."""
    rng = np.random.default_rng(0)
    exponents = np.concatenate([rng.uniform(-149, 127.9, 4000), np.full(4000, -5.5)])
    scale = (2.0**exponents * rng.uniform(1, 1.05, exponents.size)).astype(F32)[:, None]
    scale[:3, 0] = 0, -0.02, -1e-40
    quotients = rng.integers(-600, 601, (scale.size, 32)) / 2 * (1 + rng.integers(-2, 3, (scale.size, 32)) * 2.0**-24)
    with np.errstate(over="ignore"):
        y = (quotients * scale.astype(np.float64)).astype(F32)
    y[:, :4] = 0, 3e38, -3e38, 1e-45
    point = None if zero is None else np.array([zero], np.int8)
    assert np.array_equal(_as_rounded(y, scale, F32(zero or 0)), quantize(y, scale, point))


def _as_rounded(y: Array, scale: Array, zero: np.float32) -> Array:
    """rounding.cuh where it clips."""
    size = np.abs(scale)
    factor = np.where(size < 2.0**-100, F32(2.0**120), np.where(size > 2.0**100, F32(2.0**-100), F32(1)))
    factor = np.where((size == 0) | (size == np.inf), F32(0), factor)
    with np.errstate(over="ignore"):
        scale, y = np.where(factor == 0, F32(1), scale * factor), y * factor
    least, most = (F32(-128.25) - zero) * scale, (F32(127.25) - zero) * scale
    y = np.clip(y, np.minimum(least, most), np.maximum(least, most))
    return _low_byte(_corrected(y, scale) + F32(1.5 * 2**23) + zero)


def _corrected(y: Array, scale: Array) -> Array:
    """The product with the inverse and what that is off by; float64 holds the remainder, and nearly all of the sum."""
    inverse = F32(1) / scale
    rest = 1 - inverse.astype(np.float64) * scale
    off = (rest + rest * rest).astype(F32) * inverse
    corrected: Array = (y.astype(np.float64) * inverse + y * off).astype(F32)
    return corrected


def _low_byte(x: Array) -> Array:
    assert x.dtype == np.float32
    return x.view(np.uint32).astype(np.uint8).view(np.int8)


def _hard_quotients() -> Iterator[tuple[Fraction, Fraction]]:
    """y and scale with 24-bit mantissas, y / scale within 2^-22 ulp of the middle of a half (n + 1/2) and the float
    beside it: A 2^j = B M + d, integers A, B, M of 24, 24 and 25 bits and a small d, so that B is -d / M modulo 2^j."""
    for twice in range(1, 512, 2):
        half = Fraction(twice, 2)
        exponent = twice.bit_length() - 2
        for above in (True, False):
            ulp = Fraction(2) ** (exponent - 23 - (twice == 1 and not above))  # below 1/2 floats lie closer
            middle = half + ulp / 2 if above else half - ulp / 2
            m, denominator = middle.numerator, middle.denominator
            while m < 2**24:
                m, denominator = 2 * m, 2 * denominator
            for j in (23, 24, 25):
                inverse = pow(m, -1, 2**j)
                for d in range(-9, 10):
                    b = -d * inverse % 2**j
                    a = (b * m + d) >> j
                    if 2**23 <= b < 2**24 and 2**23 <= a < 2**24:
                        yield Fraction(a * 2**j, denominator), Fraction(b)


def _float32(x: Fraction) -> Fraction:
    """Rounded to 24 bits, ties to even."""
    return round(x / _ulp(x)) * _ulp(x) if x else x


def _ulp(x: Fraction) -> Fraction:
    """What the last of 24 bits counts."""
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    return Fraction(2) ** (exponent - 23)


# Activations


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("worst", [-1, 0, 1])
def test_activations_are_the_references_to_its_own_roundings(
    kind: Activation, dtype: np.dtype[Any], worst: int
) -> None:
    """For every 16-bit number, whichever way the GPU's approximations of exp2 and 1 / x err: off from the exact value
    by 3e-7 of it at most, or of x where that is larger but under 1; the reference itself is off by as much."""
    x = np.arange(65536, dtype=np.uint16).view(dtype).astype(F32)
    x = x[np.isfinite(x)]
    with np.errstate(all="ignore"):
        got, reference = _as_in_the_kernel(x, kind, worst), activate(x, kind)
        exact = _exact(x, kind)
    finite = np.isfinite(reference)
    assert np.array_equal(np.isfinite(got), finite)
    limit = 3e-7 * np.maximum(np.minimum(np.abs(x), 1), np.abs(exact))[finite] + 1e-37
    assert np.all(np.abs(reference - exact)[finite] <= limit)
    assert np.all(np.abs(got - exact)[finite] <= limit)


@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("worst", [-1, 1])
def test_few_integers_change(kind: Activation, worst: int) -> None:
    """Of normal activations, each row with its own scale, fewer integers than one in 100,000 are off, and by one."""
    x = np.random.default_rng(1).normal(size=(2000, 1024)).astype(np.float16).astype(F32)
    got, reference = _as_in_the_kernel(x, kind, worst), activate(x, kind)
    scale = np.max(np.abs(reference), axis=-1, keepdims=True) / F32(127)
    ours = np.max(np.abs(got), axis=-1, keepdims=True) / F32(127)
    off = np.abs(np.rint(got / ours) - np.rint(reference / scale))
    assert off.max() <= 1
    assert np.mean(off) < 1e-5


@pytest.mark.parametrize("kind", list(Activation))
def test_activations_keep_what_is_no_number(kind: Activation) -> None:
    """NaN stays NaN, infinity is not made a number."""
    with np.errstate(all="ignore"):
        got = _as_in_the_kernel(np.array([np.nan, np.inf], F32), kind, 0)
    assert np.isnan(got[0])
    assert got[1] == (1 if kind is Activation.SIGMOID else np.inf)


def _as_in_the_kernel(x: Array, kind: Activation, worst: int) -> Array:
    """activations.cuh; exp2 and 1 / x err by what PTX allows, up or down (`worst` 1 or -1), or only round (0)."""

    def off(y: Array, ulps: int) -> Array:
        y = np.where(np.abs(y) < 2.0**-126, F32(0), y.astype(F32))  # .ftz
        return np.where(np.isfinite(y) & (y != 0), y + worst * ulps * np.spacing(y), y).astype(F32)

    def sigmoid(exponent: Array) -> Array:
        below = F32(1) + off(np.exp2(exponent.astype(np.float64)), EX2_ULPS)
        return off(1 / below.astype(np.float64), RCP_ULPS)

    def fma(a: Array, b: Array, c: Array | np.float32) -> Array:
        return (a.astype(np.float64) * b + c).astype(F32)

    log2e = F32(1.44269504)
    if kind is Activation.GELU:
        size = np.fmin(np.abs(x), F32(100))
        first, *others = GELU
        p = np.full_like(x, first)
        for coefficient in others:
            p = fma(p, size, coefficient)
        return fma(-size, off(np.exp2(p.astype(np.float64)), EX2_ULPS), np.maximum(x, F32(0)))
    if kind is Activation.GELU_TANH:
        tanh = F32(-2) * F32(0.79788456) * log2e
        return x * sigmoid(x * fma(x * x, np.full_like(x, tanh * F32(0.044715)), tanh))
    if kind in (Activation.RELU, Activation.RELU2):
        positive = np.maximum(x, F32(0))
        return positive if kind is Activation.RELU else positive * positive
    value = sigmoid(x * (F32(-1.702) * log2e if kind is Activation.QUICK_GELU else -log2e))
    return value if kind is Activation.SIGMOID else x * value


def _gelu_coefficients() -> list[np.float32]:
    """From the kernel's source, highest power first: what is tested is what is compiled."""
    text = (source_folder() / "kernels" / "activations.cuh").read_text()
    body = text[text.index("float gelu(float x)") :]
    body = body[: body.index("return")]
    first = re.findall(r"float p = (-?[\d.e+-]+)f;", body)
    return [F32(c) for c in first + re.findall(r"fmaf\(p, size, (-?[\d.e+-]+)f\)", body)]


GELU = _gelu_coefficients()


def _exact(x: Array, kind: Activation) -> Array:
    """In float64, with a complementary error function that keeps its digits where erf is close to -1."""
    wide = x.astype(np.float64)
    if kind is Activation.GELU:
        return np.asarray(wide * np.vectorize(math.erfc, otypes=[np.float64])(-wide * np.sqrt(0.5)) / 2)
    if kind is Activation.GELU_TANH:
        return np.asarray(wide / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))))
    return activate(wide, kind)


# division by a smoother


@pytest.mark.parametrize("ulps", [-RCP_ULPS, RCP_ULPS])
def test_a_smoothed_value_is_off_by_its_last_bits(ulps: int) -> None:
    """However rcp.approx errs: of a norm or an activation, which are off by as much themselves."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal(300_000).astype(F32)
    smoother = np.exp(rng.uniform(-8, 8, y.shape)).astype(F32)
    exact = 1 / smoother.astype(np.float64)
    inverse = (exact + ulps * np.spacing(exact.astype(F32))).astype(F32)
    quotient = y / smoother.astype(np.float64)
    assert np.max(np.abs(y * inverse - quotient) / np.abs(quotient)) < 2.0**-22


def test_no_smoothed_activation_rounds_to_another_float() -> None:
    """Of all pairs of a 16-bit mantissa and a smoother's whose quotient is so close to the middle of two floats that
    the error before the last rounding could matter (`Divisor` in rounding.cuh), none does; by the product alone many
    would."""
    pairs = list(_hard_smoothed())
    assert len(pairs) > 5000
    products = 0
    for x, smoother in pairs:
        wanted = _float32(x / smoother)
        inverse = _float32(1 / smoother)
        near = _float32(x * inverse)
        rest = x - near * smoother
        assert _float32(rest) == rest
        assert abs(near + rest * inverse - x / smoother) < _ulp(wanted) / 2**22
        assert _float32(near + rest * inverse) == wanted
        products += near != wanted
    assert products > 1000


def _hard_smoothed() -> Iterator[tuple[Fraction, Fraction]]:
    """x and smoother with mantissas of 11 and 24 bits, x / smoother within 2^-22 ulp of the middle of two floats:
    X 2^j = S B + d with B of 25 bits and odd, and |d| <= 8, so that B is -d / S modulo 2^j. None is the middle itself,
    d = 0: B would be a factor of X. Where S is even, d is a multiple of the same power of two."""
    for twos in range(4):
        s = np.arange(2 ** (23 - twos) + 1, 2 ** (24 - twos), 2, dtype=np.uint64)  # what is odd of S
        inverse = s.copy()
        for _ in range(5):  # modulo 2^64: from three bits on, each step doubles how many are right
            inverse *= 2 - s * inverse
        for d in (sign * size for size in range(1, (8 >> twos) + 1) for sign in (1, -1)):
            quotient = np.uint64(-d % 2**64) * inverse
            for j in (36, 37, 38):
                b = quotient & np.uint64(2 ** (j - twos) - 1)
                for i in np.flatnonzero((b >= 2**24) & (b < 2**25) & (b % 2 == 1)):
                    product = int(s[i]) * int(b[i]) + d
                    x = product >> (j - twos)
                    if 2**10 <= x < 2**11:
                        assert product == x << (j - twos)
                        yield Fraction(x), Fraction(int(s[i]) << twos)
