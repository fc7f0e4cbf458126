"""The library's ops as what is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpass import gpu
from qpass.plugins.bench.jobs import DTYPES, Job
from qpass.plugins.bench.timing import Filled
from qpass.plugins.library import Choice, DeviceTensor, Library, Node


@dataclass(frozen=True)
class Ours:
    """Calls of a library's ops; `dtype`, a key of `DTYPES`, is their activations'."""

    library: Library
    dtype: str

    def bytes(self, job: Job) -> int:
        """What a call reads and writes."""
        return job.bytes(DTYPES[self.dtype])

    def calls(self, job: Job, copies: int) -> list[Run]:
        """One call on each of `copies` sets of tensors, with one workspace for all."""
        node, dtype = self.library.node(job.op, job.attrs), DTYPES[self.dtype]
        sets = [
            ([Filled(k) for k in job.inputs(dtype).values()], [Filled(k) for k in job.outputs(dtype).values()])
            for _ in range(copies)
        ]
        inputs, outputs = sets[0]
        workspace = gpu.Buffer(node.workspace([i.tensor for i in inputs], [o.tensor for o in outputs]))
        return [Run(node, inputs, outputs, workspace) for inputs, outputs in sets]

    def launch_us(self) -> float:
        """What a launch alone takes of the CPU: no op's call can take less."""
        stream = gpu.driver().Stream()
        gpu.synchronize()
        us = self.library.launch_us(stream.handle)
        gpu.synchronize()
        return us

    def host_us(self, job: Job) -> float:
        """What enqueueing a call takes of the CPU."""
        (run,) = self.calls(job, 1)
        return run.host_us(gpu.driver().Stream())


@dataclass(frozen=True)
class Run:
    """A call that holds its tensors; a `timing.Call`."""

    node: Node
    inputs: Sequence[Filled]
    outputs: Sequence[Filled]
    workspace: gpu.Buffer

    def __call__(self, stream: int) -> None:
        inputs, outputs = self._tensors()
        self.node.run(inputs, outputs, self.workspace.address, stream)

    def host_us(self, stream: Any) -> float:
        """Of the CPU, a call; the GPU is idle before and after."""
        gpu.synchronize()
        us = self.node.host_us(*self._tensors(), self.workspace.address, stream.handle)
        gpu.synchronize()
        return us

    def choice(self) -> Choice:
        """The variants that it can take."""
        return self.node.choice(*self._tensors())

    def take(self, variant: str) -> None:
        """Go by this one from now on, as do all calls that were made with it."""
        self.node.take(variant)

    def _tensors(self) -> tuple[list[DeviceTensor], list[DeviceTensor]]:
        return [i.tensor for i in self.inputs], [o.tensor for o in self.outputs]
