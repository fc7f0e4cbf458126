"""What the rule tests share: a builder of small graphs, and rules that spell lifted nodes out again, exactly."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qpass.graph import Const, Model, Node, Value
from qpass.graph.dtypes import to_onnx
from qpass.pipeline import Rewritten, rewrite
from qpass.quant_mode import QuantMode
from qpass.rewriter import Emit, Pattern, Rule, attr, const, ir, rule, val
from qpass.rules import Lifted
from qpass.rules.linears import Linear
from qpass.spec import QuantSpec
from qpass.testing import feeds

Array = NDArray[Any]
Dims = Sequence[int | str | None] | None


class Graph:
    """Builds a model node by node; every method that adds something returns the name of its result."""

    def __init__(self, opset: int = 18, seed: int = 0) -> None:
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self._serial = 0

    def fresh(self, hint: str) -> str:
        self._serial += 1
        return f"{hint}_{self._serial}"

    def input(self, name: str, dims: Dims, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def const(self, value: Any, dtype: Any = np.float32, name: str = "") -> str:
        """An initializer with these values."""
        name = name or self.fresh("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(value).astype(dtype), name))
        return name

    def weight(self, *dims: int, dtype: Any = np.float32, name: str = "") -> str:
        """An initializer with random values around zero."""
        return self.const(self.random.standard_normal(dims) / max(1, dims[0]) ** 0.5, dtype, name)

    def gain(self, k: int, dtype: Any = np.float32, name: str = "") -> str:
        """A norm's weight or bias: random values around one."""
        return self.const(1 + 0.3 * self.random.standard_normal(k), dtype, name)

    def op(self, type_: str, *inputs: str, out: str = "", name: Any = None, domain: Any = "", **attributes: Any) -> str:
        """A node with one output; named after it unless `name` says otherwise."""
        out = out or self.fresh(type_.lower())
        node = helper.make_node(
            type_, list(inputs), [out], f"n_{out}" if name is None else name, domain=domain, **attributes
        )
        self.nodes.append(node)
        return out

    def reduce(self, type_: str, x: str, axis: int, keepdims: int = 1) -> str:
        """ReduceMean or ReduceSum as the opset has it: axes are an attribute before 18 (13 for ReduceSum)."""
        by_input = self.opset >= (13 if type_ == "ReduceSum" else 18)
        if by_input:
            return self.op(type_, x, self.const([axis], np.int64), keepdims=keepdims)
        return self.op(type_, x, axes=[axis], keepdims=keepdims)

    def model(
        self, *results: str, dims: Dims = None, dtype: int = TensorProto.FLOAT, check: bool = True
    ) -> onnx.ModelProto:
        """The model with these outputs; their shapes and types are inferred unless `dims` gives them."""
        infos = [helper.make_tensor_value_info(r, dtype, dims) for r in results]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.initializers)
        domains = {n.domain for n in self.nodes} - {""}
        proto = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in sorted(domains))],
            ir_version=10,
            functions=self.functions,
        )
        if dims is None:
            for info in proto.graph.output:
                info.ClearField("type")
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.output
            for info, found in zip(proto.graph.output, inferred, strict=True):
                info.CopyFrom(found)
        if check:
            onnx.checker.check_model(proto, full_check=True)
        return proto


class AnyNorm(Pattern):
    x: Value = val("... K")
    gamma: Const = const("K")
    beta: Const | None = const("K")
    kind: str = attr()
    epsilon: float = attr()
    y = ir.Norm(x, gamma, beta, kind=kind, epsilon=epsilon) | ir.Norm(x, gamma, kind=kind, epsilon=epsilon)


@rule
def spell_norm(m: AnyNorm, new: Emit, cfg: object) -> Value:
    """A lifted norm written out in float32; its means are MatMuls, which are the same at every opset."""
    k = m.gamma.shape[0]
    x = _cast(new, m.x, np.float32)

    def binary(op: str, a: Any, b: Any) -> Value:
        return new.onnx(op, a, b, dtype=np.dtype(np.float32))

    average = np.full((k, 1), 1 / k, np.float32)
    d = binary("Sub", x, binary("MatMul", x, average)) if m.kind == "layernorm" else x
    variance = binary("Add", binary("MatMul", binary("Mul", d, d), average), np.float32(m.epsilon))
    y = binary("Div", d, new.onnx("Sqrt", variance, dtype=np.dtype(np.float32)))
    y = binary("Mul", y, m.gamma.array.astype(np.float32))
    if m.beta is not None:
        y = binary("Add", y, m.beta.array.astype(np.float32))
    return _cast(new, y, m.y.dtype)


@rule
def spell_linear(m: Linear, new: Emit, cfg: object) -> Value:
    """A lifted Linear written out as MatMul and Add."""
    y = new.onnx("MatMul", m.x, m.w.array.astype(m.y.dtype), dtype=m.y.dtype)
    return y if m.b is None else new.onnx("Add", y, m.b.array.astype(m.y.dtype), dtype=m.y.dtype)


class AnyActivation(Pattern):
    x: Value = val()
    up: Value | None = val()
    kind: str = attr()
    y = ir.GatedActivation(x, up, kind=kind) | ir.Activation(x, kind=kind)


@rule
def spell_activation(m: AnyActivation, new: Emit, cfg: object) -> Value:
    """A lifted activation written out in float32."""
    x = _cast(new, m.x, np.float32)

    def node(op: str, *inputs: Any) -> Value:
        given = (np.float32(i) if isinstance(i, float) else i for i in inputs)
        return new.onnx(op, *given, dtype=np.dtype(np.float32))

    if m.kind.startswith("relu"):
        y = node("Relu", x)
        y = node("Mul", y, y) if m.kind == "relu2" else y
    elif m.kind.startswith("gelu"):
        if m.kind == "gelu":
            t = node("Erf", node("Mul", x, 0.5**0.5))
        else:
            cubed = node("Mul", node("Mul", x, node("Mul", x, x)), 0.044715)
            t = node("Tanh", node("Mul", node("Add", x, cubed), (2 / np.pi) ** 0.5))
        y = node("Mul", x, node("Add", node("Mul", t, 0.5), 0.5))
    else:
        y = node("Sigmoid", node("Mul", x, 1.702) if m.kind == "quick_gelu" else x)
        y = y if m.kind == "sigmoid" else node("Mul", x, y)
    if m.up is not None:
        y = node("Mul", y, _cast(new, m.up, np.float32))
    return _cast(new, y, m.y.dtype)


def _cast(new: Emit, x: Value, dtype: Any) -> Value:
    return x if x.dtype == np.dtype(dtype) else new.onnx("Cast", x, dtype=np.dtype(dtype), to=to_onnx(np.dtype(dtype)))


def run(
    proto: onnx.ModelProto,
    spec: QuantSpec | str = "w8a16",
    rules: Sequence[Rule[Any, Any]] = (),
    only_rules: bool = False,
    **options: Any,
) -> tuple[Rewritten, onnx.ModelProto]:
    """The pipeline from a file to a file; the result passes the checker."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path)
        done = rewrite(path, spec=spec, rules=list(rules), only_rules=only_rules, **options)
        result = onnx.load(done.output)
    onnx.checker.check_model(result, full_check=True)
    return done, result


def lifted(proto: onnx.ModelProto) -> list[Node]:
    """The in-memory nodes that lifting makes of a model's main graph, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path)
        nodes = Lifted(Model.load(path)).graphs[0][1].edit.graph.nodes
    return [n for n in nodes if n.domain == "qpass.ir"]


def outputs(proto: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """The outputs of a model as it is written: ONNX Runtime's optimizer takes some near-norms for norms."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def error(a: onnx.ModelProto, b: onnx.ModelProto, inputs: Mapping[str, Array] | None = None) -> float:
    """The largest ‖a − b‖ / ‖a‖ of any output; infinite where shapes, dtypes or integers differ."""
    given = feeds(a) if inputs is None else dict(inputs)
    worst = 0.0
    for x, y in zip(outputs(a, given), outputs(b, given), strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return float("inf")
        if x.dtype.kind != "f":
            worst = max(worst, 0.0 if (x == y).all() else float("inf"))
            continue
        p, q = x.astype(np.float64), y.astype(np.float64)
        worst = max(worst, float(np.linalg.norm(p - q) / (np.linalg.norm(p) or 1)))
    return worst


def check_lift(
    proto: onnx.ModelProto,
    *,
    linears: int | None = None,
    norms: int | None = None,
    rtol: float = 2e-6,
    inputs: Mapping[str, Array] | None = None,
) -> Rewritten:
    """Lift, spell everything out again, and compare; counts are of the lifted nodes that were there.

    The inputs have 5 where dims are symbolic.
    """
    done, result = run(proto, rules=[spell_norm, spell_linear, spell_activation], only_rules=True)
    stats = done.outcome.stats
    if norms is not None:
        assert stats["spell_norm"].hits == norms, [str(m) for m in done.outcome.misses]
    if linears is not None:
        assert stats["spell_linear"].hits == linears, [str(m) for m in done.outcome.misses]
    got = error(proto, result, inputs)
    assert got <= rtol, got
    return done


def ops(proto: onnx.ModelProto) -> list[str]:
    """The op types of the main graph, in order."""
    return [n.op_type for n in proto.graph.node]


def site(done: Rewritten, kind: str, index: int = 0) -> Any:
    return done.ledger.of(kind)[index]


def remarks(done: Rewritten, kind: str) -> list[str]:
    """The reasons of all sites of a kind."""
    return [s.reason or "" for s in done.ledger.of(kind)]


def recipe(mode: QuantMode, **settings: Any) -> QuantSpec:
    """A spec with overrides and filters as YAML has them."""
    return QuantSpec.model_validate({"mode": mode, **settings})
