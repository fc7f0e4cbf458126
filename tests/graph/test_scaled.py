"""Constants behind QuantizeLinear and DequantizeLinear, as ONNX Runtime computes them, and read in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qpass.graph import Dequantized, Given, Lazy, Model, Stored
from qpass.graph.scaled import Quantized
from tests.graph.models import save
from tests.graph.test_constants import agrees_with_onnxruntime, seen, step

RANDOM = np.random.default_rng(0)
INT4, UINT4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)
LIMITS = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8), "uint4": (0, 16), "int16": (-999, 999)}


def integers(dtype: Any, *shape: int) -> Any:
    return RANDOM.integers(*LIMITS[np.dtype(dtype).name], shape).astype(dtype)


def scales(*shape: int, dtype: Any = np.float32) -> Any:
    return RANDOM.uniform(0.01, 0.2, shape).astype(dtype)


def chain(folder: Path, w: Any, nodes: list[NodeProto], opset: int = 21, **tensors: Any) -> Path:
    """w → nodes, the last one an output."""
    given = [numpy_helper.from_array(np.asarray(v), k) for k, v in (("w", w), *tensors.items())]
    output = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    graph = helper.make_graph(nodes, "chain", [], [output], given)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return save(helper.make_model(graph, opset_imports=imports, ir_version=10), folder / "chain.onnx")


FORMS: dict[str, tuple[Any, Any, Any, dict[str, int]]] = {
    "per tensor": (integers("int8", 6, 8), scales(), None, {}),
    "per tensor, in a vector": (integers("uint8", 6, 8), scales(1), integers("uint8", 1), {}),
    "axis 0": (integers("int8", 6, 8), scales(6), None, {"axis": 0}),
    "axis 1, the default": (integers("int8", 6, 8), scales(8), integers("int8", 8), {}),
    "axis -2": (integers("uint8", 6, 8), scales(6), integers("uint8", 6), {"axis": -2}),
    "three dims": (integers("int8", 2, 6, 8), scales(6), None, {"axis": 1}),
    "a vector": (integers("uint8", 8), scales(), integers("uint8"), {}),
    "float16": (integers("int8", 6, 8), scales(8, dtype=np.float16), None, {}),
    "int16": (integers("int16", 6, 8), scales(8), integers("int16", 8), {}),
    "int32": (RANDOM.integers(-(2**30), 2**30, 8).astype(np.int32), scales(8), None, {"axis": 0}),
    "int4": (integers(INT4, 6, 8), scales(8), integers(INT4, 8), {}),
    "uint4": (integers(UINT4, 6, 8), scales(6), None, {"axis": 0}),
    "float8": (RANDOM.standard_normal((6, 8)).astype(ml_dtypes.float8_e4m3fn), scales(), None, {}),
    "float8, a zero": (
        RANDOM.standard_normal((6, 8)).astype(ml_dtypes.float8_e4m3fn),
        scales(8),
        np.zeros(8, ml_dtypes.float8_e4m3fn),
        {},
    ),
    "blocks along 0": (integers(INT4, 64, 6), scales(4, 6), integers(INT4, 4, 6), {"axis": 0, "block_size": 16}),
    "blocks along 1": (integers("int8", 6, 64), scales(6, 4, dtype=np.float16), None, {"axis": 1, "block_size": 16}),
    "an unfull block": (integers("uint8", 6, 40), scales(6, 3), integers("uint8", 6, 3), {"axis": 1, "block_size": 16}),
}


@pytest.mark.parametrize("form", FORMS)
def test_dequantized_constants(form: str, tmp_path: Path) -> None:
    q, scale, zero, attributes = FORMS[form]
    more = ("s",) if zero is None else ("s", "z")
    node = step("DequantizeLinear", 0, *more, **attributes)
    tensors = {"s": scale} if zero is None else {"s": scale, "z": zero}
    const = agrees_with_onnxruntime(chain(tmp_path, q, [node], **tensors))
    assert (const.origin, [n.op for n in const.via]) == ("w", ["DequantizeLinear"])
    assert isinstance(const.array, Dequantized)


@pytest.mark.parametrize("form", FORMS)
def test_pieces_are_those_of_the_whole(form: str, tmp_path: Path) -> None:
    q, scale, zero, attributes = FORMS[form]
    node = step("DequantizeLinear", 0, *(("s",) if zero is None else ("s", "z")), **attributes)
    const = seen(chain(tmp_path, q, [node], s=scale, z=0 if zero is None else zero))
    assert const is not None
    whole = const.load()
    for start in range(len(whole)):
        for stop in range(start, len(whole) + 1):
            np.testing.assert_array_equal(const.array.rows(start, stop), whole[start:stop])
    if whole.ndim == 2:
        assert isinstance(const.array.T, Dequantized)
        np.testing.assert_array_equal(const.array.T.load(), whole.T)
        for start in range(0, whole.shape[1], 3):
            for stop in range(start, whole.shape[1] + 1):
                np.testing.assert_array_equal(const.array.columns(start, stop), whole[:, start:stop])
                np.testing.assert_array_equal(const.array.T.rows(start, stop), whole.T[start:stop])
    ones = const.array.reshape(1, *whole.shape, 1)
    assert isinstance(ones, Dequantized)
    np.testing.assert_array_equal(ones.load(), whole.reshape(1, *whole.shape, 1))
    np.testing.assert_array_equal(const.array.reshape(-1).load(), whole.reshape(-1))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
def test_floats_that_a_model_quantizes(dtype: str, tmp_path: Path) -> None:
    w = RANDOM.standard_normal((6, 8)).astype(np.float32)
    zero = integers(UINT4 if dtype == "uint4" else INT4 if dtype == "int4" else dtype, 8)
    nodes = [step("QuantizeLinear", 0, "s", "z"), step("DequantizeLinear", 1, "s", "z"), step("Transpose", 2)]
    const = agrees_with_onnxruntime(chain(tmp_path, w, nodes, s=scales(8), z=zero))
    assert isinstance(const.array, Dequantized)
    assert isinstance(const.array.base, Quantized)
    assert const.array.base.dtype.name == dtype


def test_microsofts_domain_is_the_same(tmp_path: Path) -> None:
    nodes = [step("DequantizeLinear", 0, "s", "z", domain="com.microsoft", axis=0)]
    path = chain(tmp_path, integers("int16", 6, 8), nodes, opset=17, s=scales(6), z=integers("int16", 6))
    agrees_with_onnxruntime(path)


def test_other_nodes_before_and_behind(tmp_path: Path) -> None:
    nodes = [
        step("Transpose", 0),
        step("DequantizeLinear", 1, "s", axis=0),
        step("Cast", 2, to=TensorProto.FLOAT),
        step("Unsqueeze", 3, "axes"),
    ]
    const = agrees_with_onnxruntime(
        chain(tmp_path, integers("int8", 6, 8), nodes, s=scales(8, dtype=np.float16), axes=np.array([0]))
    )
    assert [n.op for n in const.via] == ["Transpose", "DequantizeLinear", "Cast", "Unsqueeze"]


def test_what_is_computed_is_not_constant(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(integers("int8", 6, 8), "w"), numpy_helper.from_array(scales(), "k")]
    inputs = [helper.make_tensor_value_info("s", 1, []), helper.make_tensor_value_info("z", TensorProto.INT8, [])]
    for names in (["w", "s"], ["w", "k", "z"]):
        node = helper.make_node("DequantizeLinear", names, ["y"])
        graph = helper.make_graph([node], "g", inputs, [helper.make_empty_tensor_value_info("y")], tensors)
        model = Model.load(save(helper.make_model(graph, ir_version=10), tmp_path / "m.onnx"))
        assert model.constant(model.graph.outputs[0]) is None


@pytest.mark.parametrize(
    ("scale", "zero", "attributes"),
    [
        (scales(7), None, {}),
        (scales(8), integers("int8", 6), {}),
        (scales(8), None, {"axis": 3}),
        (scales(2, 8), None, {"axis": 0, "block_size": 2}),
        (scales(2, 8), None, {}),
    ],
)
def test_scales_that_do_not_fit(scale: Any, zero: Any, attributes: dict[str, int], tmp_path: Path) -> None:
    tensors = {"s": scale} if zero is None else {"s": scale, "z": zero}
    node = step("DequantizeLinear", 0, *tensors, **attributes)
    assert seen(chain(tmp_path, integers("int8", 6, 8), [node], **tensors)) is None


@pytest.mark.parametrize("width", [7, 8, 9, 16])
@pytest.mark.parametrize("dtype", [INT4, UINT4])
def test_columns_of_packed_tensors(dtype: Any, width: int) -> None:
    q = integers(dtype, 5, width)
    lazy = Stored.of(numpy_helper.from_array(q, "q"))
    for start in range(width):
        for stop in range(start, width + 1):
            np.testing.assert_array_equal(lazy.columns(start, stop), q[:, start:stop])


class Piecewise(Lazy):
    """Integers that may not be read as a whole."""

    def __init__(self, q: Any) -> None:
        self.q, self.shape, self.dtype = q, q.shape, q.dtype

    def rows(self, start: int, stop: int) -> Any:
        assert stop - start <= 32
        return self.q[start:stop]

    def columns(self, start: int, stop: int) -> Any:
        assert stop - start <= 32
        return self.q[:, start:stop]


def test_a_part_reads_but_its_part() -> None:
    q = integers("int8", 256, 512)
    array = Dequantized(Piecewise(q), Given(scales(8, 512)), None, np.dtype(np.float16), block=32)
    assert array.rows(40, 60).shape == (20, 512)
    assert array.columns(0, 32).shape == array.T.rows(0, 32).T.shape == (256, 32)
    assert {leaf.shape for leaf in array.leaves()} == {(256, 512), (8, 512)}
