"""What a rewrite changes in the written model, and that it changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper, numpy_helper

from qpass.graph import Blockwise, Const, Model, Node, Value
from qpass.graph import save as save_module
from tests.graph.models import (
    exotic_model,
    floats,
    initializers,
    int8_rows,
    linear_model,
    quantize_all,
    replace,
    save,
)


def written(model: Model, path: Path) -> ModelProto:
    model.save(path)
    return onnx.load(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_promised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, external: bool, inside: bool
) -> None:
    if not inside:
        monkeypatch.setattr(save_module, "INSIDE", 0)
        monkeypatch.setattr(save_module, "INSIDE_AS_BEFORE", 0)
    model = Model.load(save(linear_model(4, 128, 80, dtype), tmp_path / "in.onnx", external))
    expected = quantize_all(model)
    result = model.save(tmp_path / "out.onnx")
    got = initializers(tmp_path / "out.onnx")
    assert list(got) == ["b0", "b1", "b2", "b3", *(f"mm{i}_{j}" for i in range(4) for j in (0, 1))]
    for name, arrays in expected.items():
        for j, array in enumerate(arrays):
            np.testing.assert_array_equal(got[f"{name}_{j}"], array)
    assert result.bytes_after == sum(p.stat().st_size for p in result.files) < result.bytes_before
    assert len(result.files) == 1 + (not inside)


def test_all_else_stays(tmp_path: Path) -> None:
    before = exotic_model()
    model = Model.load(save(before, tmp_path / "in.onnx"))
    quantize_all(model)
    after = written(model, tmp_path / "out.onnx")

    new = after.graph.node[0]
    assert (new.op_type, new.domain, list(new.output)) == ("Quantized", "qpass", ["a"])
    assert list(new.input) == ["x", "mm_0", "mm_1"]
    assert [(o.domain, o.version) for o in after.opset_import][-1] == ("qpass", 1)
    assert [t.name for t in after.graph.initializer][-2:] == ["mm_0", "mm_1"]

    expected = exotic_model()
    assert expected.graph.initializer[0].name == "w"
    del expected.graph.initializer[0]
    expected.graph.initializer.extend(after.graph.initializer[-2:])
    expected.graph.node[0].CopyFrom(new)
    expected.opset_import.add(domain="qpass", version=1)
    assert after == expected


def test_what_no_longer_exists_is_not_described(tmp_path: Path) -> None:
    model = Model.load(save(exotic_model(), tmp_path / "in.onnx"))
    matmul, add = model.graph.nodes[:2]
    replace(model, add, Node("Fused", "fused", {}, [*matmul.inputs, add.inputs[1]], [], "other"))
    model.graph.nodes.remove(matmul)
    matmul.detach()
    after = written(model, tmp_path / "out.onnx")
    assert "a" not in [v.name for v in after.graph.value_info]
    assert {v.name for v in after.graph.value_info} == {"sequence", "maybe"}
    assert not after.graph.quantization_annotation
    assert after.graph.initializer[0].name == "w"  # the fused node uses it
    assert "never used" in [t.name for t in after.graph.initializer]
    assert "default" in [v.name for v in after.graph.input]


def test_a_tensor_of_another_type_loses_its_old_description(tmp_path: Path) -> None:
    model = Model.load(save(exotic_model(), tmp_path / "in.onnx"))
    matmul = model.graph.nodes[0]
    matmul.outputs[0].dtype = np.dtype(np.float16)
    replace(model, matmul, Node("Half", "half", {}, list(matmul.inputs), [], "other"))
    after = written(model, tmp_path / "out.onnx")
    assert "a" not in [v.name for v in after.graph.value_info]


def test_other_inputs_of_an_original_node(tmp_path: Path) -> None:
    """It keeps all its proto has beside names: metadata, doc string, attributes without a form in the graph."""
    model = Model.load(save(exotic_model(), tmp_path / "in.onnx"))
    odd, last = (n for n in model.graph.nodes if n.op == "Odd")
    cast = Node("Identity", "between", {}, [odd.inputs[0]], [Value("b2")])
    odd.inputs[0] = cast.outputs[0]
    last.inputs[1] = odd.inputs[2]
    model.graph.nodes.append(cast)
    model.sort()
    after = written(model, tmp_path / "out.onnx")
    expected = exotic_model()
    expected.graph.node.insert(2, helper.make_node("Identity", ["b"], ["b2"], "between"))
    expected.graph.node[3].input[0] = "b2"
    expected.graph.node[-1].input[1] = "scalar"
    del expected.graph.sparse_initializer[:]
    assert after == expected


def test_a_weight_that_still_has_a_use_stays(tmp_path: Path) -> None:
    proto = linear_model(1)
    proto.graph.node.append(helper.make_node("Identity", ["w0"], ["w0 again"]))
    proto.graph.output.append(helper.make_empty_tensor_value_info("w0 again"))
    model = Model.load(save(proto, tmp_path / "in.onnx"))
    quantize_all(model)
    written(model, tmp_path / "out.onnx")
    assert list(initializers(tmp_path / "out.onnx")) == ["w0", "b0", "mm0_0", "mm0_1"]


def test_a_subgraph_is_rebuilt(tmp_path: Path) -> None:
    model = Model.load(save(exotic_model(), tmp_path / "in.onnx", external=True))
    choose = next(n for n in model.graph.nodes if n.op == "If")
    branch = choose.attrs["then_branch"]
    inner = branch.nodes[0]
    weight = model.constant(inner.inputs[1])
    assert weight is not None
    made = Blockwise(weight.array.T, int8_rows, [((20, 16), np.int8), ((20,), np.float32)], "branch1")
    inputs = [inner.inputs[0], *(Const(f"q{i}", r) for i, r in enumerate(made.results))]
    new = Node("Quantized", "q", {}, inputs, [], "qpass")
    outputs = list(inner.outputs)
    inner.detach()
    new.outputs.extend(outputs)
    branch.nodes[0] = new
    after = written(model, tmp_path / "out.onnx")

    expected = exotic_model()
    then = expected.graph.node[5].attribute[0].g
    if then.name != "branch1":
        then = expected.graph.node[5].attribute[1].g
    del then.initializer[:]
    then.node[0].CopyFrom(helper.make_node("Quantized", ["f", "q0", "q1"], ["out1"], "q", domain="qpass"))
    expected.opset_import.add(domain="qpass", version=1)
    packed, scale = int8_rows(floats(16, 20, seed=1).T)
    expected.graph.initializer.append(numpy_helper.from_array(packed, "q0"))
    expected.graph.initializer.append(numpy_helper.from_array(scale, "q1"))
    assert after.graph.node == expected.graph.node
    assert list(after.opset_import) == list(expected.opset_import)
    assert list(initializers(tmp_path / "out.onnx"))[-2:] == ["q0", "q1"]


def test_new_functions(tmp_path: Path) -> None:
    proto = linear_model(1)
    model = Model.load(save(proto, tmp_path / "in.onnx"))
    relu = helper.make_node("Relu", ["x"], ["y"])
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("qpass", "Act", ["x"], ["y"], [relu], opset, overload="a"))
    act = Node("Act", "act", {}, [model.graph.nodes[-1].outputs[0]], [Value("z")], "qpass")
    act.overload = "a"
    model.graph.nodes.append(act)
    after = written(model, tmp_path / "out.onnx")
    assert after.ir_version == 10  # the first with overloads
    assert [f.overload for f in after.functions] == [after.graph.node[-1].overload] == ["a"]
    assert [o.domain for o in after.opset_import] == ["", "qpass"]
    onnx.checker.check_model(after)


def test_weights_that_were_inputs_go_from_there_too(tmp_path: Path) -> None:
    proto = linear_model(1)
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, 1, tensor.dims))
    model = Model.load(save(proto, tmp_path / "in.onnx"))
    quantize_all(model)
    assert [v.name for v in written(model, tmp_path / "out.onnx").graph.input] == ["x", "b0"]


def test_a_default_that_lost_its_use_stays(tmp_path: Path) -> None:
    """Without it the input would have to be fed."""
    model = Model.load(save(exotic_model(), tmp_path / "in.onnx"))
    add = model.graph.nodes[1]
    replace(model, add, Node("Identity", "id", {}, [add.inputs[0]], []))
    after = written(model, tmp_path / "out.onnx")
    assert after.graph.input == exotic_model().graph.input
    assert list(after.graph.initializer) == list(exotic_model().graph.initializer)


def test_attributes_of_new_nodes(tmp_path: Path) -> None:
    model = Model.load(save(linear_model(1), tmp_path / "in.onnx"))
    attributes = {
        "z": 1,
        "a": 2.5,
        "text": "é",
        "ints": [1, 2],
        "floats": [0.5],
        "strings": ["x", "y"],
        "flag": np.int64(3),
        "number": np.float32(0.25),
        "tensor": floats(2, 3),
    }
    new = Node("New", "new", attributes, [model.graph.nodes[-1].outputs[0]], [Value("z")], "other")
    model.graph.nodes.append(new)
    proto = written(model, tmp_path / "out.onnx").graph.node[-1]
    assert [a.name for a in proto.attribute] == list(attributes)
    got = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
    np.testing.assert_array_equal(numpy_helper.to_array(got.pop("tensor")), attributes.pop("tensor"))
    assert got == attributes | {"text": "é".encode(), "strings": [b"x", b"y"]}


def test_new_values_of_an_initializer(tmp_path: Path) -> None:
    model = Model.load(save(linear_model(1), tmp_path / "in.onnx"))
    weight = model.graph.nodes[0].inputs[1]
    assert isinstance(weight, Const)
    weight.values = weight.array * 2.0
    written(model, tmp_path / "out.onnx")
    got = initializers(tmp_path / "out.onnx")
    assert list(got) == ["w0", "b0"]
    np.testing.assert_array_equal(got["w0"], floats(64, 48) * 2)


def test_the_rewritten_model_runs(tmp_path: Path) -> None:
    """Weights as int8 and DequantizeLinear, in ONNX Runtime, from a data file."""
    proto = linear_model(2, 256, 256)
    model = Model.load(save(proto, tmp_path / "in.onnx", external=True))
    for node in [n for n in model.graph.nodes if n.op == "MatMul"]:
        weight = model.constant(node.inputs[1])
        assert weight is not None
        made = Blockwise(weight.array.T, int8_rows, [((256, 256), np.int8), ((256,), np.float32)], node.name)
        inputs = [Const(model.unique(f"{node.name}_{i}"), r) for i, r in enumerate(made.results)]
        back = Node("DequantizeLinear", f"{node.name}_dq", {"axis": 0}, inputs, [Value(f"{node.name}_w")])
        turn = Node("Transpose", f"{node.name}_t", {}, [back.outputs[0]], [Value(f"{node.name}_wt")])
        node.inputs[1] = turn.outputs[0]
        model.graph.nodes += [back, turn]
    model.sort()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "INSIDE", 0)
        assert len(model.save(tmp_path / "out.onnx").files) == 2
    x = {"x": floats(3, 256)}
    run = [
        onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, x)[0]
        for name in ("in.onnx", "out.onnx")
    ]
    assert np.abs(run[0] - run[1]).max() < 0.02 * np.abs(run[0]).max()


def _rename_output(model: Model) -> None:
    model.graph.outputs[0].name = "other"


def _dangle(model: Model) -> None:
    model.graph.nodes[1].inputs[0] = Value("nowhere")


def _forget_output(model: Model) -> None:
    model.graph.nodes.pop()


def _twice(model: Model) -> None:
    model.graph.nodes.append(Node("Relu", "r", {}, [model.graph.inputs[0]], [Value("m0")]))


def _two_constants(model: Model) -> None:
    model.graph.nodes[0].inputs[1] = Const("c", floats(64, 48))
    model.graph.nodes[2].inputs[1] = Const("c", floats(48, 64))


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (_rename_output, "must keep their names"),
        (_dangle, "reads 'nowhere', which nothing makes"),
        (_forget_output, "nothing makes the graph's output 'y1'"),
        (_twice, "'m0' is made twice"),
        (_two_constants, "two constants are called 'c'"),
    ],
)
def test_mistakes_of_a_rule_write_nothing(tmp_path: Path, mistake: Callable[[Model], None], says: str) -> None:
    model = Model.load(save(linear_model(), tmp_path / "in.onnx"))
    mistake(model)
    with pytest.raises(ValueError, match=says):
        model.save(tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]
