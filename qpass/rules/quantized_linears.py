"""Lifting Linears of models that come quantized: com.microsoft's MatMulNBits, and activations between Q and DQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qpass.graph import Blockwise, Const, Dequantized, Given, Lazy, Node, Value
from qpass.rewriter import (
    Domain,
    Emit,
    Pattern,
    Replacement,
    absent,
    attr,
    cast,
    const,
    emitting,
    ir,
    keep,
    need,
    op,
    rule,
    scalar,
    val,
)
from qpass.rules.stored import StoredWeight, stored

Array = NDArray[Any]
MS = Domain("com.microsoft")

UINT = {4: np.dtype(ml_dtypes.uint4), 8: np.dtype(np.uint8)}


class NBitsLinear(Pattern):
    """ONNX Runtime's weight-only Linear, and the Add of a bias behind it."""

    x: Value = val("... K")
    q: Const = const()
    scale: Const = const()
    zero: Const | None = const()
    order: Const | None = const()
    b: Const | None = const("N")
    nbits = (
        MS.MatMulNBits(x, q, scale)
        | MS.MatMulNBits(x, q, scale, zero)
        | MS.MatMulNBits(x, q, scale, zero | absent(), order)
    )
    with_bias = MS.MatMulNBits(x, q, scale, zero | absent(), order | absent(), b)
    y = nbits + b | with_bias | nbits


class StaticLinear(Pattern):
    """A Linear on an activation that is quantized with a scale known beforehand."""

    before: Value | None = val("... K")
    target: Value | None = val()
    s: float = scalar()
    z: Const | None = const()
    w: Const = const("K N")
    b: Const | None = const("N")
    same = op.DequantizeLinear(op.QuantizeLinear(before, s, z, axis=attr()), s, z, axis=attr())
    # twice with one scale is once: so a tool writes it that quantizes Reshapes too
    x: Value = op.Reshape(same, target) | val("... K")
    q = op.QuantizeLinear(x, s, z, axis=attr()) | op.QuantizeLinear(x, s, axis=attr())
    foreign = MS.QuantizeLinear(x, s, z) | MS.QuantizeLinear(x, s)
    dq = (
        op.DequantizeLinear(q, s, z, axis=attr())
        | op.DequantizeLinear(q, s, axis=attr())
        | MS.DequantizeLinear(foreign, s, z)
        | MS.DequantizeLinear(foreign, s)
    )
    read = cast(dq)
    y = ir.Linear(read, w, b) | ir.Linear(read, w)


@dataclass(frozen=True)
class Static:
    """How a model says that an activation is quantized: q = clip(rint(x / scale) + zero, -128, 127)."""

    scale: float
    zero: int


def static(linear: Node) -> Static | None:
    """The static quantization of what a lifted Linear reads, where the model came with one."""
    attrs = linear.attrs
    return Static(attrs["scale"], attrs["zero"]) if "scale" in attrs else None


@rule
def lift_nbits(m: NBitsLinear, new: Emit, cfg: object) -> Replacement:
    """com.microsoft.MatMulNBits, as ONNX Runtime's operator documentation defines it: blocks of 4 or 8 bits along K,
    low nibble first, (q - zero) · scale, with 2^(bits-1) for zero points that are left out."""
    node = next(n for n in m.nodes if n.op == "MatMulNBits")
    bits, k, n, block = (int(node.attrs.get(a, d)) for a, d in (("bits", 4), ("K", 0), ("N", 0), ("block_size", 0)))
    need(bits in UINT, f"its weight has {bits} bits; qpass has ops for 8 and 4")
    need(not node.attrs.get("weight_prepacked", 0), "its weight is prepacked for another engine")
    need(k > 0 and n > 0 and block > 0, f"its attributes say K={k}, N={n}, block_size={block}")
    blocks = -(-k // block)
    need(
        m.q.array.size == n * blocks * block * bits // 8 and m.scale.array.size == n * blocks,
        f"B has shape {list(m.q.shape)} and scales {list(m.scale.shape)}, which do not fit K={k} and N={n}",
    )
    known = m.x.shape[-1] if m.x.shape else None
    need(not isinstance(known, int) or known == k, f"the weight has K={k}, the input K={known}")
    if m.order is not None:
        need(np.array_equal(m.order.load(), np.arange(k) // block), "g_idx reorders its input channels")
    q = _unpacked(m.q.array.reshape(n, -1), bits, k, m.q.origin)
    zero = _zero_points(m.zero, bits, n, blocks)
    sources = (m.scale.array, *([m.zero.array] if m.zero is not None else []))
    array = Dequantized(q, m.scale.array.reshape(n, blocks), zero, m.scale.dtype, block, sources)
    w = Const(m.q.name, array.T, root=m.q.root, via=(*m.q.via, node))
    return new.lifted("Linear", m.x, w, m.b, like=m.y)


def _unpacked(packed: Lazy, bits: int, k: int, name: str) -> Lazy:
    """uint8 [n, bytes] → unsigned integers [n, k]; the low nibble is the first of two."""

    def unpack(block: Array) -> tuple[Array]:
        if bits == 8:
            return (block[:, :k],)
        return (_nibbles(block)[:, :k].astype(UINT[4]),)

    return Blockwise(packed, unpack, [((packed.shape[0], k), UINT[bits])], name).results[0]


def _nibbles(packed: Array) -> Array:
    out = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=out[..., 0])
    np.right_shift(packed, 4, out=out[..., 1])
    return out.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _zero_points(zero: Const | None, bits: int, n: int, blocks: int) -> Lazy:
    """uint8 [n, blocks]: packed as the weight is, or one in each value of the activations' type."""
    if zero is None:
        return Given(np.full((n, blocks), 1 << bits - 1, np.uint8))
    values = zero.load().reshape(n, -1)
    if zero.dtype == np.uint8:
        values = (_nibbles(values) if bits == 4 else values)[:, :blocks]
    else:
        values = values.astype(np.float32)
        whole = bool(np.all((values == np.rint(values)) & (values >= 0) & (values < 1 << bits)))
        need(whole, "its zero points are no integers of the weight's type")
        values = values.astype(np.uint8)
    need(values.shape == (n, blocks), f"its zero points have shape {list(zero.shape)}")
    return Given(values)


@emitting("Linear")
@rule
def lift_static(m: StaticLinear, new: Emit, cfg: object) -> Replacement:
    """QuantizeLinear and DequantizeLinear before a Linear with int8 weights: the Linear reads what comes before them,
    and says how that is quantized. Where something else reads the pair, it stays for that."""
    came = stored(m.w)
    if not isinstance(came, StoredWeight) or not came.is_symmetric_int8:
        keep("only its activations are quantized as the int8 GEMM takes them, its weight is not")
    dtype = np.dtype(np.uint8) if m.z is None else m.z.dtype
    if dtype not in (np.uint8, np.int8) or (m.z is not None and m.z.array.size != 1) or not 0 < m.s < np.inf:
        keep(f"its activations are quantized to {dtype}, scale {m.s:g}; the int8 GEMM takes 8 bits, one scale for all")
    zero = 0 if m.z is None else int(m.z.load().reshape(()))
    zero -= 128 * (dtype == np.uint8)  # q and zero point move together
    x = m.x if m.before is None else new.onnx("Reshape", m.before, m.target, like=m.x)
    return new.lifted("Linear", x, m.w, m.b, like=m.y, scale=m.s, zero=zero)


LIFT_QUANTIZED = (lift_nbits,)
LIFT_STATIC = (lift_static,)
