"""Humming: weight-only products compiled for their shape, by the package humming-kernels."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import Job
from qpass.plugins.bench.peers.base import GROUPWISE, WEIGHT_ONLY, TorchPeer, imported, matmul_bytes, threads
from qpass.plugins.bench.timing import Call


class Humming(TorchPeer):
    """Its layer with the op's weights: int8 a channel, or int4 in groups, with the op's zero points and bias.

    A kernel is tuned by Humming's own table for the GPU and number of tokens. It has no pre_quant_scale.
    """

    name = "humming"

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self._layers: dict[Hashable, Any] = {}

    def applies(self, job: Job) -> bool:
        return job.op in (WEIGHT_ONLY, GROUPWISE)

    def key(self, job: Job) -> Hashable:
        return job.m, self._layer_key(job)

    def bytes(self, job: Job) -> int:
        return matmul_bytes(job, 2, 1 if job.op == WEIGHT_ONLY else 0.5, 2)

    def calls(self, job: Job, copies: int) -> Iterator[list[Call]]:
        layer = self._layer(job)
        tuning = self._tuning(layer, job.m)
        calls = []
        for _ in range(copies):
            x, y = self.random(job.m, job.k), self.torch.empty(job.m, job.n, dtype=self.float_type, device="cuda")
            calls.append(self.on_stream(copy.deepcopy(layer), x, outputs=y, tuning_config=tuning))
        yield calls

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Compile the kernels of all jobs at a time: nvrtc takes seconds for each, on one core."""
        prepare = imported("humming.kernel.humming", "humming-kernels").HummingKernel.prepare_kernels
        wanted = {self.key(job): job for job in jobs}
        configs = []
        for job in wanted.values():
            layer = self._layer(job)
            configs.append((layer.humming_config.to_str(), self._tuning(layer, job.m)))

        def compile_one(config: tuple[str, str]) -> None:
            with contextlib.suppress(Exception):  # is raised again, and noted, where the kernel is called
                prepare(config[0], None, config[1])

        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(compile_one, configs))

    @staticmethod
    def _layer_key(job: Job) -> Hashable:
        return job.op, job.n, job.k, tuple(job.attrs.items())

    def _layer(self, job: Job) -> Any:
        """The layer with random weights, made once."""
        key = self._layer_key(job)
        if key not in self._layers:
            if self.dtype == "float32":
                raise QpassError("wants float16 or bfloat16")
            layer_class = imported("humming.layer", "humming-kernels").HummingLayer
            options = int(job.attrs.get("quant_algo", 0))
            weight: dict[str, Any] = {"dtype": "int8"}
            if job.op == GROUPWISE:
                weight = {"dtype": "int4", "group_size": job.attrs["group_size"], "has_zero_point": bool(options & 2)}
            layer = layer_class(
                shape_n=job.n,
                shape_k=job.k,
                weight_config=weight,
                has_bias=bool(options & 1),
                torch_dtype=self.float_type,
            ).cuda()
            layer.load_from_unquantized(self.random(job.n, job.k))
            layer.transform()
            self._layers[key] = layer
        return self._layers[key]

    @staticmethod
    def _tuning(layer: Any, tokens: int) -> str:
        """The configuration that Humming has for so many tokens, as JSON."""
        tune = imported("humming.tune", "humming-kernels")
        return json.dumps(tune.get_heuristics_config(layer.humming_config, shape_m=tokens))
