"""What is wrong with a model file is said in one line that names the file or tensor and the mend."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from qpass.errors import QpassError
from qpass.graph import Model
from tests.graph.models import exotic_model, floats, initializers, linear_model, save


def refused(path: Path) -> str:
    with pytest.raises(QpassError) as error:
        Model.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.onnx")


def test_a_folder(tmp_path: Path) -> None:
    assert "is a folder; give" in refused(tmp_path)
    save(linear_model(), tmp_path / "model.onnx")
    assert "did you mean" in refused(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path: Path) -> None:
    path = save(linear_model(), tmp_path / "model.onnx")
    path.chmod(0)
    assert "Permission denied" in refused(path)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"just some text\n" * 40, "is not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(300), "is not an ONNX model"),
        (b"\x00" * 4096, "is not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (ModelProto(ir_version=8).SerializeToString(), "is not an ONNX model"),
    ],
)
def test_not_onnx(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert says in refused(tmp_path / "model.onnx")


def test_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.onnx", "w") as archive:
        archive.writestr("model.onnx", b"")
    assert "is a zip archive" in refused(tmp_path / "model.onnx")


def test_truncated_anywhere(tmp_path: Path) -> None:
    content = save(exotic_model(), tmp_path / "whole.onnx").read_bytes()
    for length in range(1, len(content), len(content) // 150):
        (tmp_path / "model.onnx").write_bytes(content[:length])
        message = refused(tmp_path / "model.onnx")
        assert length < 8 or "truncated or damaged" in message, (length, message)


def test_damaged_anywhere(tmp_path: Path) -> None:
    """Whatever byte is wrong: an error of ours or a model, never another exception."""
    content = bytearray(save(linear_model(1, 8, 8), tmp_path / "whole.onnx").read_bytes())
    path = tmp_path / "model.onnx"
    for at in range(len(content)):
        for value in (0xFF, content[at] ^ 1):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            with suppress(QpassError):
                Model.load(path)


def test_opsets(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    for version, says in (
        (12, "convert_version"),
        (newest + 1, "pip install -U onnx"),
    ):
        path = save(linear_model(opset=version), tmp_path / "model.onnx")
        assert f"has opset {version}" in (message := refused(path))
        assert says in message
    for version in (13, newest):
        assert Model.load(save(linear_model(opset=version), path)).opset == version
    model = linear_model()
    model.opset_import[0].domain = "ai.onnx"  # an alias of ""
    assert Model.load(save(model, path)).opset == 17
    model.opset_import[0].domain = "other"
    assert "no opset of the default domain" in refused(save(model, path))


def test_a_newer_format(tmp_path: Path) -> None:
    model = linear_model()
    model.ir_version = onnx.IR_VERSION + 1
    assert "pip install -U onnx" in refused(save(model, tmp_path / "model.onnx"))


def _duplicate_initializer(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _duplicate_output(model: ModelProto) -> None:
    model.graph.node[1].output[0] = "m0"


def _undefined_input(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


def _undefined_output(model: ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


def _wrong_size(model: ModelProto) -> None:
    model.graph.initializer[1].dims[0] += 1


def _wrong_size_of_a_large_one(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] += 1


def _negative(model: ModelProto) -> None:
    model.graph.initializer[1].dims[0] = -1


def _unknown_type(model: ModelProto) -> None:
    model.graph.initializer[1].data_type = 99


def _segment(model: ModelProto) -> None:
    model.graph.initializer[1].segment.begin = 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_duplicate_initializer, "two initializers are called 'w0'"),
        (_duplicate_output, "'m0'"),
        (_undefined_input, "'nowhere', which nothing makes"),
        (_undefined_output, "'nowhere', which nothing makes"),
        (_wrong_size, "tensor 'b0'"),
        (_wrong_size_of_a_large_one, "tensor 'w0'"),
        (_negative, "tensor 'b0'"),
        (_unknown_type, "tensor 'b0' has an unknown tensor data type 99"),
        (_segment, "segments"),
    ],
)
def test_broken_graphs(tmp_path: Path, damage: Callable[[ModelProto], None], says: str) -> None:
    model = linear_model()
    damage(model)
    assert says in refused(save(model, tmp_path / "model.onnx"))


@pytest.fixture
def external(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return save(linear_model(), folder / "model.onnx", external=True)


def repoint(path: Path, **entries: str | None) -> Path:
    """Change where the first tensor's data is said to be."""
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    where = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in where.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def test_missing_data(external: Path) -> None:
    external.with_suffix(".data").unlink()
    message = refused(external)
    assert "tensor 'w0'" in message
    assert "model.data, which is missing; copy it beside the model" in message


def test_short_data(external: Path) -> None:
    os.truncate(external.with_suffix(".data"), 5000)
    assert "truncated" in refused(external)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"offset": "-4"}, "offset -4"),
        ({"offset": "99999999"}, "offset 99999999"),
        ({"offset": "many"}, "not a number"),
        ({"length": "12"}, "length 12"),
        ({"length": "-1"}, "length -1"),
        ({"location": None}, "without a location"),
        ({"location": "."}, "no regular file"),
        ({"location": "../model.data"}, "outside the model's folder"),
        ({"location": "sub/../../model.data"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "link/passwd"}, "outside the model's folder"),
        ({"location": "linked.data"}, "outside the model's folder"),
        ({"location": "C:\\windows"}, "outside the model's folder"),
        ({"location": "a\0b"}, "without a location"),
    ],
)
def test_bad_places(external: Path, entries: dict[str, str | None], says: str) -> None:
    (external.parent / "link").symlink_to("/etc")
    (external.parent.parent / "other.data").write_bytes(bytes(50000))
    (external.parent / "linked.data").symlink_to("../other.data")
    assert says in refused(repoint(external, **entries))


def test_good_places(external: Path) -> None:
    """A subfolder, a link inside the folder, no length, no offset."""
    folder = external.parent
    (folder / "sub").mkdir()
    external.with_suffix(".data").rename(folder / "sub" / "w")
    (folder / "model.data").symlink_to("sub/w")
    Model.load(external)
    Model.load(repoint(external, location="sub/w", length=None, offset=None))


def test_a_cache_of_links(tmp_path: Path, external: Path) -> None:
    """A Hugging Face snapshot: model and data are both links into a folder of blobs."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    external.rename(blobs / "aaaa")
    external.with_suffix(".data").rename(blobs / "bbbb")
    (snapshot / "model.onnx").symlink_to("../../blobs/aaaa")
    (snapshot / "model.data").symlink_to("../../blobs/bbbb")
    Model.load(snapshot / "model.onnx").save(tmp_path / "out.onnx")
    assert initializers(tmp_path / "out.onnx").keys() == {"w0", "b0", "w1", "b1"}


def test_data_in_a_foreign_file(tmp_path: Path) -> None:
    """Such as safetensors: a range of a file that holds other things too, at an odd offset."""
    weight = floats(64, 48)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 117 + weight.tobytes() + b"more")
    model = linear_model(1)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.safetensors"), ("offset", "117"), ("length", str(weight.nbytes))):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    loaded = Model.load(tmp_path / "in.onnx")
    const = loaded.constant(loaded.graph.nodes[0].inputs[1])
    assert const is not None
    np.testing.assert_array_equal(const.load(), weight)
    np.testing.assert_array_equal(const.array.T.rows(3, 9), weight.T[3:9])
    loaded.save(tmp_path / "out.onnx")
    np.testing.assert_array_equal(initializers(tmp_path / "out.onnx")["w0"], weight)


def test_raw_data_of_an_external_tensor_is_ignored(external: Path) -> None:
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].raw_data = bytes(64 * 48 * 4)
    external.write_bytes(model.SerializeToString())
    loaded = Model.load(external)
    const = loaded.constant(loaded.graph.nodes[0].inputs[1])
    assert const is not None
    np.testing.assert_array_equal(const.load(), floats(64, 48))


def test_shapes_that_cannot_be_inferred_are_unknown(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.node.append(helper.make_node("Unheard", ["m0"], ["u"], domain="of"))
    model.opset_import.add(domain="of", version=1)
    graph = Model.load(save(model, tmp_path / "model.onnx")).graph
    assert graph.nodes[0].outputs[0].shape == ("batch", 48)
    assert graph.nodes[-1].outputs[0].shape is None
