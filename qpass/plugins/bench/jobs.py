"""What is timed: matmuls at the sizes of 7B to 70B models, everything else on rows of their hidden sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.ops.base import Attr, Tensor
from qpass.ops.shapes import concrete
from qpass.ops.weight_only_quant_matmul import INT8

WEIGHTS = ((4096, 4096), (8192, 8192), (57344, 8192), (8192, 28672))
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
SMALL = (4096, 768)
"""Rows of BERT's hidden size: what a kernel does once a block counts here."""
ROWS = (SMALL, *((m, 4096) for m in (1, 4, 16, 4096, 16384)), *((m, 8192) for m in (16, 4096, 16384)))
SMOOTHED = (SMALL, (4096, 4096))
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

Kind = tuple[np.dtype[Any], tuple[int, ...]]
"""The dtype and shape of a tensor."""


@dataclass(frozen=True)
class Job:
    """One call to time. `n` is 0 where the op has no weight."""

    op: str
    variant: str
    attrs: dict[str, Attr]
    m: int
    n: int
    k: int

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What tells jobs, and the rows of results, apart."""
        return self.op, self.variant, self.m, self.n, self.k

    @property
    def flops(self) -> float:
        """Operations of the product; 0 where there is none."""
        return 2.0 * self.m * self.n * self.k

    def inputs(self, activations: np.dtype[Any]) -> dict[str, Kind]:
        """The present inputs by name, in the order of nodes."""
        return {t.name: self._kind(t, activations) for t in REGISTRY[self.op].inputs if t.present(self.attrs)}

    def outputs(self, activations: np.dtype[Any]) -> dict[str, Kind]:
        """The present outputs likewise."""
        return {t.name: self._kind(t, activations) for t in REGISTRY[self.op].outputs if t.present(self.attrs)}

    def bytes(self, activations: np.dtype[Any]) -> int:
        """What the call must read and write."""
        kinds = (*self.inputs(activations).values(), *self.outputs(activations).values())
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds)

    def _kind(self, tensor: Tensor, activations: np.dtype[Any]) -> Kind:
        shape = concrete(tensor.shape, self.attrs, {"K": self.k, "N": self.n}, (self.m,))
        if tensor.kind == "T":
            return activations, shape
        if tensor.kind == "output_type":
            return helper.tensor_dtype_to_np_dtype(int(self.attrs["output_type"])), shape
        return np.dtype(tensor.kind), shape


def jobs(
    only: Sequence[str] = (),
    tokens: Sequence[int] = (),
    shapes: Sequence[tuple[int, int]] = (),
    quick: bool = False,
) -> list[Job]:
    """The calls to time.

    Args:
        only: names of ops; all where empty, as for the other filters.
        tokens: M. Matmuls take any, other ops those of `ROWS`, as of shapes.
        shapes: N and K, a multiple of 128 where there are weights, whose groups have as many; N is 0 for ops without.
        quick: fewer sizes, where none are told.

    Raises:
        QpassError: the filters leave nothing, of which is said what sizes there are, or K is no multiple of 128.
    """
    weights = [(n, k) for n, k in shapes if n] or ([] if shapes else WEIGHTS[:2] if quick else WEIGHTS)
    for n, k in weights:
        if k % 128:
            raise QpassError(f"--shape {n}x{k}: K must be a multiple of 128, the size of groups")
    matmuls = _matmuls(weights, tokens or (TOKENS[::2] if quick else TOKENS))
    found = [
        j
        for j in (*_rows(), *matmuls)
        if (not only or j.op in only) and (not tokens or j.m in tokens) and (not shapes or (j.n, j.k) in shapes)
    ]
    if not found:
        rows, widths = (", ".join(map(str, sorted(set(sizes)))) for sizes in zip(*ROWS, strict=True))
        raise QpassError(
            f"--op, --m and --shape leave nothing to time; of ops without a weight M are {rows}, and K {widths}"
        )
    return found


def shape(text: str) -> tuple[int, int]:
    """N and K of "8192x28672", or of "4096", which has no N.

    Raises:
        QpassError: it is neither.
    """
    match = re.fullmatch(r"(?:(\d+)[x×])?(\d+)", text)
    if match is None:
        raise QpassError(f"--shape {text}: wants NxK, such as 8192x28672, or K alone for ops without a weight")
    return int(match[1] or 0), int(match[2])


def _rows() -> Iterator[Job]:
    for m, k in ROWS:
        for op in ("LayernormQuantization", "RmsnormQuantization"):
            yield _job(op, "per-token", ["x", "gamma"] + ["beta"] * (op[0] == "L"), ["q", "scale"], {}, m, 0, k)
        norm = "RmsnormQuantization"
        yield _job(norm, "static", ["x", "gamma", "scale"], ["q"], {}, m, 0, k)
        yield _job(norm, "per-token, residual", ["x", "residual", "gamma"], ["q", "scale", "sum"], {}, m, 0, k)
        yield _job("Rmsnorm", "residual", ["x", "residual", "gamma"], ["y", "sum"], {}, m, 0, k)
        yield _job("QuantizePerToken", "", ["x"], ["q", "scale"], {}, m, 0, k)
        yield _job("QuantizeTensor", "", ["x", "scale"], ["q"], {}, m, 0, k)
        yield _job("ActivationQuantization", "gelu", ["x"], ["q", "scale"], {"activation": 0}, m, 0, k)
        yield _job("ActivationQuantization", "silu, gated", ["x", "up"], ["q", "scale"], {"activation": 4}, m, 0, k)
        if (m, k) in SMOOTHED:
            both, smoothed = ["x", "residual", "gamma", "beta", "smoother"], ["x", "smoother"]
            yield _job("LayernormQuantization", "residual, smoothed", both, ["q", "scale", "y"], {}, m, 0, k)
            yield _job("Layernorm", "residual", both[:-1], ["y"], {}, m, 0, k)
            yield _job("QuantizePerToken", "smoothed", smoothed, ["q", "scale"], {}, m, 0, k)
            yield _job("ActivationQuantization", "gelu, smoothed", smoothed, ["q", "scale"], {"activation": 0}, m, 0, k)


def _matmuls(weights: Sequence[tuple[int, int]], tokens: Sequence[int]) -> Iterator[Job]:
    group = "WeightOnlyGroupwiseQuantMatmul"
    x, w, s = "x", "weight", "scale"
    for (n, k), m in ((nk, m) for nk in weights for m in tokens):
        gemm = ["q", w, "scale_a", "scale_w"]
        yield _job("SmoothQuantGemm", "per-token", gemm, ["y"], {"output_type": TensorProto.BFLOAT16}, m, n, k)
        yield _job("WeightOnlyQuantMatmul", "int8", [x, w, s], ["y"], {"weight_type_id": INT8}, m, n, k)
        yield _job(group, "int4 g128", [x, w, s], ["y"], {"group_size": 128}, m, n, k)
        if (n, k) == (8192, 8192):
            yield _job(group, "int4 g64", [x, w, s], ["y"], {"group_size": 64}, m, n, k)
            yield _job(group, "int4 g32", [x, w, s], ["y"], {"group_size": 32}, m, n, k)
            full = [x, "pre_quant_scale", w, s, "zero", "bias"]
            yield _job(group, "int4 g128, all", full, ["y"], {"group_size": 128}, m, n, k)


def _job(
    op: str, variant: str, inputs: list[str], outputs: list[str], attrs: dict[str, Attr], m: int, n: int, k: int
) -> Job:
    return Job(op, variant, REGISTRY[op].attributes_for(inputs, outputs, attrs), m, n, k)
