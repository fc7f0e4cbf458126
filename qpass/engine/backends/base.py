"""What backends have in common: they are Python modules with TensorRT's API, and differ in how that is reached."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar


class Backend(ABC):
    """One kind of TensorRT.

    To build, `module` is imported in a process of its own, which is started with `environment`; to run engines, in this
    one, after `preload`.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    """pip's names of it."""
    install: ClassVar[str]
    """The command that installs it."""
    trtexec: ClassVar[str]
    """Its command-line tool."""
    needs_gpu: ClassVar[bool]
    keeps_timing: ClassVar[bool]
    """Whether it times kernels when it builds, and learns from one build for the next."""
    refuses_subgraphs: ClassVar[bool] = False
    """Whether it cannot build plugins within If and Loop."""

    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def version(self) -> str:
        """Of the package; nothing is loaded."""
        for package in self.packages:
            with suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(package)
        return "unknown"

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Variables that the building process must be started with."""

    @abstractmethod
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that an engine can be built for on any machine; none where only for this one's GPU."""

    @abstractmethod
    def preload(self) -> None:
        """Make the libraries known to a process that was not started with `environment`."""

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)

    @abstractmethod
    def target(self, trt: Any, config: Any, capability: str) -> None:
        """Have an engine built for this compute capability."""

    @staticmethod
    def folder(package: str) -> Path | None:
        """Where an installed package lies."""
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec else []
        return Path(places[0]) if places else None
