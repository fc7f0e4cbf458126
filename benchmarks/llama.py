"""A llama-shaped model of any size with random weights, written layer by layer so that memory stays small.

    python -m benchmarks.llama OUT.onnx --layers 16 --hidden 2048 --dtype float16

With --bare the layers stand alone: hidden states, rotary tables and the mask come in, hidden states go out; no
embedding, no last norm, no head.

The graph is spelt as torch's exporters spell it: RMSNorm as Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul; rotary
embedding and attention op by op; weights as [K, N] right operands of MatMul, outside the file.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults give about 2 GB in float16."""

    layers: int = 20
    hidden: int = 2048
    intermediate: int = 5504
    heads: int = 16
    vocabulary: int = 16000
    dtype: str = "float16"

    @property
    def weights(self) -> int:
        """Elements of all weights."""
        per_layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * per_layer + 2 * self.vocabulary * self.hidden + self.hidden


class Builder:
    """Collects nodes and initializers; weights go to the data file as they are made."""

    def __init__(self, data: Path, shape: Shape, seed: int) -> None:
        self.file = data.open("wb")
        self.location = data.name
        self.shape = shape
        self.dtype = np.dtype(shape.dtype)
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"{out}/{op}", **attributes))
        return out

    def weight(self, name: str, *dims: int) -> str:
        """A random weight in the data file, written in pieces of 16 MB."""
        tensor = TensorProto(name=name, dims=dims, data_type=helper.np_dtype_to_tensor_dtype(self.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        offset = -(-self.file.tell() // 4096) * 4096
        self.file.seek(offset)
        left = int(np.prod(dims))
        scale = 1.0 / np.sqrt(dims[0])
        while left:
            n = min(left, 1 << 23)
            block = self.random.standard_normal(n, dtype=np.float32) * np.float32(scale)
            self.file.write(block.astype(self.dtype).tobytes())
            left -= n
        for key, value in (("location", self.location), ("offset", offset), ("length", self.file.tell() - offset)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def norm(self, x: str, name: str) -> str:
        wide = self.node("Cast", x, out=f"{name}.wide", to=TensorProto.FLOAT)
        square = self.node("Pow", wide, "two", out=f"{name}.square")
        mean = self.node("ReduceMean", square, "last", out=f"{name}.mean", keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, "epsilon", out=f"{name}.eps"), out=f"{name}.root")
        inverse = self.node("Reciprocal", root, out=f"{name}.inverse")
        scaled = self.node("Mul", wide, inverse, out=f"{name}.scaled")
        back = self.node("Cast", scaled, out=f"{name}.back", to=helper.np_dtype_to_tensor_dtype(self.dtype))
        return self.node("Mul", self.weight(f"{name}.weight", self.shape.hidden), back, out=f"{name}.out")

    def linear(self, x: str, name: str, k: int, n: int) -> str:
        return self.node("MatMul", x, self.weight(f"{name}.weight", k, n), out=f"{name}.out")

    def rotary(self, x: str, name: str) -> str:
        half = self.shape.hidden // self.shape.heads // 2
        first = self.node("Slice", x, "zero", self._half(half), "minus_one", out=f"{name}.first")
        second = self.node("Slice", x, self._half(half), "end", "minus_one", out=f"{name}.second")
        turned = self.node("Concat", self.node("Neg", second, out=f"{name}.neg"), first, out=f"{name}.turned", axis=-1)
        a = self.node("Mul", x, "cos", out=f"{name}.a")
        return self.node("Add", a, self.node("Mul", turned, "sin", out=f"{name}.b"), out=f"{name}.rotated")

    def _half(self, half: int) -> str:
        name = f"half_{half}"
        if all(t.name != name for t in self.initializers[:32]):
            raise AssertionError(name)
        return name

    def layer(self, x: str, i: int) -> str:
        s, p = self.shape, f"layers.{i}"
        h = self.norm(x, f"{p}.input_layernorm")
        q, k, v = (self.heads(self.linear(h, f"{p}.{n}_proj", s.hidden, s.hidden), f"{p}.{n}") for n in "qkv")
        q, k = self.rotary(q, f"{p}.q"), self.rotary(k, f"{p}.k")
        scores = self.node("MatMul", q, self.node("Transpose", k, out=f"{p}.kT", perm=[0, 1, 3, 2]), out=f"{p}.scores")
        scaled = self.node("Mul", scores, "attention_scale", out=f"{p}.scaled")
        masked = self.node("Add", scaled, "causal", out=f"{p}.masked")
        weights = self.node("Softmax", masked, out=f"{p}.softmax", axis=-1)
        mixed = self.node("MatMul", weights, v, out=f"{p}.mixed")
        together = self.node("Transpose", mixed, out=f"{p}.together", perm=[0, 2, 1, 3])
        joined = self.node("Reshape", together, "join", out=f"{p}.joined")
        x = self.node("Add", x, self.linear(joined, f"{p}.o_proj", s.hidden, s.hidden), out=f"{p}.residual")
        h = self.norm(x, f"{p}.post_attention_layernorm")
        gate = self.linear(h, f"{p}.gate_proj", s.hidden, s.intermediate)
        up = self.linear(h, f"{p}.up_proj", s.hidden, s.intermediate)
        act = self.node("Mul", gate, self.node("Sigmoid", gate, out=f"{p}.sigmoid"), out=f"{p}.silu")
        both = self.node("Mul", act, up, out=f"{p}.gated")
        return self.node("Add", x, self.linear(both, f"{p}.down_proj", s.intermediate, s.hidden), out=f"{p}.out")

    def heads(self, x: str, name: str) -> str:
        split = self.node("Reshape", x, "split", out=f"{name}.split")
        return self.node("Transpose", split, out=f"{name}.heads", perm=[0, 2, 1, 3])

    def constants(self) -> None:
        """What every layer uses."""
        s = self.shape
        size = s.hidden // s.heads
        self.constant("two", 2.0, np.float32)
        self.constant("epsilon", 1e-5, np.float32)
        for name, value in (
            ("last", [-1]),
            ("minus_one", [-1]),
            ("zero", [0]),
            ("end", [2**31]),
            (f"half_{size // 2}", [size // 2]),
        ):
            self.constant(name, value)
        self.constant("split", [0, 0, s.heads, size])
        self.constant("join", [0, 0, s.hidden])
        self.constant("attention_scale", size**-0.5, self.dtype)

    def prologue(self) -> str:
        """Rotary tables, the causal mask and the embedding."""
        s = self.shape
        size = s.hidden // s.heads
        self.constant("minus", -1e4, self.dtype)
        length = self.node(
            "Gather", self.node("Shape", "input_ids", out="ids.shape"), self.constant("one", 1), out="ids.length"
        )
        ids = self.node("Range", self.constant("nil", 0), length, "one", out="positions")
        wide = self.node("Cast", ids, out="positions.float", to=TensorProto.FLOAT)
        column = self.node("Unsqueeze", wide, "minus_one", out="positions.column")
        frequencies = self.constant("frequencies", 10000.0 ** -(np.arange(0, size, 2) / size), np.float32)
        angles = self.node("Mul", column, frequencies, out="angles.half")
        angles = self.node("Concat", angles, angles, out="angles", axis=-1)
        for name, op in (("cos", "Cos"), ("sin", "Sin")):
            self.node(
                "Cast",
                self.node(op, angles, out=f"{name}.float"),
                out=name,
                to=helper.np_dtype_to_tensor_dtype(self.dtype),
            )
        row = self.node("Unsqueeze", ids, "zero", out="positions.row")
        later = self.node("Greater", row, self.node("Unsqueeze", ids, "minus_one", out="positions.rows"), out="later")
        self.node(
            "Mul",
            self.node("Cast", later, out="later.float", to=helper.np_dtype_to_tensor_dtype(self.dtype)),
            "minus",
            out="causal",
        )
        return self.node(
            "Gather", self.weight("embed_tokens.weight", s.vocabulary, s.hidden), "input_ids", out="embedding"
        )


def build(path: Path, shape: Shape, seed: int = 0, bare: bool = False) -> onnx.ModelProto:
    """Write the model to `path` and its weights beside it as `<stem>.data`; returns the graph's proto.

    Args:
        bare: the layers alone. Inputs are then hidden_states [batch, sequence, hidden], cos and sin [sequence, hidden
            of a head] and causal [sequence, sequence], which is added to the scores.
    """
    b = Builder(path.with_suffix(".data"), shape, seed)
    element = helper.np_dtype_to_tensor_dtype(b.dtype)

    def tensor(name: str, *dims: str | int, of: int = element) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, of, dims)

    inputs = [tensor("input_ids", "batch", "sequence", of=TensorProto.INT64)]
    if bare:
        tables = [tensor(name, "sequence", shape.hidden // shape.heads) for name in ("cos", "sin")]
        hidden = tensor("hidden_states", "batch", "sequence", shape.hidden)
        inputs = [hidden, *tables, tensor("causal", "sequence", "sequence")]
    with b.file:
        b.constants()
        x = "hidden_states" if bare else b.prologue()
        for i in range(shape.layers):
            x = b.layer(x, i)
        width = shape.hidden if bare else shape.vocabulary
        if not bare:
            x = b.linear(b.norm(x, "norm"), "lm_head", shape.hidden, width)
    graph = helper.make_graph(b.nodes, "llama", inputs, [tensor(x, "batch", "sequence", width)], b.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return model


def of_size(gigabytes: float) -> Shape:
    """A shape with about that many bytes of weights in float16."""
    small = gigabytes < 0.5
    hidden = 512 if small else 2048
    one = Shape(
        layers=1,
        hidden=hidden,
        intermediate=hidden * 43 // 16,
        heads=hidden // 128,
        vocabulary=1000 if small else 16000,
    )
    per_layer = replace(one, layers=2).weights - one.weights
    return replace(one, layers=max(1, round((gigabytes * 1e9 / 2 - one.weights) / per_layer) + 1))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--gb", type=float, help="size of the weights, in place of the options below")
    defaults = Shape()
    for field in ("layers", "hidden", "intermediate", "heads", "vocabulary"):
        ap.add_argument(f"--{field}", type=int, default=getattr(defaults, field))
    ap.add_argument("--dtype", choices=["float16", "float32"], default=defaults.dtype)
    ap.add_argument("--bare", action="store_true", help="the layers alone")
    a = vars(ap.parse_args())
    out, size, bare = a.pop("out"), a.pop("gb"), a.pop("bare")
    shape = of_size(size) if size is not None else Shape(**a)
    build(out, shape, bare=bare)
    print(f"{out}: {shape.layers} layers, {out.with_suffix('.data').stat().st_size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
