from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qpass.quantize.pack import pack_int4, unpack_int4


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(0, 5), st.integers(0, 9).map(lambda k: 2 * k)), elements=st.integers(-8, 7)
    )
)
def test_unpack_inverts_pack(q: np.ndarray) -> None:
    packed = pack_int4(q)
    assert packed.dtype == np.int8
    assert packed.shape == (q.shape[0], q.shape[1] // 2)
    assert np.array_equal(unpack_int4(packed), q)


@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 8))))
def test_pack_inverts_unpack(packed: np.ndarray) -> None:
    q = unpack_int4(packed)
    assert q.min() >= -8
    assert q.max() <= 7
    assert np.array_equal(pack_int4(q), packed)


def test_even_elements_are_the_low_nibbles() -> None:
    assert pack_int4(np.array([[1, -2], [-8, 7], [7, -8]])).tolist() == [[-31], [120], [-121]]
    assert pack_int4(np.array([1, 2, 3, 4])).view(np.uint8).tolist() == [0x21, 0x43]


def test_odd_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="K=3 is odd"):
        pack_int4(np.zeros((2, 3), np.int8))
