"""Weights that came quantized: their integers, scales and zero points as qpass's ops take them, bit by bit."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Blockwise, Const, Dequantized, Kept, Lazy
from qpass.graph.lazy import Elementwise, Transposed, is_cast
from qpass.ops.weight_only_groupwise_quant_matmul import GROUP_SIZES
from qpass.quantize.pack import pack_int4

Array = NDArray[Any]

INT8, FLOAT32 = np.dtype(np.int8), np.dtype(np.float32)

BITS = {"int8": (8, 0), "uint8": (8, 128), "int4": (4, 0), "uint4": (4, 8)}
"""Types of integers: their bits, and what makes the unsigned ones signed when taken from code and zero point alike."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A quantized weight [N, K]: w = (q − zero) · scale.

    Args:
        weight: int8 [N, K], or [N, K/2] where `bits` is 4 (see `qpass.quantize.pack`).
        scale: float32 [N], or [N, K/group].
        zero: int8, of scale's shape; None where every one is 0.
        group: None for scales per output channel.
        came: what it was, for the ledger.
    """

    weight: Lazy
    scale: Lazy
    zero: Lazy | None
    bits: int
    group: int | None
    came: str

    @property
    def is_symmetric_int8(self) -> bool:
        """Whether the int8 GEMM takes it."""
        return self.bits == 8 and self.group is None and self.zero is None


def find(array: Lazy) -> Dequantized | None:
    """The quantized array that a weight is made of, whatever was done with its values since."""
    if isinstance(array, Dequantized):
        return array
    return next((d for p in array.parts() if (d := find(p)) is not None), None)


def stored(w: Const) -> StoredWeight | str | None:
    """The integers of a weight [K, N]; why no op of qpass takes them; None for one that did not come quantized."""
    d = find(w.array)
    if d is None:
        return None
    came = f"its weight came quantized: {d.base.dtype}"
    seen = _as_it_came(w.array.T)
    if seen is None:
        return f"{came}, and is not used as it is: its values are moved or changed"
    d, factor = seen
    n, k = d.shape
    if d.base.dtype.name not in BITS:
        return f"{came}; qpass has ops for int8 and int4"
    bits, offset = BITS[d.base.dtype.name]
    rows, columns = d.scale.shape
    if rows not in (1, n):
        return f"{came}, with a scale for each {d.block} output channels"
    if columns == k > 1 and d.block == 1:
        return f"{came}, with scales along its input channels"
    if bits == 4 and k % 2:
        return f"{came}; K={k} is odd, and int4 packs two weights of a row into a byte"
    group = None
    if columns > 1:
        group = next((g for g in sorted(GROUP_SIZES, reverse=True) if d.block % g == 0 == k % g), None)
        if group is None:
            sizes = ", ".join(map(str, GROUP_SIZES))
            return f"{came}, group {d.block}; K={k} does not divide into groups of {sizes} that share a scale"
    zero = _zeros(d, offset)
    kind = "" if zero is None else ", with zero points"
    if columns > 1:
        came += f", group {d.block}"
    elif rows == 1 and n > 1:
        came += ", per tensor"
    return StoredWeight(
        weight=_integers(d.base, bits, offset, w.origin),
        scale=_per_channel_or_group(d, factor, group),
        zero=None if zero is None else _spread_zeros(d, zero, group),
        bits=bits,
        group=group,
        came=came + kind,
    )


def _as_it_came(array: Lazy, factor: float = 1.0) -> tuple[Dequantized, float] | None:
    """`array` as integers with scales, and the power of two that its scales are multiplied by (Gemm's alpha)."""
    if isinstance(array, Dequantized):
        return array, factor
    if isinstance(array, Transposed):
        inner = _as_it_came(array.base, factor)
        if inner is None:
            return None
        turned = inner[0].T
        assert isinstance(turned, Dequantized)
        return turned, inner[1]
    if is_cast(array) and array.dtype.name in ("float32", "float16", "bfloat16"):
        (inner_array,) = array.parts()
        return _as_it_came(inner_array, factor)
    if isinstance(array, Elementwise) and array.fn is operator.mul:
        base, by = array.operands
        if isinstance(base, Lazy) and isinstance(by, int | float) and abs(math.frexp(by)[0]) == 0.5:
            return _as_it_came(base, factor * by)
    return None


def _integers(q: Lazy, bits: int, offset: int, name: str) -> Lazy:
    """q [N, K] as int8, or packed int4 in int8."""
    if bits == 8 and not offset:
        return q
    n, k = q.shape

    def convert(block: Array) -> tuple[Array]:
        signed = np.subtract(block, np.uint8(offset), order="C").view(np.int8)  # modulo 256, as two's complement is
        return (pack_int4(signed) if bits == 4 else signed,)

    # bytes, so that the writer's blocks are measured by what they take in memory
    codes = q if q.dtype == np.uint8 else q.astype(np.int8).astype(np.uint8)
    return Blockwise(codes, convert, [((n, k * bits // 8), INT8)], name).results[0]


def _zeros(d: Dequantized, offset: int) -> Array | None:
    """Signed zero points of scale's shape, int8; None where all are 0."""
    if d.zero is None:
        return np.full(d.scale.shape, -offset, np.int8) if offset else None
    zero = (d.zero.load().astype(np.int16) - offset).astype(np.int8)
    return zero if zero.any() else None


def _per_channel_or_group(d: Dequantized, factor: float, group: int | None) -> Lazy:
    n, k = d.shape
    scale, block = d.scale, d.block

    def make() -> Array:
        return _spread(scale.load().astype(np.float32) * np.float32(factor), n, k, block, group)

    return Kept((n,) if group is None else (n, k // group), FLOAT32, make)


def _spread_zeros(d: Dequantized, zero: Array, group: int | None) -> Lazy:
    n, k = d.shape
    block = d.block
    return Kept((n,) if group is None else (n, k // group), INT8, lambda: _spread(zero, n, k, block, group))


def _spread(per_block: Array, n: int, k: int, block: int, group: int | None) -> Array:
    """[1 or N, 1 or K/block] → [N] or [N, K/group], each value as often as its block has groups."""
    out = np.broadcast_to(per_block, (n, per_block.shape[1]))
    if group is None:
        return np.ascontiguousarray(out[:, 0])
    return np.ascontiguousarray(np.repeat(out, block // group, 1)[:, : k // group])
