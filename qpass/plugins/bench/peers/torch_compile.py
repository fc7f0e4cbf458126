"""What torch.compile makes of a norm, or of a norm or activation and the quantization behind it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from qpass.ops.activation_quantization import Activation
from qpass.plugins.bench.jobs import DTYPES, Job
from qpass.plugins.bench.peers.base import TorchPeer
from qpass.plugins.bench.timing import Call


class TorchCompile(TorchPeer):
    """The same arithmetic on the same tensors, compiled for its very shape, by rules and by an autotuner, whose choice
    differs from run to run and is several times slower at times. The faster counts."""

    name = "torch.compile"

    def applies(self, job: Job) -> bool:
        return not job.n

    def key(self, job: Job) -> Hashable:
        return job.key

    def bytes(self, job: Job) -> int:
        return job.bytes(DTYPES[self.dtype])

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        for mode in ("default", "max-autotune-no-cudagraphs"):
            self.torch.compiler.reset()  # so many shapes are too many for one function: it would go on uncompiled
            work = self.torch.compile(self._work(job), mode=mode, dynamic=False)
            yield [self.on_stream(work, **self._tensors(job)) for _ in range(copies)]

    def _tensors(self, job: Job) -> dict[str, Any]:
        """The op's own inputs by name. In these jobs they are floats; a static scale and smoothers are about 1."""
        made = {}
        for name, (dtype, shape) in job.inputs(DTYPES[self.dtype]).items():
            made[name] = self.random(*shape, dtype=getattr(self.torch, dtype.name))
            if name in ("scale", "smoother"):
                made[name] = made[name].abs() + 0.5
        return made

    def _work(self, job: Job) -> Callable[..., Any]:
        torch, functional = self.torch, self.torch.nn.functional
        op, epsilon = job.op, float(job.attrs.get("epsilon", 0))
        gelu = job.attrs.get("activation") == Activation.GELU
        written = job.outputs(DTYPES[self.dtype])

        def work(
            x: Any,
            residual: Any = None,
            gamma: Any = None,
            beta: Any = None,
            up: Any = None,
            smoother: Any = None,
            scale: Any = None,
        ) -> Any:
            total = x if residual is None else x + residual
            y = total.float()
            if op in ("Layernorm", "LayernormQuantization"):
                y = functional.layer_norm(y, y.shape[-1:], gamma.float(), beta.float(), epsilon)
            elif op in ("Rmsnorm", "RmsnormQuantization"):
                y = functional.rms_norm(y, y.shape[-1:], gamma.float(), epsilon)
            elif op == "ActivationQuantization":
                y = functional.gelu(y) if gelu else functional.silu(y)
                y = y if up is None else y * up.float()
            normed = y.to(x.dtype) if "y" in written else None
            if "q" not in written:
                return normed, total if "sum" in written else None
            y = y if smoother is None else y / smoother
            by = y.abs().amax(-1, keepdim=True) / 127 if scale is None else scale
            q = torch.round(y / by).clamp(-128, 127).to(torch.int8)
            return q, by, total if "sum" in written else None, normed

        return work
