"""TensorRT-RTX: builds engines for Ampere, Ada and Blackwell GPUs on any machine, with or without a GPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from qpass import cache
from qpass.engine.backends.base import Backend


class TensorRTRTX(Backend):
    name = "tensorrt_rtx"
    modules = ("tensorrt_rtx_bindings",)
    packages = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx")
    install = "pip install 'qpass[rtx]'"
    trtexec = "tensorrt_rtx"
    needs_gpu = False
    keeps_timing = False  # kernels are chosen when the engine is run
    refuses_subgraphs = True

    def environment(self) -> dict[str, str]:
        links = self._links()
        there = os.environ.get("LD_LIBRARY_PATH")
        return {"LD_LIBRARY_PATH": f"{links}{os.pathsep + there if there else ''}"} if links else {}

    def preload(self) -> None:
        if (links := self._links()) is not None:
            for library in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):
                ctypes.CDLL(str(links / library), ctypes.RTLD_GLOBAL)

    def _links(self) -> Path | None:
        """pip's package has its libraries under their versioned names alone, but its bindings open the plain ones: a
        folder of links to them. None where the libraries were installed in another way."""
        libraries = self.folder("tensorrt_rtx_libs")
        if libraries is None:
            return None
        links = cache.folder() / f"tensorrt-rtx-{self.version()}"
        with cache.locked(links / "lock"):
            return self._linked(libraries, links)

    @staticmethod
    def _linked(libraries: Path, links: Path) -> Path:
        for file in libraries.glob("*.so.*"):
            for name in (file.name, file.name[: file.name.index(".so") + 3]):
                link = links / name
                if not link.exists():  # or it leads to an environment that is gone
                    fresh = links / f"{name}.{os.getpid()}"
                    fresh.symlink_to(file)
                    fresh.replace(link)
        return links

    def capabilities(self) -> tuple[str, ...]:
        return ("75", "80", "86", "89", "120", "121")

    def target(self, trt: Any, config: Any, capability: str) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
