"""What backends have in common: they are Python modules with TensorRT's API, and differ in how that is reached."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from qpass.engine.lower import Lowered, inlined
from qpass.errors import QpassError
from qpass.plugins import Library


class Backend(ABC):
    """One kind of TensorRT.

    To build, `module` is imported in a process of its own, which is started with `environment`; to run engines, in this
    one, after `preload`.
    """

    name: ClassVar[str]
    """As `--backend` has it; one TensorRT of a name can be installed at a time."""
    modules: ClassVar[tuple[str, ...]]
    """What Python calls it, by one way of installing it or another."""
    packages: ClassVar[tuple[str, ...]]
    """pip's names of it."""
    install: ClassVar[str]
    """The command that installs it."""
    trtexec: ClassVar[str]
    """Its command-line tool."""
    interface: ClassVar[str] = "IPluginV3"
    """What its plugins must be."""
    weakly_typed: ClassVar[bool] = False
    """Whether it chooses the types of tensors by speed, rather than taking those of the model."""
    needs_gpu: ClassVar[bool]
    keeps_timing: ClassVar[bool]
    """Whether it times kernels when it builds, and learns from one build for the next."""
    expected: ClassVar[tuple[str, ...]] = ()
    """Beginnings of warnings that tell what was meant, of which nobody needs to hear."""
    expands_bodies: ClassVar[bool] = True
    """Whether it can build what plugin nodes mean from layers of its own."""
    refuses_subgraphs: ClassVar[bool] = False
    """Whether it cannot build plugins within If and Loop."""

    def installed(self) -> bool:
        return self.module is not None

    @property
    def module(self) -> str | None:
        """The one of `modules` that is here."""
        return next((m for m in self.modules if importlib.util.find_spec(m) is not None), None)

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
        if self.module is None:
            raise QpassError(f"{self.name} is not installed: {self.install}")
        return importlib.import_module(self.module)

    def network_flags(self, trt: Any) -> int:
        """Strongly typed: the types of the model are those of the engine. TensorRT 11 and RTX know nothing else."""
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def lowered(self, path: str, library: Library | None, precision: str | None) -> Lowered:
        """What its parser is given in place of a model's file.

        Args:
            library: the plugins; None builds their nodes' bodies.
            precision: of floats, None for what it does by itself; a weakly typed one is told.

        Raises:
            QpassError: the parser does not know an op, and it cannot be said in ops that it knows.
        """
        return Lowered(inlined(path) if library is None else None)

    def configure(self, trt: Any, config: Any, network: Any, lowered: Lowered) -> None:
        """Tell it what it must know of a network before it builds; most need nothing."""
        return

    @abstractmethod
    def target(self, trt: Any, config: Any, capability: str) -> None:
        """Have an engine built for this compute capability."""

    @staticmethod
    def folder(package: str) -> Path | None:
        """Where an installed package lies."""
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec else []
        return Path(places[0]) if places else None
