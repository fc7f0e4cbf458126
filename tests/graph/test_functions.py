"""Calls of local functions expanded: the same results, names that tell the way, functions that are left."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qpass.graph.functions import every_call, expand
from qpass.testing import model
from tests.rules.kit import Array, error, outputs

HEAD = '<ir_version: 10, opset_import: ["" : 18, "l" : 1]>'


def expanded(proto: onnx.ModelProto, *calls: str) -> tuple[onnx.ModelProto, list[str]]:
    """A copy with calls expanded (all unless some are named), and their paths; it passes the checker."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    found = expand(out, calls.__contains__ if calls else every_call)
    onnx.checker.check_model(out, full_check=True)
    assert error(proto, out) == 0
    return out, found


def names(proto: onnx.ModelProto) -> list[str]:
    return [n.name for n in proto.graph.node]


NESTED = model(f"""
    {HEAD}
    g (float[2, 8] x) => (float[2, 8] y) {{
        a = l.outer(x)
        y = l.inner(a)
    }}
    <domain: "l", opset_import: ["" : 18, "l" : 1]>
    outer (x) => (y) {{
        h = l.inner(x)
        k = l.inner(h)
        y = Add(h, k)
    }}
    <domain: "l", opset_import: ["" : 18]>
    inner (x) => (y) {{
        h = Exp(x)
        y = Tanh(h)
    }}
    <domain: "l", opset_import: ["" : 18]>
    unused (x) => (y) {{ y = Neg(x) }}
    """)


def test_nested_calls() -> None:
    out, calls = expanded(NESTED)
    assert calls == ["outer@a", "outer@a/inner@h", "outer@a/inner@k", "inner@y"]
    assert names(out) == [
        "outer@a/inner@h/Exp@h",
        "outer@a/inner@h/Tanh@y",
        "outer@a/inner@k/Exp@h",
        "outer@a/inner@k/Tanh@y",
        "outer@a/Add@y",
        "inner@y/Exp@h",
        "inner@y/Tanh@y",
    ]
    assert [f.name for f in out.functions] == ["unused"], "nothing called it before: it stays"


def test_some_calls() -> None:
    out, calls = expanded(NESTED, "outer@a", "outer@a/inner@k")
    assert calls == ["outer@a", "outer@a/inner@k"]
    assert [n.op_type for n in out.graph.node] == ["inner", "Exp", "Tanh", "Add", "inner"]
    assert [f.name for f in out.functions] == ["inner", "unused"]


def test_no_call() -> None:
    out, calls = expanded(NESTED, "none")
    assert not calls
    assert out == NESTED


def test_attributes() -> None:
    """Given by the call, by a default, by neither."""
    text = """
        g (float[2, 8] x) => (float[2, 8] y) {
            a = l.soft <axis = 0> (x)
            b = l.soft <axis = 0, alpha = 0.5> (a)
            y = l.soft (b)
        }
        <domain: "l", opset_import: ["" : 18]>
        soft <axis: int = 1, alpha> (x) => (y) {
            e = LeakyRelu <alpha: float = @alpha> (x)
            y = Softmax <axis: int = @axis> (e)
        }"""
    proto = model(HEAD + text)
    out, _ = expanded(proto)
    got = [{a.name: helper.get_attribute_value(a) for a in n.attribute} for n in out.graph.node]
    assert got == [{}, {"axis": 0}, {"alpha": 0.5}, {"axis": 0}, {}, {"axis": 1}]


def test_outputs_that_are_inputs_or_left_out() -> None:
    call = helper.make_node("f", ["x"], ["", "y", "z"], "call", domain="l")
    body = [helper.make_node("Exp", ["a"], ["e"]), helper.make_node("Neg", ["e"], ["n"])]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("l", 1)]
    f = helper.make_function("l", "f", ["a"], ["e", "a", "n"], body, imports[:1])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xyz"]
    graph = helper.make_graph([call], "g", infos[:1], infos[1:])
    out = helper.make_model(graph, opset_imports=imports, functions=[f], ir_version=10)
    x = np.array([1, -2, 0.5], np.float32)
    before = ReferenceEvaluator(out).run(None, {"x": x})  # ONNX Runtime wants all outputs of a call
    assert expand(out, every_call) == ["call"]
    assert all(np.allclose(a, b) for a, b in zip(before, outputs(out, {"x": x}), strict=True))
    assert names(out) == ["call/Exp@e", "call/Neg@n", "call/output_0"]


@pytest.mark.parametrize("flag", [True, False])
def test_graphs_inside_a_body(flag: bool) -> None:
    """Their names are new too; values of the body are seen in them; a call in them is expanded."""

    def branch(op: str, result: str) -> Any:
        inner = helper.make_node(op, ["h"], ["t"], "t", domain="" if op != "g" else "l")
        out = helper.make_node("Add", ["t", "x"], [result], "sum")
        return helper.make_graph([inner, out], op, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, [3])])

    imports = [helper.make_opsetid("", 18), helper.make_opsetid("l", 1)]
    pick = helper.make_node("If", ["c"], ["y"], "pick", then_branch=branch("g", "r"), else_branch=branch("Neg", "s"))
    f = helper.make_function("l", "f", ["x", "c"], ["y"], [helper.make_node("Exp", ["x"], ["h"]), pick], imports)
    g = helper.make_function("l", "g", ["x"], ["y"], [helper.make_node("Tanh", ["x"], ["y"])], imports[:1])
    calls = [
        helper.make_node("f", ["x", "c"], ["h"], "one", domain="l"),
        helper.make_node("f", ["h", "c"], ["y"], "two", domain="l"),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy"]
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph(calls, "g", [infos[0], c], infos[1:])
    proto = helper.make_model(graph, opset_imports=imports, functions=[f, g], ir_version=10)
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    assert expand(out, every_call) == ["one", "two", "one/pick/then_branch/t", "two/pick/then_branch/t"]
    onnx.checker.check_model(out, full_check=True)
    assert not out.functions
    given: dict[str, Array] = {"x": np.array([1, -2, 0.5], np.float32), "c": np.array(flag)}
    assert error(proto, out, given) == 0


def test_names_that_are_taken() -> None:
    """A node and a tensor of the graph are called like what comes out of a call."""
    text = """
        g (float[2, 8] x) => (float[2, 8] y) {
            [call/Exp@e] h = Neg(x)
            [call] z = l.f(h)
            y = Add(z, h)
        }
        <domain: "l", opset_import: ["" : 18]>
        f (x) => (y) {
            e = Exp(x)
            y = Tanh(e)
        }"""
    proto = model(HEAD + text.replace("[call/Exp@e] ", "").replace("[call] ", ""))
    proto.graph.node[0].name, proto.graph.node[0].output[0] = "call/Exp@e", "call/e"
    proto.graph.node[1].name, proto.graph.node[1].input[0] = "call", "call/e"
    proto.graph.node[2].input[1] = "call/e"
    out, _ = expanded(proto)
    assert names(out)[:3] == ["call/Exp@e", "call/Exp@e_1", "call/Tanh@y"]


def test_value_infos_come_along() -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(NESTED)
    proto.functions[1].value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 8]))
    out, _ = expanded(proto)
    assert [v.name for v in out.graph.value_info] == ["outer@a/inner@h/h", "outer@a/inner@k/h", "inner@y/h"]
