"""Every command of the README and every sample runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import engines, matrix
from benchmarks.plugins import sizes, table
from qpass import cli, gpu, plugins
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.plugins import Library
from qpass.testing import model
from tests.engine.conftest import library
from tests.plugins.conftest import shells

__all__ = ["library", "shells"]

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Names that the README's recipes and rules speak of are in this model: two layers, a router, a head, a scaled Linear.
TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
readme (float[B, S, 128] x) => (float[B, S, 128] y)
<float[128] gamma, float[128, 256] w1, float[256, 128] w2, float[128, 128] w3, float[128, 128] w4,
 float factor = {0.125}>
{
    ["layer.0.norm"] h = LayerNormalization<axis = -1>(x, gamma)
    ["layer.0.fc1"] m1 = MatMul(h, w1)
    ["layer.0.act"] r = Relu(m1)
    ["layer.1.fc2"] m2 = MatMul(r, w2)
    [router] m3 = MatMul(m2, w3)
    [scale] s = Mul(m3, factor)
    [lm_head] y = MatMul(s, w4)
}
"""


def indented_commands() -> list[str]:
    """The README's shell lines: indented by four spaces, starting with qpass, comments cut off. Calibration, which the
    introduction takes for granted, comes first."""
    lines = re.findall(r"^    (qpass .*)$", README, re.M)
    return sorted((line.partition("  #")[0].strip() for line in lines), key=lambda line: "calibrate" not in line)


def recipe_in_readme() -> str:
    """The README's YAML: the indented block that begins with `preset:`."""
    block = re.search(r"((?:^    .*\n)+)", README[README.index("    preset: w4a16-g128\n") :], re.M)
    assert block is not None
    return re.sub(r"^    ", "", block.group(1), flags=re.M)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the README takes for granted: model.onnx, samples/, my_rules.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    onnx.save(model(TEXT), "model.onnx")
    Path("samples").mkdir()
    random = np.random.default_rng(0)
    for i in range(2):
        np.savez(f"samples/{i}.npz", x=random.standard_normal((2, 8, 128)).astype(np.float32))
    rule = next(block for block in python_blocks() if "@rule" in block)
    Path("my_rules.py").write_text(rule)
    for file in (ROOT / "samples" / "softcap").glob("softcap.*"):
        shutil.copy(file, tmp_path)
    np.savez("x.npz", x=random.standard_normal((1, 64, 128)).astype(np.float32))
    built_in = dict(REGISTRY)
    yield tmp_path
    for name in REGISTRY.keys() - built_in.keys():  # the sample's
        del REGISTRY[name]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def needs_gpu(words: list[str]) -> bool:
    engine = words[1] == "verify" and words[-1].endswith(".engine")
    kernels = words[1] == "plugins" and words[2] in ("selftest", "bench", "tune")
    return engine or kernels or words[1] in ("run", "bench")


def has_gpu() -> bool:
    try:
        gpu.driver()
    except QpassError:
        return False
    return True


def test_readme_commands(
    there: Path, library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each does what it says; but the compiler's part is played by the plugins' shells (`make engines` compiles), and
    commands that need a GPU must say so where there is none."""
    monkeypatch.setattr(plugins, "build", lambda *_, **__: library)
    commands = indented_commands()
    assert len(commands) >= 20
    for command in commands:
        words = shlex.split(command)
        target = words.index(">") if ">" in words else len(words)
        monkeypatch.setattr(sys, "argv", words[:target])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        out = capsys.readouterr()
        if needs_gpu(words) and not has_gpu():
            assert (leave.value.code, "GPU" in out.err) == (2, True), f"{command}: {out.err}"
            continue
        assert not leave.value.code, f"{command}: {out.err}"
        if target < len(words):
            (there / words[target + 1]).write_text(out.out)


def test_readme_tables_are_the_measured_ones() -> None:
    results = ROOT / "benchmarks" / "results"
    for name in ("plugins_h200", "plugins_h100"):
        assert table(json.loads((results / f"{name}.json").read_text())) in README
    for name in ("plugins_models_h200", "plugins_models_h100"):
        assert sizes(json.loads((results / f"{name}.json").read_text())) in README
    assert matrix.table(results) in README
    assert engines.latencies(results) in README
    assert engines.errors(results) in README


def test_readme_recipe(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipe.yaml").write_text(recipe_in_readme())
    monkeypatch.setattr(sys, "argv", ["qpass", "rewrite", "model.onnx", "--spec", "recipe.yaml", "--quiet"])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert not leave.value.code


def test_readme_python(there: Path) -> None:
    for block in python_blocks():
        if "@rule" not in block:  # the rule file is run by the command that names it
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("sample", sorted(p.name for p in (ROOT / "samples").glob("0*.py")))
def test_samples(sample: str, tmp_path: Path, library: Library) -> None:
    work = [] if sample.startswith("02") else ["--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "samples" / sample), *work], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
