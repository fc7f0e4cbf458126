"""From rewritten model to engine: checked before, built in a process of its own, proven, and written whole or not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpass import cache, gpu, plugins, runtime
from qpass.engine import backends, sidecar
from qpass.engine.backends import Backend
from qpass.engine.job import Job
from qpass.engine.lower import PRECISIONS
from qpass.engine.preflight import check_ledger, plugin_nodes, preflight, unfit_library
from qpass.engine.process import Log, Progress, Worker
from qpass.engine.profiles import Profile, Shape, profiles_of
from qpass.errors import QpassError
from qpass.graph import Model
from qpass.graph.commit import Folder, check_place, explain
from qpass.pipeline import ledger_of
from qpass.plugins import Library


@dataclass(frozen=True)
class Finished:
    """A build: where its files are, and what is in them."""

    engine: Path
    sidecar: Path
    guessed: str | None
    """The shapes that nothing was said of."""
    facts: Mapping[str, Any]
    """The sidecar's content."""
    warnings: list[str] = field(default_factory=list)


def build_files(
    model: str | Path,
    output: str | Path | None = None,
    *,
    backend: str = "auto",
    library: str | Path | None = None,
    use_plugins: bool = True,
    target_arch: str | None = None,
    min_shapes: Mapping[str, Shape] | None = None,
    opt_shapes: Mapping[str, Shape] | None = None,
    max_shapes: Mapping[str, Shape] | None = None,
    timing_cache: str | Path | None = None,
    workspace: int | None = None,
    precision: str | None = None,
    level: int | None = None,
    keep: Iterable[str | Path] = (),
    origin: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
    worker: Worker | None = None,
) -> Finished:
    """Build a TensorRT engine of a model, by default one that `qpass.rewrite` wrote.

    Args:
        model: an ONNX file. Only read.
        output: the engine, by default the model's name with `.engine`. Its sidecar is `<engine>.json`.
        backend: "tensorrt_rtx", "tensorrt", or "auto" for the first that is installed and builds for the GPU.
        library: the plugin library, by default `qpass.plugins.find()`.
        use_plugins: False builds the bodies of the plugin nodes from TensorRT's own layers.
        target_arch: compute capability of the GPU that it is for, such as "89"; by default this machine's, and where it
            has none whatever the backend supports.
        min_shapes, opt_shapes, max_shapes: input → shape; what is left out is guessed, see `qpass.engine.profiles`.
        timing_cache: a file to read and to add to, by default one in the cache per backend, version and GPU.
        keep: files that the output must not overwrite, besides the model's own and the library.
        origin: what the caller wants the sidecar to tell, too, for JSON.
        workspace: bound in bytes on the memory that layers may use.
        precision: "fp16" or "fp32", for a backend that types networks weakly; others take the types of the model.
        level: 0 to 5, how long TensorRT searches for fast kernels; by default its own 3.
        progress: called with steps done and in all.
        log: called with every line of TensorRT's.
        worker: the process to build in, by default one of its own; see `Worker` for building several.

    Raises:
        QpassError: something is missing or does not fit, TensorRT refused or died (with its last words), or a plugin
            node is not a plugin layer of the engine. No file is left then.
    """
    path = Path(model)
    engine = Path(output) if output is not None else path.with_suffix(".engine")
    chosen, capability = backend_for(backend, target_arch)
    check_flags(chosen, timing_cache, precision, level, library, use_plugins)
    loaded = Model.load(path)
    inputs_of_build = [*loaded.weights.files(), ledger_of(path), *map(Path, keep)]
    own_cache = Path(timing_cache) if timing_cache is not None else None
    check_places(engine, inputs_of_build, own_cache)
    check_ledger(ledger_of(path), plugin_nodes(loaded))
    nodes = {n.name: n.op for n in plugin_nodes(loaded)}
    found = None
    if nodes and use_plugins:
        found, targets = library_for(chosen, capability, library)
        check_places(engine, [found.path], own_cache)
        preflight(loaded, path, found, chosen, targets)
    elif nodes and not chosen.expands_bodies:
        raise QpassError(
            f"--no-plugins: {chosen.name} {chosen.version()} cannot build the ops of {path.name} from its own layers; "
            "leave it out"
        )
    elif nodes:
        preflight(loaded, path, None, chosen, [])
    inputs = {n: i for n, i in runtime.inputs_of(loaded.proto).items() if not i.optional}
    profiles = profiles_of(inputs, min_shapes or {}, opt_shapes or {}, max_shapes or {})
    tuned = (own_cache or _timing_cache(chosen, capability)) if chosen.keeps_timing else None
    beside = sidecar.of(engine)
    try:
        with Folder(engine.parent) as folder:
            names = (engine.name, beside.name, f"{engine.name}.timing")
            fresh, facts_file, learned = map(folder.temporary, names)
            job = Job(
                parent=os.getpid(),
                backend=chosen.name,
                model=os.path.abspath(path),  # a link stays: weights lie beside it, not beside what it leads to
                engine=str(fresh.path.resolve()),
                plugins=str(found.path.resolve()) if found else None,
                nodes=nodes,
                profiles=profiles,
                capability=capability,
                timing_cache=os.path.abspath(tuned)
                if tuned is not None
                else None,  # a kept process may stand elsewhere
                timing_out=str(learned.path.resolve()),
                workspace=workspace,
                precision=precision,
                level=level,
                verbose=log is not None,
            )
            guessed = guesses(profiles, inputs)
            try:
                with Worker() if worker is None else nullcontext(worker) as process:
                    built, warnings = process.build(chosen, job, progress, log)
            except QpassError as error:
                if guessed is None or "shape constraints" not in str(error):
                    raise
                raise QpassError(f"{error}. The shapes were {guessed}") from error
            facts = sidecar.facts(path, ledger_of(path), engine, fresh.path, chosen, found, job, built)
            facts |= {"dims": {n: list(i.shape or ()) for n, i in inputs.items()}, "origin": origin}
            os.write(facts_file.fd, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
            folder.commit([(facts_file, beside), (fresh, engine)], iter(()))
            if built.wrote_timing and tuned is not None:
                with suppress(OSError):  # the engine is there; what was learned is a gain, not a promise
                    _keep(tuned, learned.path.read_bytes())
    except OSError as error:
        raise explain(error, engine, 0) from error
    return Finished(engine, beside, guessed, facts, warnings)


def backend_for(name: str, target: str | None) -> tuple[Backend, str | None]:
    """The backend for a target that a user may call 89, 8.9 or sm_89, and its compute capability.

    None is this machine's GPU, which "auto" goes by; where there is no GPU either, all that the backend builds for.
    """
    if target is None or target == "current":
        return backends.choose(name, _this_gpu()), None
    backend = backends.choose(name)
    wanted = re.sub(r"^(sm|compute)_?", "", target.lower()).removesuffix("a").replace(".", "")
    known = backend.capabilities()
    if not known:
        raise QpassError(f"--target-arch {target}: {backend.name} builds for the GPU of this machine alone")
    if wanted not in known:
        raise QpassError(f"--target-arch {target}: {backend.name} builds for {', '.join(known)}, or current")
    return backend, wanted


def check_flags(
    backend: Backend,
    timing_cache: str | Path | None,
    precision: str | None,
    level: int | None,
    library: str | Path | None,
    use_plugins: bool,
) -> None:
    """Raise QpassError where flags contradict a backend or each other, whatever the model."""
    who = f"{backend.name} {backend.version()}"
    if timing_cache is not None and not backend.keeps_timing:
        raise QpassError(f"--timing-cache: {backend.name} times nothing when it builds; leave it out")
    if precision is not None and not backend.weakly_typed:
        raise QpassError(f"--precision: {who} takes the types of the model; leave it out")
    if precision not in (None, *PRECISIONS):
        raise QpassError(f"--precision {precision}: there are {', '.join(PRECISIONS)}")
    if level is not None and level not in range(6):
        raise QpassError(f"--level {level}: TensorRT has 0 to 5")
    if library is not None and not use_plugins:
        raise QpassError("--plugins and --no-plugins: give one of them")


def library_for(backend: Backend, capability: str | None, named: str | Path | None) -> tuple[Library, list[str]]:
    """The plugin library for a build, and the compute capabilities that it must run on one of."""
    found = plugins.find(named, capability or _this_gpu(), backend.interface)
    return found, [c for c in (capability, _this_gpu()) if c][:1] or list(backend.capabilities())


def check_library(backend: Backend, capability: str | None, named: str | Path | None) -> Library:
    """The same before there is a model to build.

    Raises:
        QpassError: there is none, or it is of another interface or for other GPUs.
    """
    found, targets = library_for(backend, capability, named)
    if wrong := unfit_library(found, backend, targets):
        raise QpassError(f"{'; '.join(wrong)}. The mend: {'; '.join(wrong.values())}")
    return found


def _this_gpu() -> str | None:
    """The compute capability of this machine's GPU."""
    return next(iter(gpu.capabilities()), None)


def check_places(engine: Path, inputs: Iterable[Path], timing_cache: Path | None) -> None:
    """Raise QpassError where a build would overwrite what it reads, or what is not its own."""
    beside = sidecar.of(engine)
    sources = list(inputs)
    check_place(engine, sources)
    check_place(beside, sources)
    if beside.exists() and not sidecar.is_one(beside):
        raise QpassError(f"{beside} is no sidecar of qpass's and would be overwritten; choose another engine with -o")
    if timing_cache is not None:
        check_place(timing_cache, [*sources, engine, beside])


def _timing_cache(backend: Backend, capability: str | None) -> Path:
    target = capability or _this_gpu() or "any"
    return cache.folder() / "timing" / f"{backend.name}-{backend.version()}-sm{target}.bin"


def _keep(path: Path, content: bytes) -> None:
    """Replace a timing cache, whole; of two builds at once the later one's stays."""
    with cache.locked(path.with_suffix(".lock")):
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(content)
        fresh.replace(path)


def guesses(profiles: Mapping[str, Profile], inputs: Mapping[str, runtime.Input]) -> str | None:
    """What was guessed of the shapes, a dim of one name once; None where nothing was."""
    seen: dict[str, str] = {}
    for name, p in profiles.items():
        dims = inputs[name].shape or ()
        for axis, dim in enumerate(dims):
            label = dim if isinstance(dim, str) else f"axis {axis} of {name}"
            if not isinstance(dim, int) and (dim or f"axis {axis}") in p.guessed:
                seen.setdefault(label, f"{label} {p.min[axis]} … {p.opt[axis]} … {p.max[axis]}")
    return f"guessed (min … opt … max): {', '.join(seen.values())}; say --min, --opt, --max" if seen else None
