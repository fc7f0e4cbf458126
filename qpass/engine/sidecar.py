"""`<engine>.json`: what built an engine, of what, and how to load it elsewhere."""

from __future__ import annotations

import hashlib
import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qpass.engine.backends import Backend
from qpass.engine.job import Built, Job
from qpass.errors import QpassError
from qpass.plugins import Library

VERSION = 1


def of(engine: Path) -> Path:
    """`model.engine` → `model.engine.json`"""
    return engine.with_name(f"{engine.name}.json")


def facts(
    model: Path,
    ledger: Path,
    engine: Path,
    written: Path,
    backend: Backend,
    library: Library | None,
    job: Job,
    built: Built,
) -> dict[str, Any]:
    """The sidecar's content; `written` is where the engine's bytes are by now."""
    return {
        "version": VERSION,
        "qpass": version("qpass"),
        "backend": {"name": backend.name, "version": built.version, "target": job.capability or "current"},
        "precision": (job.precision or "fp16") if backend.weakly_typed else "the model's",
        "level": job.level,  # None: TensorRT's own
        "workspace": job.workspace,  # bytes at most, None: as much as there is
        "model": {"name": model.name, "sha256": digest(model)},
        "ledger": {"name": ledger.name, "sha256": digest(ledger)} if ledger.is_file() else None,
        "engine": {"name": engine.name, "sha256": digest(written), "bytes": written.stat().st_size},
        "plugins": None
        if library is None
        else {
            "path": str(library.path),
            "sha256": digest(library.path),
            "architectures": list(library.architectures),
            "interface": library.interface,
            "cuda": library.description["cuda"],
        },
        "profiles": {n: {"min": list(p.min), "opt": list(p.opt), "max": list(p.max)} for n, p in job.profiles.items()},
        "tensors": built.tensors,
        "plugin_layers": {n: job.nodes[n] for n in built.plugin_layers},
        "layers": built.layers,
        "proof": built.checked,
        "seconds": round(built.seconds, 2),
        "commands": commands(model, engine, backend, library, job),
    }


def commands(model: Path, engine: Path, backend: Backend, library: Library | None, job: Job) -> dict[str, str]:
    """The lines that load, and that build, this engine with TensorRT's own tool."""
    shapes = {
        flag: ",".join(f"{n}:{'x'.join(map(str, getattr(p, key)))}" for n, p in job.profiles.items())
        for flag, key in (("minShapes", "min"), ("optShapes", "opt"), ("maxShapes", "max"))
    }
    plugins = [f"--dynamicPlugins={library.path}"] if library else []
    usual = [f"--shapes={shapes['optShapes']}"] if job.profiles else []
    load = [backend.trtexec, f"--loadEngine={engine}", *plugins, *usual]
    if backend.weakly_typed:  # its parser does not take the model as it is
        make = ["qpass", "build", str(model), "-o", str(engine), "--backend", backend.name]
        make += [f"--{key[:3]}={shapes[key]}" for key in shapes if shapes[key]]
        make += [f"--precision={job.precision}"] if job.precision else []
        make += [f"--level={job.level}"] if job.level is not None else []
        make += [f"--workspace={job.workspace}"] if job.workspace is not None else []
        return {"load": shlex.join(load), "build": shlex.join(make)}
    make = [backend.trtexec, f"--onnx={model}", f"--saveEngine={engine}", *plugins]
    make += [f"--{flag}={text}" for flag, text in shapes.items() if text]
    make += [f"--builderOptimizationLevel={job.level}"] if job.level is not None else []
    make += [f"--memPoolSize=workspace:{job.workspace / 2**20:g}"] if job.workspace is not None else []  # MiB
    if backend.needs_gpu:
        make.append("--stronglyTyped")
    return {"load": shlex.join(load), "build": shlex.join(make)}


def is_one(path: Path) -> bool:
    """Whether a file is a sidecar."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("engine"), dict) and "backend" in found


def read(engine: Path) -> dict[str, Any]:
    """The sidecar of an engine.

    Raises:
        QpassError: it is not there, not readable, or of another engine.
    """
    path = of(engine)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise QpassError(f"{path}: no such file; it comes with the engine from `qpass build`") from None
    except (OSError, ValueError) as error:
        raise QpassError(f"{path}: not the sidecar of an engine: {error}") from error
    if not is_one(path) or found.get("version") != VERSION:
        raise QpassError(f"{path}: not a sidecar of version {VERSION}; build the engine again")
    if digest(engine) != found["engine"]["sha256"]:
        raise QpassError(f"{path} is not of this {engine.name}; build the engine again")
    return found


def digest(path: Path) -> str | None:
    """sha256 of a file; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
