"""Compile the plugin library into the user's cache.

Two caches in one folder. Objects are kept per compiler, flags and architectures, and ninja compiles what changed;
sources are copied there by content, so that it does not matter where a package lies or when it was unpacked. The
finished library is kept by all that went into it, and appears there in one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from qpass import cache
from qpass.errors import QpassError
from qpass.plugins import toolchain
from qpass.plugins.library import LIBRARY, Library
from qpass.plugins.toolchain import ARCHITECTURES, INTERFACES, Toolchain

Progress = Callable[[int, int], None]
SOURCES = (".h", ".cuh", ".cu", ".cpp", ".txt")


def build(
    architectures: Sequence[str] = (),
    *,
    extra: Sequence[str | Path] = (),
    tensorrt: str | None = None,
    tensorrt_include: str | Path | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Library:
    """The plugin library for these architectures, compiled if it is not in the cache.

    Args:
        architectures: any of `toolchain.ARCHITECTURES`; by default those of this machine's GPUs, or where there is
            none 80 and 90a.
        extra: .cpp and .cu files with ops of your own, each of which registers a `qpass::Op`.
        tensorrt: whose plugins: 8 (8.6), or 10 for TensorRT 10, 11 and RTX; by default that of this environment.
        tensorrt_include: folder of TensorRT's own headers, in place of the minimal ones.
        jobs: compilers at a time, by default one a core.
        force: compile everything again.
        progress: called with steps done and in all.

    Raises:
        QpassError: a tool is missing, an architecture or file is not known, the compiler failed (with
            its words), or the cache cannot be written.
    """
    spelled = (re.sub(r"^(sm|compute)_?", "", a.lower()).replace(".", "") for a in architectures)
    wanted = tuple(dict.fromkeys(spelled)) or toolchain.gpu_architectures() or toolchain.WITHOUT_GPU
    for arch in wanted:
        if arch not in ARCHITECTURES:
            raise QpassError(f"--arch {arch}: qpass compiles for {', '.join(ARCHITECTURES)}")
    wanted = tuple(sorted(wanted, key=ARCHITECTURES.index))
    own = [Path(f).resolve() for f in extra]
    for file in own:
        if not file.is_file() or file.suffix not in (".cpp", ".cu"):
            raise QpassError(f"--with {file}: wants a .cpp or .cu file that is there")
    if tensorrt_include is not None and not (Path(tensorrt_include) / "NvInferRuntime.h").is_file():
        raise QpassError(f"--tensorrt-include {tensorrt_include}: has no NvInferRuntime.h")
    major = (tensorrt or _major_of(tensorrt_include) or toolchain.installed_tensorrt()).partition(".")[0]
    major = "10" if major in ("11", "rtx") else major
    if major not in INTERFACES or _major_of(tensorrt_include) not in (None, major):
        raise QpassError(
            f"--tensorrt {tensorrt or major}: wants 8.6 or 10 (which is 11 and rtx, too), as its headers are"
        )
    tools = toolchain.find()
    flags = _flags(tools, wanted)
    whose = [f"-DQPASS_TENSORRT={major}"]
    whose.append(f"-DQPASS_TENSORRT_INCLUDE={Path(tensorrt_include).resolve() if tensorrt_include is not None else ''}")
    own_flag = f"-DQPASS_EXTRA_SOURCES={';'.join(map(str, own))}"
    sources = source_hash()
    home = folder() / _hash(sources, tools.version, *flags, *whose, own_flag, *(f.read_text() for f in own))[:16]
    if (home / LIBRARY).is_file() and not force:
        return Library(home / LIBRARY)
    # whose plugins they are is nothing to kernels: their objects serve both
    objects = folder() / f"objects-{_hash(str(tools.nvcc), tools.version, *flags)[:16]}"
    with cache.locked(objects.with_suffix(".lock")):
        if (home / LIBRARY).is_file() and not force:  # made by whom we waited for
            return Library(home / LIBRARY)
        if force:
            shutil.rmtree(objects, ignore_errors=True)
        try:
            _synchronize(source_folder(), objects / "cuda_plugins")
            _compile(tools, objects, [*flags, *whose, own_flag], jobs, progress)
            facts: dict[str, object] = {"sources": sources, "architectures": wanted, "nvcc": tools.version}
            facts["interface"] = INTERFACES[major]
            _publish(objects / "build" / LIBRARY, home, facts)
        except OSError as error:
            raise QpassError(
                f"the plugins cannot be written to {folder()}: {error.strerror}; mend that, or name another folder in "
                "XDG_CACHE_HOME"
            ) from error
    return Library(home / LIBRARY)


def folder() -> Path:
    """Where compiled plugins are kept."""
    return cache.folder() / "plugins"


def source_folder() -> Path:
    """The CUDA sources: in an installed package within it, in a checkout beside it."""
    package = Path(__file__).parents[1]
    for place in (package / "cuda_plugins", package.parent / "cuda_plugins"):
        if (place / "CMakeLists.txt").is_file():
            return place
    raise QpassError(f"qpass was installed without its CUDA sources ({package / 'cuda_plugins'}); install it again")


def source_hash() -> str:
    """What the CUDA sources hold."""
    top = source_folder()
    return _hash(*(part for f in _sources(top) for part in (str(f.relative_to(top)), f.read_text())))


def _sources(top: Path) -> list[Path]:
    return sorted(f for f in top.rglob("*") if f.suffix in SOURCES and f.is_file())


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _flags(tools: Toolchain, wanted: Sequence[str]) -> list[str]:
    return [f"-DQPASS_ARCHITECTURES={';'.join(wanted)}", f"-DQPASS_CUTLASS={tools.cutlass}"]


def _major_of(include: str | Path | None) -> str | None:
    """The key of `INTERFACES` for headers of TensorRT's."""
    if include is None:
        return None
    texts = (f.read_text(errors="replace") for f in Path(include).glob("NvInferRuntime*.h"))
    return "10" if any("class IPluginV3 " in t or "IPluginV3OneCore" in t for t in texts) else "8"


def _synchronize(source: Path, target: Path) -> None:
    """Make target's files those of source, touching only what differs: their times are what ninja goes by."""
    wanted = {f.relative_to(source) for f in _sources(source)}
    for old in _sources(target) if target.is_dir() else ():
        if old.relative_to(target) not in wanted:
            old.unlink()
    for name in wanted:
        new, file = (source / name).read_bytes(), target / name
        if not file.is_file() or file.read_bytes() != new:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(new)


def _compile(tools: Toolchain, objects: Path, flags: list[str], jobs: int | None, progress: Progress | None) -> None:
    env, build_folder = tools.environment(), objects / "build"
    configure = [str(tools.cmake), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", *flags]
    configure += ["-S", str(objects / "cuda_plugins"), "-B", str(build_folder)]
    done = subprocess.run(configure, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QpassError(f"CMake could not configure the plugins: {_gist(done.stderr or done.stdout)}")
    command = [str(tools.ninja), "-C", str(build_folder), f"-j{jobs or os.cpu_count() or 1}"]
    lines: list[str] = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
        try:
            for line in ninja.stdout or ():
                lines.append(line)
                if progress is not None and (step := re.match(r"\[(\d+)/(\d+)\]", line)):
                    progress(int(step[1]), int(step[2]))
        except BaseException:
            ninja.terminate()  # the objects that are done stay
            raise
    if ninja.returncode:
        log = objects / "build.log"
        log.write_text("".join(lines))
        raise QpassError(f"the plugins did not compile: {_gist(log.read_text())}; all that the compiler said: {log}")


def _gist(output: str) -> str:
    """The first error of a compiler's output, or its last words."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\b(error|fatal|Killed)\b", line, re.I)]
    return (wrong or lines or ["it said nothing"])[0]


def _publish(library: Path, home: Path, facts: dict[str, object]) -> None:
    """Put the library and its facts in their place in the cache, complete or not at all."""
    fresh = home.with_name(f"{home.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        shutil.copyfile(library, fresh / LIBRARY)
        (fresh / "build.json").write_text(json.dumps(facts, indent=1))
        if home.exists():  # only with force: whoever has the old library open keeps it
            os.replace(fresh / "build.json", home / "build.json")
            os.replace(fresh / LIBRARY, home / LIBRARY)
        else:
            fresh.rename(home)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def built() -> list[tuple[Path, dict[str, object]]]:
    """The libraries in the cache with the facts of their builds, newest first."""
    found = []
    for facts in folder().glob("*/build.json"):
        library = facts.with_name(LIBRARY)
        with suppress(OSError, ValueError):  # a build that was never finished, or whose facts are lost
            found.append((library.stat().st_mtime, library, json.loads(facts.read_text())))
    return [(library, facts) for _, library, facts in sorted(found, key=lambda f: f[0], reverse=True)]
