"""int4 in int8: along the last axis element 2i is the low nibble of byte i, element 2i + 1 the high one.

Nibbles are two's complement.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack_int4(q: NDArray[Any]) -> NDArray[np.int8]:
    """Pack integers in [-8, 7], shape [..., K], to int8 [..., K/2].

    Raises:
        ValueError: K is odd.
    """
    if q.shape[-1] % 2:
        raise ValueError(f"K={q.shape[-1]} is odd: int4 packs two values of a row into a byte")
    low, high = q[..., 0::2].astype(np.uint8), q[..., 1::2].astype(np.uint8)
    return (low & 0xF | high << 4).view(np.int8)


def unpack_int4(packed: NDArray[np.int8]) -> NDArray[np.int8]:
    """The inverse of `pack_int4`: int8 [..., K/2] to int8 [..., K]."""
    q = np.empty((*packed.shape, 2), np.int8)
    np.right_shift(np.left_shift(packed, 4), 4, out=q[..., 0])  # arithmetic shifts: the sign comes along
    np.right_shift(packed, 4, out=q[..., 1])
    return q.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
