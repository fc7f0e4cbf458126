"""A model that no rule touches comes out as it came in: proto by proto, weights included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from qpass.graph import Model
from qpass.graph import save as save_module
from qpass.graph.load import tensors
from tests.graph.models import exotic_model, linear_model, save


def loaded(path: Path) -> ModelProto:
    """The model in one form, whether its weights are inside or beside it."""
    model = onnx.load(path)
    for tensor in [t for t in tensors(model) if t.data_type != onnx.TensorProto.STRING]:
        raw = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.ClearField("data_location")
        tensor.raw_data = raw
    return model


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go to a data file whatever their size."""
    monkeypatch.setattr(save_module, "INSIDE", 0)
    monkeypatch.setattr(save_module, "INSIDE_AS_BEFORE", 0)


def test_zoo(zoo: list[Path], tmp_path: Path) -> None:
    for path in zoo:
        out = tmp_path / path.name
        Model.load(path).save(out)
        assert onnx.load(out) == onnx.load(path), path.name
        assert list(tmp_path.iterdir()) == [out]
        out.unlink()


def test_everything_inside(tmp_path: Path) -> None:
    source = save(exotic_model(), tmp_path / "in.onnx")
    Model.load(source).save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == onnx.load(source) == exotic_model()


def test_everything_from_beside_to_inside(tmp_path: Path) -> None:
    source = save(exotic_model(), tmp_path / "in.onnx", external=True)
    result = Model.load(source).save(tmp_path / "out.onnx")
    assert result.files == (tmp_path / "out.onnx",)
    assert loaded(tmp_path / "out.onnx") == loaded(source)


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("external", [False, True])
def test_everything_to_beside(tmp_path: Path, external: bool) -> None:
    source = save(exotic_model(), tmp_path / "in.onnx", external)
    result = Model.load(source).save(tmp_path / "out.onnx")
    assert loaded(tmp_path / "out.onnx") == loaded(source)
    assert [p.suffix for p in result.files] == [".onnx", ".data"]
    for tensor in onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer:
        place = {e.key: e.value for e in tensor.external_data}
        assert bool(place) == (len(numpy_helper.from_array(numpy_of(tensor, tmp_path)).raw_data) >= 1024)
        if place:
            assert place["location"] == result.files[1].name
            assert int(place["offset"]) % 4096 == 0


def numpy_of(tensor: onnx.TensorProto, folder: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if tensor.data_type == onnx.TensorProto.STRING:
        return np.zeros(0)
    return numpy_helper.to_array(tensor, str(folder))


@pytest.mark.usefixtures("outside")
def test_same_input_same_bytes(tmp_path: Path) -> None:
    source = save(exotic_model(), tmp_path / "in.onnx")
    files = [Model.load(source).save(tmp_path / "out.onnx").files for _ in range(2)]
    first = [p.read_bytes() for p in files[0]]
    (tmp_path / "more").mkdir()
    moved = tmp_path / "more" / "out.onnx"
    assert [p.read_bytes() for p in Model.load(source).save(moved, max_memory=1).files] == first
    assert files[0] == files[1]


def test_a_model_that_was_saved_is_saved_the_same_again(tmp_path: Path) -> None:
    source = save(linear_model(), tmp_path / "in.onnx")
    Model.load(source).save(tmp_path / "a.onnx")
    Model.load(tmp_path / "a.onnx").save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_input_is_only_read(tmp_path: Path) -> None:
    source = save(exotic_model(), tmp_path / "in.onnx", external=True)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    Model.load(source).save(tmp_path / "out.onnx")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before


@pytest.mark.parametrize("typed", ["float_data", "raw_data"])
def test_old_models_list_their_weights_as_inputs(tmp_path: Path, typed: str) -> None:
    model = linear_model()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, tensor.dims))
        if typed == "float_data":
            tensor.float_data.extend(numpy_helper.to_array(tensor).reshape(-1))
            tensor.ClearField("raw_data")
    source = save(model, tmp_path / "in.onnx")
    Model.load(source).save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == model
