"""What may import what: the core is light, and imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qpass"

# Each layer may import itself and those to its left.
LAYERS = [
    {"errors", "quant_mode", "cache"},
    {"gpu"},
    {"spec_yaml", "filters", "spec", "quantize"},
    {"graph"},
    {"ops"},
    {"rewriter"},
    {"runtime", "calibrate"},
    {"rules"},
    {"verify", "pipeline"},
    {"options"},
    {"plugins"},
    {"engine"},
    {"testing", "report", "runs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# calibrate and verify lift a model to know its Linears; the import stands inside the function that does
DEFERRED = {("calibrate", "rules")}


def imports(path: Path) -> set[str]:
    """First parts of the qpass modules that a file imports when it runs (not those for type checkers alone)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "qpass" else [f"qpass.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("qpass.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if mine == "__init__":
        return
    assert mine in LEVEL, f"say in LAYERS where {mine} belongs"
    for other in imports(path) - {mine}:
        assert LEVEL[other] <= LEVEL[mine] or (mine, other) in DEFERRED, f"{mine} imports {other}, which is above it"


def test_core_is_light() -> None:
    """`import qpass` brings in no runtime, no framework and no CUDA."""
    code = "import sys, qpass; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda", "torch", "typer", "rich", "tokenizers"}
