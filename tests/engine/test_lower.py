"""What TensorRT 8.6's parser is given in place of a model's file: no functions, weights as int32, opset 17."""

from __future__ import annotations

import math
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qpass
from benchmarks.matrix import model_of
from qpass.engine.backends.tensorrt8 import TensorRT8, _moved
from qpass.engine.lower import DIMS, FLOAT_TYPE, Lowered, for_tensorrt8, inlined
from qpass.engine.preflight import plugin_nodes
from qpass.errors import QpassError
from qpass.graph import Model
from qpass.graph.walk import all_nodes
from qpass.ops import DOMAIN
from qpass.plugins import Library
from qpass.testing import model, outputs
from tests import zoo
from tests.zoo import FEW


def rewritten(path: Path, preset: str, group_size: int | None = None) -> Path:
    spec = qpass.QuantSpec.preset(preset, group_size)
    return qpass.rewrite(path, path.with_name(f"{path.stem}-{preset}.onnx"), spec=spec).output


def check(file: Path, lowered: Lowered) -> None:
    """The lowered model says what the file says, in fewer words."""
    before, after = onnx.load(file), lowered.model
    assert after is not None
    assert not after.functions
    assert {o.domain: o.version for o in after.opset_import}[""] <= 17
    old = {w.name: numpy_helper.to_array(w) for w in before.graph.initializer}
    new = {w.name: w for w in after.graph.initializer}
    nodes = {n.name: n for n in before.graph.node if n.domain == DOMAIN}
    for node in after.graph.node:
        if node.domain != DOMAIN:
            continue
        was = nodes.pop(node.name)
        assert list(node.input) == list(was.input)
        attributes = {a.name: a for a in node.attribute}
        assert attributes.pop(FLOAT_TYPE).i == TensorProto.FLOAT16
        dims = list(attributes.pop(DIMS).ints)
        assert [a.name for a in was.attribute] == list(attributes)
        for name in node.input:
            rank = dims.pop(0)
            shape, dims = dims[:rank], dims[rank:]
            assert bool(rank) == (name in old and old[name].dtype == np.int8)
            if rank:
                assert new[name].data_type == TensorProto.INT32
                seen = numpy_helper.to_array(new[name]).view(np.int8)
                np.testing.assert_array_equal(seen[: math.prod(shape)].reshape(shape), old[name])
        assert not dims
    assert not nodes, "every plugin node is still there"
    values = [v for n in plugin_nodes(Model.load(file)) for v in n.outputs]
    assert lowered.integers == {v.name for v in values if v.dtype == np.int8}


@zoo.each(*FEW)
def test_models_of_the_zoo(path: Path, tmp_path: Path, shells8: Library) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    for preset, group_size in (("w8a8", None), ("w8a16", None), ("w4a16-g128", 32)):
        file = rewritten(copy, preset, group_size)
        before = file.read_bytes()
        lowered = for_tensorrt8(str(file), shells8.ops)
        check(file, lowered)
        assert bool(lowered.integers) == (preset == "w8a8")
        assert file.read_bytes() == before


def test_weights_stay_where_they_are(block: Path, shells8: Library, tmp_path: Path) -> None:
    file = rewritten(block, "w8a8")
    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(file), apart, save_as_external_data=True, location="apart.data", size_threshold=64)
    lowered = for_tensorrt8(str(apart), shells8.ops).model
    assert lowered is not None
    views = [w for w in lowered.graph.initializer if w.data_type == TensorProto.INT32]
    assert [list(w.dims) for w in views] == [[128 * 64 // 4], [64 * 128 // 4]]
    for w in views:
        length = next(int(e.value) for e in w.external_data if e.key == "length")
        assert length == 4 * np.prod(w.dims)
        assert not w.raw_data


def test_int8_numbers_one_by_one(block: Path, shells8: Library, tmp_path: Path) -> None:
    """`int32_data` holds a number each; and two nodes may read one weight."""
    proto = onnx.load(rewritten(block, "w8a8"))
    weight = next(w for w in proto.graph.initializer if w.data_type == TensorProto.INT8)
    numbers = numpy_helper.to_array(weight).copy()
    weight.int32_data.extend(int(n) for n in numbers.reshape(-1))
    weight.ClearField("raw_data")
    twin = onnx.NodeProto()
    twin.CopyFrom(next(n for n in proto.graph.node if weight.name in n.input))
    twin.name, twin.output[0] = "twin", "twin_output"
    proto.graph.node.append(twin)
    onnx.save(proto, tmp_path / "m.onnx")
    lowered = for_tensorrt8(str(tmp_path / "m.onnx"), shells8.ops).model
    assert lowered is not None
    viewed = next(w for w in lowered.graph.initializer if w.name == weight.name)
    np.testing.assert_array_equal(numpy_helper.to_array(viewed).view(np.int8), numbers.reshape(-1))
    readers = [n for n in lowered.graph.node if weight.name in n.input]
    told = [list(a.ints) for n in readers for a in n.attribute if a.name == DIMS]
    assert told == 2 * [[0, 2, *weight.dims, 0, 0]]


def test_weights_that_are_nodes(block: Path, shells8: Library, tmp_path: Path) -> None:
    proto = onnx.load(rewritten(block, "w8a8"))
    weight = next(w for w in proto.graph.initializer if w.data_type == TensorProto.INT8)
    numbers = numpy_helper.to_array(weight)
    proto.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], "weight", value=weight))
    proto.graph.initializer.remove(weight)
    onnx.save(proto, tmp_path / "m.onnx")
    lowered = for_tensorrt8(str(tmp_path / "m.onnx"), shells8.ops).model
    assert lowered is not None
    value = next(n for n in lowered.graph.node if n.name == "weight").attribute[0].t
    assert value.data_type == TensorProto.INT32
    np.testing.assert_array_equal(numpy_helper.to_array(value).view(np.int8), numbers.reshape(-1))


@pytest.mark.parametrize("apart", [False, True])
def test_zero_points_are_padded(apart: bool, tmp_path: Path, shells8: Library) -> None:
    """Of 384 inputs three groups: 3 × 15 bytes are no whole int32s."""
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    three (float[B, 384] x) => (float[B, 15] y) <float[384, 15] w> { [fc] y = MatMul(x, w) }
    """
    onnx.save(model(text), tmp_path / "three.onnx")
    file = rewritten(tmp_path / "three.onnx", "w4a16-g128-zp")
    if apart:
        moved = tmp_path / "apart.onnx"
        onnx.save(onnx.load(file), moved, save_as_external_data=True, location="apart.data", size_threshold=0)
        file = moved
    lowered = for_tensorrt8(str(file), shells8.ops).model
    assert lowered is not None
    stored = [w for w in onnx.load(file).graph.initializer if w.data_type == TensorProto.INT8]
    zero = next(w for w in stored if list(w.dims) == [15, 3])
    seen = next(w for w in lowered.graph.initializer if w.name == zero.name)
    assert (list(seen.dims), len(seen.external_data)) == ([12], 0)
    expected = numpy_helper.to_array(zero).reshape(-1)
    np.testing.assert_array_equal(numpy_helper.to_array(seen).view(np.int8)[:45], expected)


def test_weights_that_others_read_too(block: Path, shells8: Library, tmp_path: Path) -> None:
    """They keep theirs, and the plugin gets a copy."""
    proto = onnx.load(rewritten(block, "w8a8"))
    weight = next(w for w in proto.graph.initializer if w.data_type == TensorProto.INT8)
    proto.graph.initializer.append(helper.make_tensor("step", TensorProto.FLOAT, [], [0.5]))
    proto.graph.node.append(helper.make_node("DequantizeLinear", [weight.name, "step"], ["shown"], "shows"))
    proto.graph.output.append(helper.make_tensor_value_info("shown", TensorProto.FLOAT, weight.dims))
    onnx.save(proto, tmp_path / "m.onnx")
    lowered = for_tensorrt8(str(tmp_path / "m.onnx"), shells8.ops).model
    assert lowered is not None
    kinds = {w.name: (w.data_type, list(w.dims)) for w in lowered.graph.initializer}
    assert kinds[weight.name] == (TensorProto.INT8, list(weight.dims))
    assert kinds[f"{weight.name}.int32"] == (TensorProto.INT32, [128 * 64 // 4])
    (reader,) = (n for n in lowered.graph.node if f"{weight.name}.int32" in n.input)
    assert reader.op_type == "SmoothQuantGemm"


@pytest.mark.parametrize("as_nodes", [False, True])
def test_a_plugin_of_constants_alone(as_nodes: bool, tmp_path: Path, shells8: Library) -> None:
    """TensorRT 8.6's builder aborts on it."""
    proto, _, _ = model_of("DequantizeWeight", np.dtype(np.float32))
    if as_nodes:
        for w in proto.graph.initializer:
            proto.graph.node.insert(0, helper.make_node("Constant", [], [w.name], f"the_{w.name}", value=w))
        del proto.graph.initializer[:]
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(
        QpassError, match=r"the_DequantizeWeight \(DequantizeWeight\) reads constants alone \(.*TensorRT 10 or later"
    ):
        for_tensorrt8(str(tmp_path / "m.onnx"), shells8.ops)
    assert for_tensorrt8(str(tmp_path / "m.onnx"), None).model, "its body is no plugin"


def test_int8_weights_that_it_takes_nowhere(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (int64[B] i, float[4] x) => (float[B, 4] y, float[4] z) <int8[3, 4] table, float scale, int8 zero>
    {
        [pick] rows = Gather(table, i)
        [back] y = DequantizeLinear(rows, scale, zero)
        [there] q = QuantizeLinear(x, scale, zero)
        [again] z = DequantizeLinear(q, scale, zero)
    }"""
    proto = model(text)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(QpassError, match=r"pick \(Gather\) reads the int8 weight table, .* keep this weight in float"):
        for_tensorrt8(str(tmp_path / "m.onnx"), {})
    del proto.graph.node[:2], proto.graph.output[0]
    onnx.save(proto, tmp_path / "m.onnx")
    assert for_tensorrt8(str(tmp_path / "m.onnx"), {}).model


def test_types_behind_plugins_in_branches(tmp_path: Path, shells8: Library) -> None:
    """Nothing but its function says what a plugin in a branch returns; the norm behind it is expanded by that."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[B, 64] x, bool c) => (float[B, 32] y) <float[64, 32] w, float[32] s> {
        y = If(c) <then_branch = g1 () => (float[B, 32] p) { [fc] m = MatMul(x, w) [norm] p = RMSNormalization(m, s) },
                   else_branch = g2 () => (float[B, 32] q) { [other] q = MatMul(x, w) }>
    }"""
    onnx.save(model(text), tmp_path / "m.onnx")
    file = rewritten(tmp_path / "m.onnx", "w8a16")
    proto = onnx.load(file)
    for n in proto.graph.node:
        for a in n.attribute:
            del a.g.value_info[:]
    onnx.save(proto, file)
    lowered = for_tensorrt8(str(file), shells8.ops).model
    assert lowered is not None
    nodes = list(all_nodes(lowered.graph.node))
    assert [n.op_type for n in nodes].count("WeightOnlyQuantMatmul") == 2
    assert "ReduceMean" in {n.op_type for n in nodes}


FUNCTIONS = """
<ir_version: 10, opset_import: ["" : {}, "local" : 1]>
g (float[N, 4] x) => (float[N, 1] y) {{ [call] y = local.f(x) }}
<domain: "local", opset_import: ["" : {}]> f (a) => (b) {{ {} }}
"""


@pytest.mark.parametrize("opset", [17, 20])
def test_functions_of_another_opset(opset: int, tmp_path: Path) -> None:
    """Exporters write functions at the opset of their own; an operator means there what it means at that."""
    proto = onnx.parser.parse_model(FUNCTIONS.format(opset, 13, "b = ReduceMean<axes = [1]>(a)"))
    onnx.save(proto, tmp_path / "m.onnx")
    lowered = for_tensorrt8(str(tmp_path / "m.onnx"), {}).model
    assert lowered is not None
    assert not lowered.functions
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    (y,) = outputs(lowered, {"x": x})
    np.testing.assert_allclose(y, x.mean(1, keepdims=True), rtol=1e-6)
    proto = onnx.parser.parse_model(FUNCTIONS.format(17, 20, "c = Gelu(a) b = Neg(c)"))
    onnx.save(proto, tmp_path / "newer.onnx")
    with pytest.raises(QpassError, match=r"model is of opset 17, its local functions are not \(f of 20\)"):
        for_tensorrt8(str(tmp_path / "newer.onnx"), {})


def test_defaults_are_constants(block: Path, tmp_path: Path, shells8: Library) -> None:
    """Old files list every weight as an input too; TensorRT asks for none that has a value."""
    proto = onnx.load(rewritten(block, "w8a8"))
    for w in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(w.name, w.data_type, w.dims))
    old = onnx.parser.parse_model("""<ir_version: 3, opset_import: ["" : 18]>
    g (float[N, 4] x, int64[1] a) => (float[N, 1] y) { y = ReduceMean(x, a) }""")
    old.graph.initializer.append(helper.make_tensor("a", TensorProto.INT64, [1], [1]))
    for name, file, constants in (("listed.onnx", proto, len(proto.graph.initializer)), ("old.onnx", old, 1)):
        onnx.save(file, tmp_path / name)
        lowered = for_tensorrt8(str(tmp_path / name), shells8.ops).model
        assert lowered is not None
        assert [v.name for v in lowered.graph.input] == ["x"]
        assert len(lowered.graph.initializer) == constants
        assert 4 <= lowered.ir_version <= 8
        if name == "old.onnx":
            assert helper.get_attribute_value(lowered.graph.node[0].attribute[0]) == [1]


def test_without_plugins_bodies_are_expanded(block: Path) -> None:
    lowered = for_tensorrt8(str(rewritten(block, "w8a8")), None)
    assert lowered.model is not None
    assert not lowered.integers
    assert not [n for n in lowered.model.graph.node if n.domain == DOMAIN]
    assert inlined(str(block)) is None, "a model without functions is parsed from its file"


class _Layer:
    def __init__(self, kind: str, inputs: list[str], outputs: list[str]) -> None:
        self.type, self.name = types.SimpleNamespace(name=kind), kind.lower()
        self._inputs, self._outputs = [_Tensor(n) for n in inputs], [_Tensor(n) for n in outputs]
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)

    def get_input(self, i: int) -> _Tensor:
        return self._inputs[i]

    def get_output(self, i: int) -> _Tensor:
        return self._outputs[i]


class _Tensor:
    def __init__(self, name: str) -> None:
        self.name = name
        self.range: tuple[float, float] | None = None

    def set_dynamic_range(self, low: float, high: float) -> None:
        self.range = low, high


def test_only_what_plugins_make_is_int8() -> None:
    """The tensors with a range are those that plugins write int8 to, and what only moves these."""
    layers = [
        _Layer("PLUGIN_V2", ["x"], ["q", "scale"]),
        _Layer("SHUFFLE", ["q"], ["moved"]),
        _Layer("SHUFFLE", ["x"], ["other"]),
        _Layer("PLUGIN_V2", ["moved", "w"], ["y"]),
    ]
    network = types.SimpleNamespace(num_layers=4, get_layer=layers.__getitem__)
    flags: list[str] = []
    calls = {
        "set_flag": lambda self, f: flags.append(f),
        "clear_flag": lambda self, f: flags.append(f"not {f}"),
        "get_tactic_sources": lambda self: 0b11111,
        "set_tactic_sources": lambda self, s: None,
    }
    config = type("Config", (), calls)()
    trt = types.SimpleNamespace(
        BuilderFlag=types.SimpleNamespace(FP16="FP16", INT8="INT8", TF32="TF32"),
        TacticSource=types.SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2),
    )
    TensorRT8().configure(trt, config, network, Lowered(None, frozenset({"q"})))
    ranges = {t.name: t.range for layer in layers for t in layer._outputs}
    assert ranges == {"q": (-127.0, 127.0), "scale": None, "moved": (-127.0, 127.0), "other": None, "y": None}
    assert flags == ["FP16", "INT8"]
    layers.append(_Layer("DEQUANTIZE", ["z"], ["zz"]))
    network.num_layers = 5
    with pytest.raises(QpassError, match="is a QuantizeLinear or DequantizeLinear beside plugins that write int8"):
        TensorRT8().configure(trt, config, network, Lowered(None, frozenset({"q"})))
    layers.pop()
    network.num_layers = 4
    flags.clear()
    TensorRT8().configure(trt, config, network, Lowered(None, precision="fp32"))
    assert flags == ["not TF32"], "without int8 tensors there are no scales, which INT8 would ask for"


def test_int8_through_if_and_loop() -> None:
    """A tensor leads into a branch by a layer that comes behind those in the branch, and out of both by others."""
    layers = [
        _Layer("SHUFFLE", ["into"], ["turned"]),
        _Layer("CONDITIONAL_INPUT", ["q"], ["into"]),
        _Layer("CONDITIONAL_OUTPUT", ["turned", "q"], ["chosen"]),
        _Layer("RECURRENCE", ["chosen"], ["state"]),
        _Layer("LOOP_OUTPUT", ["state"], ["last"]),
        _Layer("LOOP_OUTPUT", ["x"], ["other"]),
        _Layer("PLUGIN_V2", ["last"], ["y"]),
    ]
    assert _moved({"q"}, layers) == {"q", "into", "turned", "chosen", "state", "last"}


def test_a_helper_makes_int8_constants() -> None:
    """What the tests above rely on: onnx stores int8 in int32_data, a number each."""
    assert len(helper.make_tensor("w", TensorProto.INT8, [4], [1, 2, 3, 4]).int32_data) == 4
