"""Time and memory of `qpass rewrite` on a large model with external data, beside a file copy and two peers, in one run.

    python -m benchmarks.rewrite [--gb 2] [--repeat 1] [--folder DIR] [--json benchmarks/results/rewrite.json]

Makes a llama-shaped fp16 model of the wanted size in a streaming way, then runs each contender in a process of its own:
the whole command, start-up included, from a cold page cache to fsync of what it wrote. Peak memory is the process's
resident set (ru_maxrss). The machine is noisy: read the ratios, taken in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# Nothing large is imported here: a child's ru_maxrss begins with what its parent had resident at the fork.

COPY = """
import os, sys
for name in os.listdir(sys.argv[1]):
    with open(os.path.join(sys.argv[1], name), "rb") as source, open(os.path.join(sys.argv[2], name), "wb") as target:
        while block := source.read(1 << 22):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
"""

ONNX = """
import os, sys, onnx
model = onnx.load(sys.argv[1])
out = os.path.join(sys.argv[2], "model.onnx")
onnx.save(model, out, save_as_external_data=True, location="model.data")
"""

MATMULNBITS = """
import os, sys, logging, onnx
logging.disable(logging.INFO)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
model = onnx.load(sys.argv[1])
quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=128, is_symmetric=True)
quantizer.process()
quantizer.model.save_model_to_file(os.path.join(sys.argv[2], "model.onnx"), use_external_data_format=True)
"""

SYNC = """
import os, sys
for name in os.listdir(sys.argv[1]):
    os.fsync(os.open(os.path.join(sys.argv[1], name), os.O_RDONLY))
"""


@dataclass
class Row:
    """One contender: seconds of each run, peak resident set in MB, MB written."""

    name: str
    seconds: list[float]
    peak_mb: float
    written_mb: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that reading them is cold."""
    for path in folder.iterdir():
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(name: str, source: Path, work: Path, repeat: int, command: Callable[[Path], list[str]], sync: bool) -> Row:
    """Run a command that writes into a fresh folder, cold, and measure it."""
    seconds, peak, written = [], 0.0, 0.0
    for _ in range(repeat):
        out = work / "out"
        out.mkdir()
        forget(source)
        start = time.perf_counter()
        child = subprocess.Popen(command(out), stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if sync:  # a peer that leaves its output to the system: wait for it as for the others
            subprocess.run([sys.executable, "-c", SYNC, str(out)], check=True)
        seconds.append(time.perf_counter() - start)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{name} failed")
        child.returncode = 0
        peak = max(peak, usage.ru_maxrss / 1024)
        written = sum(p.stat().st_size for p in out.iterdir()) / 1e6
        shutil.rmtree(out)
    return Row(name, seconds, peak, written)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("--gb", type=float, default=2.0, help="size of the weights")
    ap.add_argument("--repeat", type=int, default=1)
    ap.add_argument("--folder", type=Path, help="where to work; needs about three times the size free")
    ap.add_argument("--only", default="", help="contenders whose name holds this, and the copy")
    ap.add_argument("--json", type=Path)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        source, work = Path(folder) / "source", Path(folder) / "work"
        source.mkdir()
        work.mkdir()
        model = source / "model.onnx"
        subprocess.run([sys.executable, "-m", "benchmarks.llama", str(model), "--gb", str(a.gb)], check=True)
        size = sum(p.stat().st_size for p in source.iterdir())
        qpass = shutil.which("qpass", path=str(Path(sys.executable).parent)) or "qpass"

        def rewrite(preset: str) -> Callable[[Path], list[str]]:
            return lambda out: [qpass, "rewrite", str(model), "-o", str(out / "model.onnx"), "-p", preset, "--quiet"]

        recipe = Path(folder) / "amax.yaml"
        recipe.write_text("preset: w4a16-g128\nrounding: amax\n")

        def plain(out: Path) -> list[str]:
            return [qpass, "rewrite", str(model), "-o", str(out / "model.onnx"), "--spec", str(recipe), "--quiet"]

        def script(text: str, what: Path) -> Callable[[Path], list[str]]:
            return lambda out: [sys.executable, "-c", text, str(what), str(out)]

        contenders = [
            ("copy", script(COPY, source), False),
            ("qpass w8a16", rewrite("w8a16"), False),
            ("qpass w4a16-g128", rewrite("w4a16-g128"), False),
            ("qpass w4a16-g128 amax", plain, False),  # rounds as the peer does; the preset searches
            ("qpass w8a8", rewrite("w8a8"), False),
            ("onnx load + save", script(ONNX, model), True),
            ("ORT MatMulNBits", script(MATMULNBITS, model), True),
        ]
        rows = []
        for name, command, sync in contenders:
            if name == "copy" or a.only in name:
                rows.append(run(name, source, work, a.repeat, command, sync))
                r = rows[-1]
                print(f"{r.name:22}{r.median:8.1f} s{r.peak_mb:9.0f} MB peak{r.written_mb:9.0f} MB written", flush=True)

    by_name = {r.name: r for r in rows}
    print(f"\n{'':22}{'× copy':>8}{'peak ÷ file':>13}")
    for r in rows:
        print(f"{r.name:22}{r.median / by_name['copy'].median:8.2f}{r.peak_mb * 1024**2 / size:13.2f}")
    for r in rows:
        if "w4a16" in r.name and "ORT MatMulNBits" in by_name:
            ratio = by_name["ORT MatMulNBits"].median / r.median
            print(f"{r.name} is {ratio:.2f} × as fast as load + MatMulNBits + save")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": f"python -m benchmarks.rewrite --gb {a.gb:g} --repeat {a.repeat}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "model_bytes": size,
            "rows": [asdict(r) | {"times_copy": r.median / by_name["copy"].median} for r in rows],
        }
        a.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
