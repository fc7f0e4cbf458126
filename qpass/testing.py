"""A kit to test a rule: numerics, structure, and a twin that must not fire.

    def test_my_rule():
        check_rule(
            my_rule,
            model('''
                <ir_version: 10, opset_import: ["" : 17]>
                g (float[B, 64] x) => (float[B, 32] y) <float[64, 32] w> { y = MatMul(x, w) }
            '''),
            emits={"WeightOnlyQuantMatmul": 1},
            twin=model(…),          # looks alike and must stay as it is
            rtol=0.02,
        )

It needs pytest for nothing: failures are AssertionErrors that say what differs.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from qpass.pipeline import Rewritten, rewrite
from qpass.rewriter import Rule
from qpass.spec import QuantSpec

Arrays = Mapping[str, np.ndarray[Any, Any]]


def model(text: str, seed: int = 0, **weights: Any) -> onnx.ModelProto:
    """A model from ONNX's text form. Tensors that are declared but that nothing makes become initializers.

    Args:
        text: the model in the syntax of `onnx.parser`; `<float[64, 32] w>` declares a weight.
        seed: of the normal random numbers that fill the weights.
        weights: values by name, in place of random ones.

    Raises:
        onnx.parser.ParseError: the text is not a model.
        onnx.checker.ValidationError: the model is not valid.
    """
    proto = onnx.parser.parse_model(text)
    made = {name for n in proto.graph.node for name in n.output}
    known = {t.name for t in proto.graph.initializer}
    random = np.random.default_rng(seed)
    for info in list(proto.graph.value_info):
        if info.name in made | known:
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        dims = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        value = np.asarray(weights.get(info.name, random.standard_normal(dims)))
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(dtype).reshape(dims), info.name))
        proto.graph.value_info.remove(info)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def feeds(proto: onnx.ModelProto, seed: int = 1, **dims: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs for a model; symbolic dims are 3 unless `dims` says otherwise."""
    random = np.random.default_rng(seed)
    given = {t.name for t in proto.graph.initializer}
    out = {}
    for info in proto.graph.input:
        if info.name in given:
            continue
        tensor = info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else dims.get(d.dim_param, 3) for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        value = random.standard_normal(shape) if np.dtype(dtype).kind == "f" else random.integers(0, 2, shape)
        out[info.name] = np.asarray(value).astype(dtype)
    return out


def apply_rule(
    rule: Rule[Any, Any], proto: onnx.ModelProto, spec: QuantSpec | str = "w8a16"
) -> tuple[Rewritten, onnx.ModelProto]:
    """Run one rule, and none of the built-in quantizing ones, over a model; its account and the model it made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path)
        done = rewrite(path, spec=spec, rules=[rule], only_rules=True)
        return done, onnx.load(done.output)


def outputs(proto: onnx.ModelProto, inputs: Arrays) -> list[np.ndarray[Any, Any]]:
    """The model's outputs in ONNX Runtime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def check_rule(
    rule: Rule[Any, Any],
    proto: onnx.ModelProto,
    *,
    emits: Mapping[str, int],
    removes: Mapping[str, int] | None = None,
    twin: onnx.ModelProto | None = None,
    spec: QuantSpec | str = "w8a16",
    inputs: Arrays | None = None,
    rtol: float = 1e-5,
) -> Rewritten:
    """Check that a rule fires on `proto`, emits what it should, keeps the numbers, and leaves `twin` alone.

    Args:
        rule: the rule under test; it alone runs.
        proto: a model that it must rewrite.
        emits: op type → how many more nodes of it the result has.
        removes: op type → how many fewer; unchecked where None.
        twin: a model that looks alike and that the rule must leave untouched.
        spec: what `cfg` gives the rule.
        inputs: feeds; random ones where None.
        rtol: bound on ‖got − want‖ / ‖want‖ of every floating-point output.

    Returns:
        The account of the rewrite, for further checks.

    Raises:
        AssertionError: one of these does not hold.
    """
    done, result = apply_rule(rule, proto, spec)
    if not done.outcome.stats[rule.name].hits:
        near = max(done.outcome.misses, key=lambda m: m.rank, default=None)
        raise AssertionError(f"{rule.name} did not fire: {near or 'no node roots its pattern'}")
    before, after = (Counter(n.op_type for n in m.graph.node) for m in (proto, result))
    for op, n in emits.items():
        assert after[op] - before[op] == n, f"{rule.name} emitted {after[op] - before[op]} {op}, expected {n}"
    for op, n in (removes or {}).items():
        assert before[op] - after[op] == n, f"{rule.name} removed {before[op] - after[op]} {op}, expected {n}"
    onnx.checker.check_model(result, full_check=True)

    given = inputs if inputs is not None else feeds(proto)
    for info, want, got in zip(proto.graph.output, outputs(proto, given), outputs(result, given), strict=True):
        assert want.shape == got.shape, f"{info.name} had shape {want.shape}, now {got.shape}"
        if want.dtype.kind == "f":
            a, b = want.astype(np.float64), got.astype(np.float64)
            error = float(np.linalg.norm(a - b) / (np.linalg.norm(a) or 1))
            assert error <= rtol, f"{info.name}: relative error {error:.3g}, allowed {rtol:g}"
        else:
            assert (want == got).all(), f"{info.name}: values differ"
    if twin is not None:
        _, left = apply_rule(rule, twin, spec)
        assert list(left.graph.node) == list(twin.graph.node), f"{rule.name} fired on the twin"
    return done
