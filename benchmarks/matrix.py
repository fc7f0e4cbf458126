"""What runs where: every op in every dtype as an engine of one kind of TensorRT, and the README's table of all kinds.

    python -m benchmarks.matrix build --backend tensorrt_rtx -o benchmarks/results/matrix_tensorrt_rtx.json
    python -m benchmarks.matrix table benchmarks/results

`build` builds an engine of each op and dtype, runs it where it runs on this machine's GPU, and compares its outputs
with the op's NumPy reference; `--resume` keeps the rows that the file has already. `table` reads what was found, and
what `qpass plugins selftest --json` found of kernels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from benchmarks.record import Record, command
from qpass import engine as engines
from qpass import gpu
from qpass.engine import backends
from qpass.errors import QpassError
from qpass.ops import DOMAIN, REGISTRY
from qpass.ops.base import Attr
from qpass.ops.examples import example, signatures
from qpass.verify import Difference

Array = NDArray[Any]
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LIMITS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
"""Relative errors up to which an engine is right; an int8 code may be off by one."""
OPSET = 17
KINDS = ("tensorrt 8.6", "tensorrt 10", "tensorrt 11", "tensorrt_rtx")


@dataclass
class _Graph:
    """A model as it grows, and beside it the values that NumPy has for its tensors."""

    values: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    functions: dict[tuple[str, str], onnx.FunctionProto] = field(default_factory=dict)

    def given(self, name: str, value: Array, constant: bool) -> str:
        (self.weights if constant else self.inputs)[name] = self.values[name] = value
        return name

    def add(self, op: str, attrs: Mapping[str, Attr], inputs: Sequence[str | None], outputs: Sequence[str]) -> None:
        """A node by its inputs in the declaration's order, None for those that are not there."""
        given = [None if i is None else self.values[i] for i in inputs]
        body = REGISTRY[op].body(attrs, [None if x is None else x.dtype for x in given], OPSET)
        self.functions[body.name, body.overload] = body
        there = [i for i in inputs if i is not None]
        node = helper.make_node(op, there, list(outputs), f"the_{op}", domain=DOMAIN, overload=body.overload)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attrs.items())
        self.nodes.append(node)
        self.values.update(zip(outputs, REGISTRY[op].reference(given, attrs), strict=True))

    def quantized(self, x: str) -> tuple[str, str]:
        """Integers and scales, a token at a time."""
        attrs = REGISTRY["QuantizePerToken"].attributes_for(["x"], ["q", "scale"], {})
        self.add("QuantizePerToken", attrs, [x, None], ["int", "int_scale"])
        return "int", "int_scale"

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        def info(name: str) -> onnx.ValueInfoProto:
            x = self.values[name]
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)

        weights = [
            helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(w.dtype), w.shape, w.tobytes(), raw=True)
            for n, w in self.weights.items()
        ]
        graph = helper.make_graph(self.nodes, "g", list(map(info, self.inputs)), list(map(info, outputs)), weights)
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        functions = list(self.functions.values())
        return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def model_of(op: str, dtype: np.dtype[Any]) -> tuple[onnx.ModelProto, dict[str, Array], dict[str, Array]]:
    """A model of an op with floats outside, its inputs, and the outputs that NumPy has for them."""
    code = helper.np_dtype_to_tensor_dtype(dtype)
    declared = REGISTRY[op]
    fit = (a for a in signatures(declared) if a.get("output_type", code) == code)
    attrs = next(a for a in fit if a.get("has_per_token_scaling", 1))
    case = example(declared, attrs, dtype, n=32)
    g = _Graph()
    names: list[str | None] = []
    for slot, value in zip(declared.inputs, case.inputs, strict=True):
        if value is None:
            names.append(None)
        elif slot.name == "q":
            rows = np.random.default_rng(1).normal(size=value.shape).astype(dtype)
            names.append(g.quantized(g.given("x", rows, constant=False))[0])
        elif slot.name in ("scale_a", "scale") and "int" in g.values:
            names.append("int_scale")
        else:
            names.append(g.given(slot.name, value, constant=slot.name not in ("x", "residual", "up")))
    results = [f"{o.name}_out" for o in case.outputs]
    g.add(op, attrs, names, results)
    floats = [r for r in results if g.values[r].dtype != np.int8]
    for name in set(results) - set(floats):
        scale = next((r for r in results if r.startswith("scale")), None) or "scale"
        back = REGISTRY["Dequantize"].attributes_for(["q", "scale"], ["x"], {"output_type": code})
        g.add("Dequantize", back, [name, scale], ["back"])
        floats.append("back")
    if not g.inputs:  # all of it is constant
        g.given("x", np.ones(g.values[floats[0]].shape[-1:], dtype), constant=False)
        g.nodes.append(helper.make_node("Mul", [floats[0], "x"], ["y"], "times"))
        g.values["y"], floats = g.values[floats[0]], ["y"]
    return g.model(floats), g.inputs, {name: g.values[name] for name in floats}


def build(op: str, dtype: str, backend: str, worker: engines.Worker) -> dict[str, Any]:
    """Build an engine of one op, and run it where that can be."""
    row: dict[str, Any] = {"op": op, "dtype": dtype, "built": False, "ran": False}
    proto, feeds, wanted = model_of(op, DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{op}.onnx"
        onnx.save(proto, path)
        precision = {"float32": "fp32", "float16": "fp16"}.get(dtype) if backends.choose(backend).weakly_typed else None
        try:
            engine = engines.build(path, backend=backend, precision=precision, worker=worker)
            assert op in engine.facts["plugin_layers"].values()
            row["built"] = True
            found = engine.run(feeds)
        except QpassError as error:
            row["why"] = str(error).replace(folder, "…")
            return row
    errors = [Difference.of(wanted[n], y.astype(wanted[n].dtype)).relative_error for n, y in found.items()]
    row |= {"ran": max(errors) <= LIMITS[dtype], "error": max(errors)}
    return row


def table(folder: Path) -> str:
    """The README's table."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for path in sorted(folder.glob("matrix_*.json")):
        told = json.loads(path.read_text())
        kind = next(k for k in KINDS if told["backend"].startswith(k))
        for row in told["rows"]:
            done = "runs" if row["ran"] else "builds" if row["built"] else "no"
            cells.setdefault((row["op"], kind), {})[row["dtype"]] = done
    kernels: dict[str, set[str]] = {}
    for path in sorted(folder.glob("selftest_*.json")):
        for tally in json.loads(path.read_text())["selftest"]:
            if tally["passed"]:
                kernels.setdefault(tally["op"], set()).add(tally["dtype"])
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

    def cell(found: Mapping[str, str]) -> str:
        by_state: dict[str, list[str]] = {}
        for dtype, state in found.items():
            by_state.setdefault(state, []).append(short[dtype])
        texts = [f"{state} {' '.join(by_state[state])}" for state in ("runs", "builds", "no") if state in by_state]
        return "; ".join(texts) or "not tested"

    head = ("op", "kernel alone", *(k.replace("tensorrt_rtx", "RTX").replace("tensorrt", "TensorRT") for k in KINDS))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for op in REGISTRY:
        alone = " ".join(short[d] for d in DTYPES if d in kernels.get(op, ()))
        found = [cell(cells.get((op, kind), {})) for kind in KINDS]
        lines.append("| " + " | ".join([op, f"runs {alone}" if alone else "not tested", *found]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    builds = commands.add_parser("build")
    builds.add_argument("--backend", default="auto")
    builds.add_argument("-o", "--output", type=Path, required=True)
    builds.add_argument("--resume", action="store_true", help="keep the rows that the output has already")
    commands.add_parser("table").add_argument("results", type=Path)
    a = parser.parse_args()
    if a.command == "table":
        print(table(a.results))
        return
    backend = backends.choose(a.backend)
    try:
        device = gpu.device().name()
    except QpassError as error:
        device = f"none: {error}"
    about = {
        "command": command("benchmarks.matrix"),
        "backend": f"{backend.name} {backend.version()}",
        "device": device,
        "limits": LIMITS,
    }
    record = Record(a.output, about, ["op", "dtype"], [(op, dtype) for op in REGISTRY for dtype in DTYPES], a.resume)
    with engines.Worker() as worker:
        for op, dtype in record.missing:
            record.add(build(op, dtype, backend.name, worker))


if __name__ == "__main__":
    main()
