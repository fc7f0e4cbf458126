"""What a peer is: something else that does an op's work, or the work that the op is there to save."""

from __future__ import annotations

import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.timing import Call

INT8_GEMM = "SmoothQuantGemm"
WEIGHT_ONLY = "WeightOnlyQuantMatmul"
GROUPWISE = "WeightOnlyGroupwiseQuantMatmul"


class Peer(ABC):
    """One column of results. Nothing that it stands for is imported before its calls are asked for."""

    name: str

    @abstractmethod
    def applies(self, job: Job) -> bool:
        """Whether it does the work of this op at all."""

    def key(self, job: Job) -> Hashable:
        """Jobs of one key are one to it, and are timed once; by default those of one M, N and K."""
        return job.m, job.n, job.k

    @abstractmethod
    def bytes(self, job: Job) -> int:
        """What a call reads and writes."""

    @abstractmethod
    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        """For each way that it has of doing the work, one call on each of `copies` sets of tensors.

        Raises:
            QpassError: it is not installed, or refuses the job. Whatever else it raises is noted too.
        """

    def prepare(self, jobs: Sequence[Job]) -> None:  # noqa: B027 - most have nothing to prepare
        """Compile ahead what these jobs will need, where that is faster together."""

    def release(self) -> None:  # noqa: B027 - memory of qpass's own goes with the calls
        """Give back the GPU memory that calls had, once they are gone."""


def matmul_bytes(job: Job, x: float, weight: float, y: float) -> int:
    """What a product reads and writes, by the bytes of an element of each."""
    return int(job.m * job.k * x + job.n * job.k * weight + job.m * job.n * y)


def imported(module: str, package: str) -> Any:
    """A module that may not be there.

    Raises:
        QpassError: it is not, or cannot be imported.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise QpassError(f"not installed: pip install {package}")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise QpassError(f"{module} cannot be imported: {error}") from error


class TorchPeer(Peer):
    """A peer of PyTorch's. Its tensors are PyTorch's own, in the same CUDA context as qpass's.

    Args:
        dtype: of the activations, "float16", "bfloat16" or "float32".
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    @cached_property
    def torch(self) -> Any:
        torch = imported("torch", "torch")
        if not torch.cuda.is_available():
            raise QpassError("this PyTorch finds no GPU")
        return torch

    @property
    def float_type(self) -> Any:
        """PyTorch's type of 16-bit activations; bfloat16 where the bench's have 32 bits."""
        return self.torch.float16 if self.dtype == "float16" else self.torch.bfloat16

    def random(self, *shape: int, dtype: Any = None) -> Any:
        """Normal numbers on the GPU."""
        return self.torch.randn(shape, dtype=dtype or self.float_type, device="cuda")

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: Any) -> Any:
        """Uniform ones, `high` left out."""
        return self.torch.randint(low, high, tuple(shape), dtype=dtype, device="cuda")

    def on_stream(self, work: Any, *arguments: Any, **named: Any) -> Call:
        """`work` as a call."""
        torch = self.torch

        def call(stream: int) -> Any:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                return work(*arguments, **named)

        return call

    def release(self) -> None:
        if "torch" in self.__dict__:
            self.torch.cuda.empty_cache()


def threads() -> int:
    """Compilers at a time."""
    return len(os.sched_getaffinity(0))
