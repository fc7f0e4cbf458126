from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from qpass.calibrate.tokens import Tokens
from qpass.errors import QpassError

I64, F32 = TensorProto.INT64, TensorProto.FLOAT

MASK = np.array([[1, 1, 0], [0, 1, 1]])  # right and left padding


def graph(*inputs: tuple[str, int, list[str | int]], nodes: Any = ()) -> ModelProto:
    values = [helper.make_tensor_value_info(*i) for i in inputs]
    return helper.make_model(helper.make_graph(list(nodes), "g", values, []))


BERT = graph(("input_ids", I64, ["b", "s"]), ("attention_mask", I64, ["b", "s"]))


def over(tokens: Tokens, leading: tuple[int, ...], feeds: dict[str, Any], tensor: str = "x") -> list[Any] | None:
    counts = tokens.over(tensor, leading, tokens.mask(feeds), feeds)
    return None if counts is None else counts.tolist()


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.bool_, np.float32, np.float16, np.uint8])
def test_masks_of_ones_and_zeros(kind: type[np.generic]) -> None:
    mask = Tokens(BERT).mask({"attention_mask": MASK.astype(kind)})
    assert mask is not None
    assert mask.tolist() == (MASK > 0).tolist()


@pytest.mark.parametrize("minus", [-10000.0, -np.inf, np.finfo(np.float32).min])
def test_masks_that_are_added_to_scores(minus: float) -> None:
    mask = Tokens(BERT).mask({"attention_mask": np.where(MASK > 0, 0, minus).astype(np.float32)})
    assert mask is not None
    assert mask.tolist() == (MASK > 0).tolist()


def test_an_added_mask_without_padding() -> None:
    mask = Tokens(BERT).mask({"attention_mask": np.zeros((2, 3), np.float32)})
    assert mask is not None
    assert mask.all()


def test_a_mask_with_head_axes() -> None:
    tokens = Tokens(graph(("m", F32, ["b", 1, 1, "s"])), "m")
    feeds = {"m": np.where(MASK > 0, 0, -1e4).astype(np.float32)[:, None, None]}
    assert over(tokens, (2, 3), feeds) == (MASK > 0).tolist()


def test_shapes_that_a_mask_fits() -> None:
    tokens, feeds = Tokens(BERT), {"input_ids": MASK, "attention_mask": MASK}
    counts = MASK > 0
    assert over(tokens, (2, 3), feeds) == counts.tolist()
    assert over(tokens, (6,), feeds) == counts.reshape(-1).tolist()
    assert over(tokens, (3, 2), feeds) == counts.T.tolist()
    for other in [(2,), (3,), (2, 4), (1, 3), (2, 3, 1), (2, 8, 3), ()]:
        assert over(tokens, other, feeds) is None


def test_a_square_mask_is_not_transposed() -> None:
    mask = np.array([[1, 0], [1, 1]])
    assert over(Tokens(BERT), (2, 2), {"input_ids": mask, "attention_mask": mask}) == (mask > 0).tolist()


def test_no_mask_counts_all() -> None:
    tokens = Tokens(graph(("input_ids", I64, ["b", "s"])))
    assert tokens.name is None
    assert over(tokens, (2, 3), {"input_ids": MASK}) is None


def test_a_mask_over_cached_tokens_too() -> None:
    tokens = Tokens(
        graph(
            ("input_ids", I64, ["b", "s"]),
            ("attention_mask", I64, ["b", "total"]),
            ("past.key", F32, ["b", 4, "past", 8]),
        )
    )
    mask = np.concatenate([np.ones((2, 5), int), MASK], axis=1)
    feeds = {"input_ids": MASK, "attention_mask": mask, "past.key": np.zeros((2, 4, 5, 8), np.float32)}
    assert over(tokens, (2, 3), feeds) == (MASK > 0).tolist()
    assert over(tokens, (2, 8), feeds) == (mask > 0).tolist()
    assert over(tokens, (2, 3), feeds | {"past.key": np.zeros((2, 4, 0, 8), np.float32)}) is None


T5 = graph(
    ("input_ids", I64, ["b", "s"]),
    ("attention_mask", I64, ["b", "s"]),
    ("decoder_input_ids", I64, ["b", "d"]),
    nodes=[
        helper.make_node("Add", ["input_ids", "one"], ["encoded"]),
        helper.make_node("Shape", ["decoder_input_ids"], ["shape"]),
        helper.make_node("Reshape", ["encoded", "shape"], ["reshaped"]),
        helper.make_node("Add", ["decoder_input_ids", "reshaped"], ["decoded"]),
    ],
)


def test_a_decoder_is_not_masked_by_the_encoder() -> None:
    tokens, feeds = Tokens(T5), {"input_ids": MASK, "attention_mask": MASK, "decoder_input_ids": MASK}
    for tensor in ("encoded", "reshaped"):  # the latter has only a shape from the decoder
        assert over(tokens, (2, 3), feeds, tensor) == (MASK > 0).tolist()
    assert over(tokens, (2, 3), feeds, "decoded") is None


def test_an_unknown_mask_names_the_inputs() -> None:
    with pytest.raises(QpassError, match=r"no input 'maks' .* 'input_ids', 'attention_mask'"):
        Tokens(BERT, "maks")


def test_a_mask_of_another_rank() -> None:
    proto = graph(("attention_mask", F32, ["b", 1, "s", "s"]))
    feeds = {"attention_mask": np.zeros((2, 1, 3, 3), np.float32)}
    assert Tokens(proto).mask(feeds) is None  # nobody asked for it
    with pytest.raises(QpassError, match=r"\[2, 1, 3, 3\] and should have \[batch, sequence\]"):
        Tokens(proto, "attention_mask").mask(feeds)
