"""Runs ops in ONNX Runtime by their bodies, many nodes in one session, beside their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from qpass.ops import DOMAIN, OPSET_VERSION, REGISTRY
from qpass.ops.activation_quantization import ActivationQuantization
from qpass.ops.base import Attr
from qpass.ops.examples import Case, example, signatures
from qpass.ops.norm_quantization import NormQuantization

Array = NDArray[Any]

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
INT8 = np.dtype(np.int8)
DTYPES = {"f32": F32, "f16": F16, "bf16": BF16}
OUTPUT_TYPES: dict[Attr, np.dtype[Any]] = {1: F32, 10: F16, 16: BF16}

OPSETS = (13, 14, 17, 18, 19, 20, 21, 23, 24, 25, 27)
"""Where ops that bodies use got new versions, up to the last that ONNX Runtime has kernels for."""

ACTIVATIONS = frozenset({"x", "q", "scale_a"})
"""Inputs that models compute; the others are initializers in most."""


@dataclass
class Graph:
    """A model of independent nodes. bfloat16 enters and leaves as float32: ONNX Runtime's Python has none."""

    opset: int
    constants: bool = True
    before: list[NodeProto] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)
    after: list[NodeProto] = field(default_factory=list)
    functions: dict[tuple[str, str], FunctionProto] = field(default_factory=dict)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    infos: list[ValueInfoProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    feeds: dict[str, Array] = field(default_factory=dict)

    def add(self, case: Case) -> None:
        op, n = case.op, len(self.nodes)
        names = [
            self._input(i.name, f"{n}.{i.name}", x)
            for i, x in zip(op.inputs, case.inputs, strict=True)
            if x is not None
        ]
        inferred = op.infer(case.kinds, case.attrs)
        outs = [self._output(f"{n}.{o.name}.out", *result) for o, result in zip(case.outputs, inferred, strict=True)]
        body = op.body(case.attrs, [None if x is None else x.dtype for x in case.inputs], self.opset)
        same = self.functions.setdefault((body.name, body.overload), body)
        assert same == body, f"two bodies of {body.name} share the overload {body.overload}"
        node = helper.make_node(op.name, names, outs, f"{n}", domain=DOMAIN, overload=body.overload)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in case.attrs.items())
        self.nodes.append(node)

    def _input(self, role: str, name: str, x: Array) -> str:
        if self.constants and role not in ACTIVATIONS:
            self.initializers.append(numpy_helper.from_array(x, name))
            return name
        fed = name
        if x.dtype == BF16:
            fed, x = f"{name}.f32", x.astype(F32)
            self.before.append(helper.make_node("Cast", [fed], [name], to=TensorProto.BFLOAT16))
        self.feeds[fed] = x
        self.inputs.append(_info(fed, x.dtype, [None] * x.ndim))
        return name

    def _output(self, name: str, dtype: np.dtype[Any], shape: Any) -> str:
        info = _info(name, dtype, shape)
        if dtype == BF16:
            self.infos.append(info)
            self.after.append(helper.make_node("Cast", [name], [f"{name}.f32"], to=TensorProto.FLOAT))
            info = _info(f"{name}.f32", F32, shape)
        self.outputs.append(info)
        return name

    def model(self) -> ModelProto:
        nodes = [*self.before, *self.nodes, *self.after]
        graph = helper.make_graph(nodes, "g", self.inputs, self.outputs, self.initializers, value_info=self.infos)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
        functions = list(self.functions.values())
        return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


def _info(name: str, dtype: np.dtype[Any], shape: Any) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)


def graph_of(cases: Sequence[Case], opset: int, constants: bool = True) -> Graph:
    graph = Graph(opset, constants)
    for case in cases:
        graph.add(case)
    return graph


def session(model: ModelProto, optimised: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(
    cases: Sequence[Case], opset: int, optimised: bool, constants: bool = True, check: bool = False
) -> list[list[Array]]:
    """The outputs of every case, bfloat16 ones as float32.

    Args:
        constants: whether inputs that are weights in models are initializers.
        check: whether onnx.checker sees the model first, declared with the shapes and dtypes of `Op.infer`.
    """
    graph = graph_of(cases, opset, constants)
    model = graph.model()
    if check:
        onnx.checker.check_model(model, full_check=True)
    results = iter(session(model, optimised).run(None, graph.feeds))
    return [[next(results) for _ in case.outputs] for case in cases]


@cache
def every_case(*dtypes: np.dtype[Any], **shape: Any) -> list[Case]:
    """An example of every signature of every op."""
    cases: list[Case] = []
    for op in REGISTRY.values():
        for attrs in signatures(op):
            own = [F32] if "output_type" in attrs else dtypes  # those have no T
            cases += [example(op, attrs, dtype, seed=len(cases) + i, **shape) for i, dtype in enumerate(own)]
    return cases


def assert_agree(case: Case, actual: Sequence[Array]) -> None:
    """What body and reference must have in common, bit for bit or within 1e-6."""
    for tensor, y, ref, wide in zip(case.outputs, actual, case.reference, case.unrounded, strict=True):
        what = f"{tensor.name} of {case}"
        assert y.shape == ref.shape, what
        assert y.dtype == (F32 if ref.dtype == BF16 else ref.dtype), what
        if ref.dtype != INT8:
            assert close(y, wide, ref.dtype), what
        elif isinstance(case.op, NormQuantization | ActivationQuantization):
            assert np.max(np.abs(y.astype(int) - ref.astype(int)), initial=0) <= 1, what
        else:
            assert np.array_equal(y, ref), what


def close(actual: Array, wide: Array, dtype: np.dtype[Any]) -> bool:
    """Whether `actual` is the rounding to `dtype` of floats that differ from `wide` by 1e-6 of its largest."""
    slack = np.float32(1e-6) * np.max(np.abs(wide), initial=0)
    with np.errstate(over="ignore"):
        low, high = ((wide + d).astype(dtype).astype(F32) for d in (-slack, slack))
    return bool(np.all((low <= actual) & (actual <= high)))
