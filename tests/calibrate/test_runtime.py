from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import QpassError
from qpass.graph import Model
from qpass.runtime import Runner, inputs_of, load
from qpass.testing import feeds, model
from tests.calibrate.conftest import TEXT, ids


def run(path: Path, arrays: dict[str, Any], *groups: list[str]) -> list[dict[str, Any]]:
    runner = Runner(path, load(path), groups or None)
    return [{n: a.copy() for n, a in group.items()} for group in runner.run(arrays)]


def test_groups_in_any_order_give_what_one_group_gives(zoo: list[Path]) -> None:
    rng = np.random.default_rng(0)
    for path in zoo[::5]:
        proto = load(path)
        arrays = feeds(proto, total_sequence=6)
        names = [n.output[0] for n in proto.graph.node if n.op_type in ("MatMul", "Gemm", "Add", "Mul", "Shape")]
        (whole,) = run(path, arrays, names)
        for order in (names, [str(n) for n in rng.permutation(names)]):
            pieces = [order[i : i + 9] for i in range(0, len(order), 9)]
            found = {name: a for group in run(path, arrays, *pieces) for name, a in group.items()}
            for name in names:
                np.testing.assert_allclose(found[name], whole[name], rtol=0.05, atol=0.05)


def test_each_node_runs_once(tiny: Path) -> None:
    runner = Runner(tiny, load(tiny), [["h"], ["a"], ["r", "h", "input_ids", "b1"], ["y"]])
    assert [[n.op_type for n in p.nodes] for p in runner._pieces] == [
        ["Gather"],
        ["MatMul", "Add"],
        ["Relu"],
        ["MatMul"],
    ]
    found = list(runner.run(ids(2, 3)))
    assert list(found[2]) == ["r", "h", "input_ids", "b1"]
    np.testing.assert_array_equal(found[2]["input_ids"], ids(2, 3)["input_ids"])


def test_what_nobody_asks_for_is_not_run(tiny: Path) -> None:
    runner = Runner(tiny, load(tiny), [["h"]])
    assert [n.op_type for n in runner._pieces[0].nodes] == ["Gather"]
    assert next(runner.run({"input_ids": ids(1, 2)["input_ids"]}))["h"].shape == (1, 2, 8)


def test_cuts_through_subgraphs_and_sequences(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 4] x, bool c) => (float[batch, 4] y) <float[4, 4] w>
    {
        h = MatMul(x, w)
        s = SequenceConstruct(h, x)
        r = Relu(h)
        y = If(c) <then_branch = yes () => (float[batch, 4] a) { a = Add(h, r) },
                   else_branch = no () => (float[batch, 4] b) { z = ConcatFromSequence<axis = 0>(s)  b = Neg(z) }>
    }
    """
    path = tmp_path / "m.onnx"
    onnx.save(model(text), path)
    for c in (True, False):
        arrays = {"x": np.ones((2, 4), np.float32), "c": np.array(c)}
        (whole,) = run(path, arrays)
        np.testing.assert_array_equal(run(path, arrays, ["h"], ["s"], ["r"], ["y"])[-1]["y"], whole["y"])


@pytest.mark.parametrize("outside", [False, True])
def test_weights_stay_where_they_are(tmp_path: Path, outside: bool) -> None:
    path = tmp_path / "m.onnx"
    proto = model(TEXT.replace("50, 8", "5000, 8"))
    if outside:
        (tmp_path / "data").mkdir()
        onnx.save(proto, path, save_as_external_data=True, location="data/m.bin", size_threshold=0)
        proto = onnx.load(path)
    else:
        onnx.save(proto, path)
    before = sorted(tmp_path.rglob("*"))
    loaded = load(path)
    assert loaded.ByteSize() < 10_000
    table = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "table")
    found = list(Runner(path, loaded, [["h"], ["y"]]).run(ids(2, 3)))
    np.testing.assert_array_equal(found[0]["h"], table[ids(2, 3)["input_ids"]])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_behind_links(tmp_path: Path) -> None:
    """As a Hugging Face cache keeps it: ONNX Runtime itself refuses data that links lead to."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    for folder in (blobs, snapshot, tmp_path / "made"):
        folder.mkdir(parents=True)
    onnx.save(
        model(TEXT), tmp_path / "made" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    for name, blob in (("m.onnx", "aa"), ("m.data", "bb")):
        shutil.move(tmp_path / "made" / name, blobs / blob)
        os.symlink(f"../../blobs/{blob}", snapshot / name)
    (found,) = run(snapshot / "m.onnx", ids(2, 3))
    assert found["y"].shape == (2, 3, 4)


def test_bfloat16_is_computed_in_fp32(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 40] x) => (bfloat16[batch, 8] y) <bfloat16[40, 30] w, bfloat16[30, 8] v>
    {
        x16 = Cast<to = 16>(x)
        h = MatMul(x16, w)
        f = Constant<value = float[1] {1.5}>()
        one = Cast<to = 16>(f)
        s = Add(h, one)
        y = MatMul(s, v)
    }
    """
    path = tmp_path / "m.onnx"
    proto = model(text)
    onnx.save(proto, path)
    w, v = (numpy_helper.to_array(t).astype(np.float32) for t in proto.graph.initializer)
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    for groups in ([], [["h"], ["s"], ["y"]]):
        y = run(path, {"x": x}, *groups)[-1]["y"]
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, (x @ w + 1.5) @ v, rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_are_fed_as_fp32() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["b", None, 3])
    proto = helper.make_model(helper.make_graph([], "g", [value], []))
    assert str(inputs_of(proto)["x"]) == "'x' float32[b, ?, 3]"


def test_the_proto_is_left_alone(tiny: Path) -> None:
    loaded = Model.load(tiny)
    before = loaded.proto.SerializeToString()
    list(Runner(tiny, loaded.proto, [["h"], ["y"]]).run(ids(1, 2)))
    assert loaded.proto.SerializeToString() == before


# -- errors, each a line, and nothing else on the terminal


def test_a_model_that_onnx_runtime_lacks_an_op_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    node = helper.make_node("Unheard", ["x"], ["y"], domain="nobody")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nobody", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets), path)
    with pytest.raises(QpassError, match=r"ONNX Runtime .* cannot load .*m\.onnx: .*Unheard") as error:
        Runner(path, load(path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        {"input_ids": np.zeros((2, 3), np.float32)},
        {"input_ids": np.zeros((2, 3, 1), np.int64)},
        {"input_ids": np.full((2, 3), 50)},
        {"input_ids": None},
    ],
    ids=["dtype", "rank", "range", "missing"],
)
def test_inputs_that_a_model_refuses(tiny: Path, change: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    arrays = {n: a for n, a in (ids(2, 3) | change).items() if a is not None}
    runner = Runner(tiny, load(tiny))
    with pytest.raises(QpassError, match=r"tiny\.onnx: cannot run on a\.npz: ") as error:
        list(runner.run(arrays, "a.npz"))
    assert "\n" not in str(error.value)
    assert "ONNXRuntimeError" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_tensor(tiny: Path) -> None:
    with pytest.raises(ValueError, match="no tensor 'nothing'"):
        Runner(tiny, load(tiny), [["nothing"]])
