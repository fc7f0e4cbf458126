"""A builder of graphs whose weights come quantized, and what must become of those."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from qpass.quantize.pack import unpack_int4
from tests.rules.kit import Graph
from tests.rules.test_weight_only import attributes

INT4, UINT4 = ml_dtypes.int4, ml_dtypes.uint4
LIMITS = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8), "uint4": (0, 16), "int16": (-999, 999)}
PRESETS = ("w8a16", "w4a16", "w4a16-g128-zp", "w8a8")
K, N = 128, 48
PER_CHANNEL, GROUPWISE = "WeightOnlyQuantMatmul", "WeightOnlyGroupwiseQuantMatmul"


class Quantized(Graph):
    """A graph with weights that came quantized, and what they are: integers less zero points, and scales, [N, K]."""

    def __init__(self, opset: int = 21, seed: int = 0) -> None:
        super().__init__(opset, seed)
        self.codes: dict[str, Any] = {}
        self.scales: dict[str, Any] = {}

    def integers(self, dtype: Any, *shape: int) -> Any:
        return self.random.integers(*LIMITS[np.dtype(dtype).name], shape).astype(dtype)

    def dequantize(
        self,
        dtype: Any,
        shape: tuple[int, int] = (K, N),
        axis: int | None = 1,
        block: int = 0,
        zero: Any = None,
        floats: Any = np.float32,
        domain: str = "",
    ) -> str:
        """DequantizeLinear of a constant. `zero` is a value for all, or True for random ones."""
        per: tuple[int, ...] = () if axis is None else (shape[axis],)
        if block and axis is not None:
            per = tuple(n // block if i == axis else n for i, n in enumerate(shape))
        q, scale = self.integers(dtype, *shape), self.random.uniform(0.01, 0.03, per).astype(floats)
        names = [self.const(q, dtype, self.fresh("q")), self.const(scale, floats)]
        z = np.zeros(per, dtype)
        if zero is not None:
            z = self.integers(dtype, *per) if zero is True else np.full(per, zero, dtype)
            names.append(self.const(z, dtype))
        extra: dict[str, Any] = {} if axis is None else {"axis": axis}
        extra |= {"block_size": block} if block else {}
        out = self.op("DequantizeLinear", *names, domain=domain, **extra)

        def spread(a: Any) -> Any:
            if block and axis is not None:
                return np.repeat(a, block, axis)
            return np.broadcast_to(a if axis is None else np.expand_dims(a, 1 - axis), shape)

        self.codes[out] = q.astype(np.int32) - spread(z).astype(np.int32)
        self.scales[out] = spread(scale).astype(np.float32)
        return out

    def nbits(self, x: str, bits: int, block: int, k: int = K, n: int = N, zero: str = "", **options: Any) -> str:
        """com.microsoft.MatMulNBits with random integers; `zero` is "", "packed" or "float"."""
        blocks = -(-k // block)
        q = self.random.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
        packed = q if bits == 8 else q[:, 0::2] | q[:, 1::2] << 4
        floats = options.pop("floats", np.float32)
        scale = self.random.uniform(0.01, 0.03, (n, blocks)).astype(floats)
        z = np.full((n, blocks), 1 << bits - 1)
        names = [x, self.const(packed.reshape(n, blocks, -1), np.uint8), self.const(scale, floats)]
        if zero:
            z = self.random.integers(0, 1 << bits, (n, blocks))
            if zero == "float":
                names.append(self.const(z + options.pop("fraction", 0), floats))
            else:
                wide = np.pad(z, ((0, 0), (0, blocks % 2))).astype(np.uint8)
                names.append(self.const(z if bits == 8 else wide[:, 0::2] | wide[:, 1::2] << 4, np.uint8))
        order, bias = options.pop("order", None), options.pop("bias", None)
        if order is not None:
            names += [""] * (4 - len(names)) + [self.const(order, np.int32)]
        if bias is not None:
            names += [""] * (5 - len(names)) + [self.const(bias, floats)]
        out = self.op("MatMulNBits", *names, domain="com.microsoft", K=k, N=n, bits=bits, block_size=block, **options)
        self.codes[out] = (q.astype(int) - np.repeat(z, block, 1))[:, :k].T
        self.scales[out] = np.repeat(scale, block, 1)[:, :k].T.astype(np.float32)
        return out


def check(g: Quantized, result: onnx.ModelProto, node: onnx.NodeProto, weight: str) -> None:
    """The node holds the integers and scales of the weight, bit for bit."""
    stored = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    attrs = attributes(node)
    inputs = list(node.input)
    if node.op_type == "SmoothQuantGemm":
        codes, scale = stored[inputs[1]].astype(int), stored[inputs[3]][:, None]
    else:
        q, scale = stored[inputs[1]], stored[inputs[2]]
        codes = (q if attrs["weight_type_id"] == 1 else unpack_int4(q)).astype(int)
        group = int(attrs.get("group_size") or codes.shape[1])
        scale = np.repeat(scale.reshape(len(scale), -1), group, 1)
        if attrs.get("has_zero") or attrs.get("quant_algo", 0) & 2:
            zero = stored[inputs[3]].astype(int)
            codes = codes - np.repeat(zero.reshape(len(zero), -1), group, 1)
    assert np.array_equal(codes, g.codes[weight].T)
    assert np.array_equal(np.broadcast_to(scale, codes.shape), g.scales[weight].T)
