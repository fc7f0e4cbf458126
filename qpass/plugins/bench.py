"""How fast the kernels are: each beside its floor, and matmuls beside cuBLAS in 16 bits, in one run.

The floor of a call is the time that its bytes take at the rate of a device-to-device copy, or its operations at the
rate of the tensor cores, whichever is longer; both rates are measured in the same run (8 bits: twice the 16-bit rate).
Calls are captured into a CUDA graph, one after the other on copies of the inputs that together exceed the L2 cache, so
that neither launches nor a warm cache are measured; small activations stay in the cache, as they do in a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import ml_dtypes
import numpy as np
from onnx import helper

from qpass import gpu
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.ops.base import Attr
from qpass.ops.shapes import concrete
from qpass.ops.weight_only_quant_matmul import INT8
from qpass.plugins.cublas import WORKSPACE, Cublas
from qpass.plugins.library import DeviceTensor, Library

WEIGHTS = ((4096, 4096), (8192, 8192), (57344, 8192), (8192, 28672))
TOKENS = (1, 16, 64, 256, 1024, 4096)
ROWS = ((1, 4096), (16, 8192), (4096, 4096), (16384, 4096), (16384, 8192))
REPLAYS = 15
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Job:
    """One call to time. `n` is 0 where the op has no weight."""

    op: str
    variant: str
    attrs: dict[str, Attr]
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Row:
    """What one call took: the median of replays in µs, the slowest over the fastest, rates, floor and peer."""

    op: str
    variant: str
    m: int
    n: int
    k: int
    us: float
    spread: float
    gb_per_s: float
    tflop_per_s: float
    floor_us: float
    share_of_floor: float
    cublas_us: float | None
    times_cublas: float | None


def jobs(only: Sequence[str] = (), quick: bool = False) -> list[Job]:
    """The calls to time: matmuls at the sizes of 7B to 70B models, everything else on rows of their hidden sizes."""
    found = [*_rows(), *_matmuls(WEIGHTS[:2] if quick else WEIGHTS, TOKENS[::2] if quick else TOKENS)]
    return [j for j in found if not only or j.op in only]


def _rows() -> Iterator[Job]:
    for m, k in ROWS:
        for op in ("LayernormQuantization", "RmsnormQuantization"):
            yield _job(op, "per-token", ["x", "gamma"] + ["beta"] * (op[0] == "L"), ["q", "scale"], {}, m, 0, k)
        norm = "RmsnormQuantization"
        yield _job(norm, "static", ["x", "gamma", "scale"], ["q"], {}, m, 0, k)
        yield _job(norm, "per-token, residual", ["x", "residual", "gamma"], ["q", "scale", "sum"], {}, m, 0, k)
        yield _job("QuantizePerToken", "", ["x"], ["q", "scale"], {}, m, 0, k)
        yield _job("QuantizeTensor", "", ["x", "scale"], ["q"], {}, m, 0, k)
        yield _job("ActivationQuantization", "gelu", ["x"], ["q", "scale"], {"activation": 0}, m, 0, k)
        yield _job("ActivationQuantization", "silu, gated", ["x", "up"], ["q", "scale"], {"activation": 4}, m, 0, k)


def _matmuls(weights: Sequence[tuple[int, int]], tokens: Sequence[int]) -> Iterator[Job]:
    group = "WeightOnlyGroupwiseQuantMatmul"
    x, w, s = "x", "weight", "scale"
    for (n, k), m in ((nk, m) for nk in weights for m in tokens):
        gemm = ["q", w, "scale_a", "scale_w"]
        yield _job("SmoothQuantGemm", "per-token", gemm, ["y"], {"output_type": 16}, m, n, k)
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


class Bench:
    """Times calls on the GPU.

    Args:
        dtype: of the activations.

    Raises:
        QpassError: there is no GPU.
    """

    def __init__(self, library: Library, dtype: str = "bfloat16") -> None:
        gpu.driver()
        self.library = library
        self.dtype = DTYPES[dtype]
        self._workspace = gpu.Buffer(WORKSPACE)
        self._cublas = Cublas(self._workspace.address)
        self._peers: dict[tuple[int, int, int], float | None] = {}

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a device-to-device copy, read and written."""
        size = 1 << 30
        a, b = gpu.Buffer(size), gpu.Buffer(size)
        a.fill(0x3C)
        copy = gpu.driver().memcpy_dtod_async
        stream = gpu.driver().Stream()
        times = _timed(lambda: copy(b.address, a.address, size, stream), stream)
        return 2 * size / (_median(times) * 1e-6)

    @cached_property
    def tensor_rate(self) -> float:
        """Operations a second of a large 16-bit product of cuBLAS's; 0 where there is no cuBLAS."""
        m = n = k = 8192
        us = self.cublas(m, n, k)
        return 2.0 * m * n * k / (us * 1e-6) if us else 0.0

    def cublas(self, m: int, n: int, k: int) -> float | None:
        """µs of x [m, k] · w [n, k]ᵀ in 16 bits; None where cuBLAS is not installed."""
        if (m, n, k) not in self._peers:
            self._peers[m, n, k] = self._time_cublas(m, n, k)
        return self._peers[m, n, k]

    def _time_cublas(self, m: int, n: int, k: int) -> float | None:
        dtype = self.dtype if self.dtype.itemsize == 2 else np.dtype(np.float16)
        count = _copies(n * k * 2)
        x, y = _filled(dtype, (m, k)), _filled(dtype, (m, n))
        weights = [_filled(dtype, (n, k)) for _ in range(count)]
        try:
            times = self._replay([partial(self._cublas.matmul, x.tensor, w.tensor, y.tensor) for w in weights])
        except QpassError as error:
            if "not installed" in str(error):
                return None
            raise
        return _median(times)

    def time(self, job: Job) -> Row:
        """Time one call."""
        op, attrs = REGISTRY[job.op], job.attrs
        names = {"K": job.k, "N": job.n}
        shapes = [concrete(t.shape, attrs, names, (job.m,)) if t.present(attrs) else None for t in op.inputs]
        dtypes = [
            None if s is None else self.dtype if t.kind == "T" else _dtype(t.kind, attrs)
            for t, s in zip(op.inputs, shapes, strict=True)
        ]
        kinds = [None if s is None or d is None else (d, s) for s, d in zip(shapes, dtypes, strict=True)]
        results = [(d, tuple(int(i or 0) for i in s or ())) for d, s in op.infer(kinds, attrs)]
        present = [k for k in kinds if k is not None]
        read, written = (sum(_size(k) for k in group) for group in (present, results))
        node = self.library.node(job.op, attrs)
        calls: list[Callable[[int], None]] = []
        keep: list[Any] = []
        for _ in range(_copies(read + written)):
            inputs, outputs = [_filled(*k) for k in present], [_filled(*k) for k in results]
            ins, outs = [f.tensor for f in inputs], [f.tensor for f in outputs]
            workspace = gpu.Buffer(node.workspace(ins, outs)) if not keep else keep[0][2]
            keep.append((inputs, outputs, workspace))
            calls.append(partial(node.run, ins, outs, workspace.address))
        times = self._replay(calls)
        us = _median(times)
        flops = 2.0 * job.m * job.n * job.k
        rate = self.tensor_rate * (2 if job.op == "SmoothQuantGemm" else 1)
        floor = max((read + written) / self.bandwidth, flops / rate if rate else 0.0) * 1e6
        peer = self.cublas(job.m, job.n, job.k) if job.n else None
        return Row(
            job.op,
            job.variant,
            job.m,
            job.n,
            job.k,
            us,
            max(times) / min(times),
            (read + written) / us * 1e-3,
            flops / us * 1e-6,
            floor,
            floor / us,
            peer,
            peer / us if peer else None,
        )

    @staticmethod
    def _replay(calls: Sequence[Callable[[int], None]]) -> list[float]:
        """µs a call, of each replay of a graph that holds all of them, several times over where they are few."""
        rounds = math.ceil(8 / len(calls))
        for call in calls:  # what is made at a first call must not be made during the capture
            call(0)
        gpu.synchronize()

        def work(stream: Any) -> None:
            for _ in range(rounds):
                for call in calls:
                    call(stream.handle)

        graph = gpu.Graph(work)
        return [t / (rounds * len(calls)) for t in _timed(graph.launch, graph.stream)]


def to_dict(bench: Bench, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything of a run, for JSON."""
    return {
        "device": gpu.device().name(),
        "dtype": bench.dtype.name,
        "copy_tb_per_s": bench.bandwidth / 1e12,
        "cublas_tflop_per_s": bench.tensor_rate / 1e12,
        "rows": [asdict(r) for r in rows],
    }


class _filled:
    """A tensor in GPU memory with random content; owns it."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        size = math.prod(shape) * dtype.itemsize
        self.buffer = gpu.Buffer(size)
        rng = np.random.default_rng(size)
        block = min(math.prod(shape), 1 << 20)
        if dtype == np.int8:
            tile = rng.integers(-128, 128, block).astype(np.int8)
        else:
            tile = (
                rng.uniform(0.5, 2, block).astype(dtype)
                if dtype == np.float32
                else rng.normal(size=block).astype(dtype)
            )
        for start in range(0, size, tile.nbytes or 1):
            self.buffer.upload(tile[: (size - start) // dtype.itemsize], start)
        self.tensor = DeviceTensor(self.buffer.address, dtype, shape)


def _copies(size: int) -> int:
    """Sets of tensors that together are several times the largest L2, or as many as one wants to hold."""
    return min(64, max(1, math.ceil((256 << 20) / max(size, 1))))


def _size(kind: tuple[np.dtype[Any], tuple[int, ...]]) -> int:
    return kind[0].itemsize * math.prod(kind[1])


def _dtype(kind: str, attrs: dict[str, Attr]) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(int(attrs["output_type"])) if kind == "output_type" else np.dtype(kind)


def _timed(work: Callable[[], Any], stream: Any) -> list[float]:
    """µs of each of `REPLAYS` runs, after three to warm up."""
    cuda = gpu.driver()
    times = []
    for i in range(REPLAYS + 3):
        start, end = cuda.Event(), cuda.Event()
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        if i >= 3:
            times.append(start.time_till(end) * 1e3)
    return times


def _median(times: Sequence[float]) -> float:
    return float(np.median(times))
