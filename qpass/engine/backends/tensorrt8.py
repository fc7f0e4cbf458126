"""TensorRT 8.6: types networks weakly, and knows neither local functions nor int8 weights nor opsets after 17."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Any

from qpass.engine.backends.tensorrt import TensorRT
from qpass.engine.lower import Lowered, for_tensorrt8
from qpass.errors import QpassError
from qpass.plugins import Library

MOVES = (
    *("SHUFFLE", "SLICE", "GATHER", "CONCATENATION", "IDENTITY", "SELECT"),
    *("CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT", "ITERATOR", "LOOP_OUTPUT", "RECURRENCE"),
)
"""Layers that change no number: behind a plugin's int8 output they are int8, too. Those of If and Loop may stand in a
network behind layers that read them."""
LIBRARIES = {
    "CUBLAS": ("libcublas.so.12", "libcublas.so.11"),
    "CUBLAS_LT": ("libcublasLt.so.12", "libcublasLt.so.11"),
    "CUDNN": ("libcudnn.so.8",),
}
"""What kernels of a source come from."""


class TensorRT8(TensorRT):
    modules = ("tensorrt", "tensorrt_bindings")  # pip's bindings without the package that brings NVIDIA's libraries
    packages = ("tensorrt", "tensorrt-bindings", "tensorrt_bindings")
    install = "pip install tensorrt==8.6.1"
    interface = "IPluginV2DynamicExt"
    weakly_typed = True
    versions = ("8.6",)  # 8.5 loads no plugin libraries
    expands_bodies = False
    expected = ("Missing scale and zero-point for tensor",)  # where there is none, no int8 is wanted

    def environment(self) -> dict[str, str]:
        """Kernels are loaded when they are first used: loading all takes seconds, and most of a gigabyte on the GPU."""
        return {"CUDA_MODULE_LOADING": os.environ.get("CUDA_MODULE_LOADING", "LAZY")}

    def preload(self) -> None:
        os.environ.update(self.environment())

    def network_flags(self, trt: Any) -> int:
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    def lowered(self, path: str, library: Library | None, precision: str | None) -> Lowered:
        return for_tensorrt8(path, library.ops if library is not None else None, precision or "fp16")

    def configure(self, trt: Any, config: Any, network: Any, lowered: Lowered) -> None:
        """FP16 wherever it is faster, or fp32 without the shortcuts of TF32; INT8 between plugins.

        INT8 is what plugins make: its tensors get a scale of one, and no other tensor gets any, so that TensorRT
        quantizes nothing by itself. It takes no such scales where a QuantizeLinear or DequantizeLinear is left.
        """
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        left = [layer.name for layer in layers if layer.type.name in ("QUANTIZE", "DEQUANTIZE")]
        if left and lowered.integers:
            raise QpassError(
                f"{left[0]} is a QuantizeLinear or DequantizeLinear beside plugins that write int8, which TensorRT 8.6 "
                "does not take in one network; leave out one or the other"
            )
        if lowered.precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)
        else:
            config.set_flag(trt.BuilderFlag.FP16)
        if lowered.integers or left:  # it would miss scales where there is no int8
            config.set_flag(trt.BuilderFlag.INT8)
        made = {t.name: t for layer in layers for t in _outputs(layer)}
        for name in _moved(lowered.integers, layers) & made.keys():
            made[name].set_dynamic_range(-127.0, 127.0)
        sources = config.get_tactic_sources()
        for source, names in LIBRARIES.items():
            if not any(map(_loadable, names)):  # it would ask for its kernels, and fail
                sources &= ~(1 << int(getattr(trt.TacticSource, source)))
        config.set_tactic_sources(sources)


def _moved(integers: Iterable[str], layers: Iterable[Any]) -> set[str]:
    """The tensors of these names, and those that layers which change no number make of them."""
    found = set(integers)
    moves = []
    for layer in (x for x in layers if x.type.name in MOVES):
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        moves.append(({t.name for t in inputs if t is not None}, {t.name for t in _outputs(layer)}))
    while grown := [made for read, made in moves if read & found and not made <= found]:
        found.update(*grown)
    return found


def _outputs(layer: Any) -> list[Any]:
    return [t for t in map(layer.get_output, range(layer.num_outputs)) if t is not None]


def _loadable(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
