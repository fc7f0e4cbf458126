"""What the parent tells the process that builds, and what that tells the parent: JSON both ways, a line each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from qpass.engine.profiles import Profile


@dataclass(frozen=True)
class Job:
    """A build, complete.

    Args:
        model: the file.
        engine: where the serialized engine goes, a temporary of the parent's.
        plugins: the library, None to build without.
        nodes: plugin nodes of the model by name, with their ops: each must become a plugin layer.
        capability: of the GPU that it is for, None for this machine's.
        precision: "fp16" or "fp32", where the backend chooses types.
        level: how long to search for fast kernels, 0 to 5.
        timing_cache: read if it is there; what the build learned goes to `timing_out`.
    """

    parent: int
    """The process that waits for it."""
    backend: str
    model: str
    engine: str
    plugins: str | None
    nodes: dict[str, str]
    profiles: dict[str, Profile]
    capability: str | None
    timing_cache: str | None
    timing_out: str | None
    workspace: int | None = None
    precision: str | None = None
    level: int | None = None
    verbose: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        d = json.loads(text)
        profiles = {n: Profile(**{k: tuple(v) for k, v in p.items()}) for n, p in d.pop("profiles").items()}
        return Job(profiles=profiles, **d)


@dataclass
class Built:
    """What a build made, as its process tells it."""

    version: str
    layers: dict[str, int]
    plugin_layers: list[str]
    checked: str
    """How the layers of the finished engine were seen: "inspector" or "names"."""
    tensors: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """What the build took. TensorRT's start, once a process, is not in it."""
    wrote_timing: bool = False


def event(kind: str, **what: Any) -> None:
    """Tell the parent; the kinds are log, step, built and failed."""
    print(json.dumps({"event": kind} | what), flush=True)
