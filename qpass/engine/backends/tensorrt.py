"""TensorRT 10 and 11: builds and times on the GPU of this machine."""

from __future__ import annotations

from typing import Any, ClassVar

from qpass.engine.backends.base import Backend
from qpass.errors import QpassError


class TensorRT(Backend):
    name = "tensorrt"
    modules: ClassVar[tuple[str, ...]] = ("tensorrt",)
    packages: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    install = "pip install 'qpass[tensorrt]'"
    trtexec = "trtexec"
    needs_gpu = True
    keeps_timing = True
    versions: ClassVar[tuple[str, ...]] = ("10", "11")
    """How versions begin that are known to work alike."""

    def installed(self) -> bool:
        return super().installed() and any(f"{self.version()}.".startswith(f"{v}.") for v in self.versions)

    def environment(self) -> dict[str, str]:
        return {}

    def preload(self) -> None:
        """Its package loads its libraries by itself."""

    def capabilities(self) -> tuple[str, ...]:
        return ()

    def target(self, trt: Any, config: Any, capability: str) -> None:
        raise QpassError("TensorRT builds for the GPU of this machine alone; --target-arch is for tensorrt_rtx")
