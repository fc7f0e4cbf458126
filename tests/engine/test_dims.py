"""Dims by their names, as exporters of models with a KV cache give them."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.engine import dims
from qpass.engine.profiles import profiles_of
from qpass.errors import QpassError
from qpass.runtime import Input

I64 = np.dtype(np.int64)


def cached(total: str, past: str = "past_sequence_length", new: str | int = "sequence_length") -> dict[str, Input]:
    """The inputs of a decoder with a cache of one layer."""
    return {
        "ids": Input("ids", I64, ("batch_size", new)),
        "mask": Input("mask", I64, ("batch_size", total)),
        "key": Input("key", I64, ("batch_size", 2, past, 16)),
    }


TOTALS = ("past_sequence_length + sequence_length", "total_sequence_length")


def test_what_is_a_sum() -> None:
    parts = ("past_sequence_length", "sequence_length")
    for total in TOTALS:
        assert dims.sums(cached(total).values()) == {total: parts}
    one = "past_sequence_length + 1"
    assert dims.sums(cached(one, new=1).values()) == {one: ("past_sequence_length", 1)}
    assert dims.sums(cached("past + other").values()) == {}, "whose parts are no dims"
    two = cached("total_length") | {"more": Input("more", I64, ("encoder_sequence_length",))}
    assert dims.sums(two.values()) == {}, "of which of them?"


@pytest.mark.parametrize("total", TOTALS)
def test_two_of_past_new_and_total_tell_the_third(total: str) -> None:
    inputs = cached(total)
    three = {"ids": (1, 4), "mask": (1, 10), "key": (1, 2, 6, 16)}
    for left_out in three:
        said = {name: shape for name, shape in three.items() if name != left_out}
        found = profiles_of(inputs, {}, said, {})
        assert {name: p.opt for name, p in found.items()} == three
    first = profiles_of(inputs, {}, {"ids": (1, 4), "key": (1, 2, 0, 16)}, {})
    assert first["mask"].opt == (1, 4), "of a first step there is no past"


def test_a_guess_adds_up() -> None:
    found = profiles_of(cached(TOTALS[0]), {"ids": (1, 1)}, {"ids": (1, 8)}, {"ids": (2, 16)})
    assert (found["key"].min, found["key"].opt, found["key"].max) == ((1, 2, 1, 16), (1, 2, 128, 16), (2, 2, 512, 16))
    assert (found["mask"].min, found["mask"].opt, found["mask"].max) == ((1, 2), (1, 136), (2, 528))
    assert found["mask"].guessed == (TOTALS[0],)
    assert found["ids"].guessed == ()


def test_contradictions_are_named() -> None:
    inputs = cached(TOTALS[1])
    with pytest.raises(QpassError, match=r"--max: 'batch_size' is 1 in 'ids' and 2 in 'mask'; dims of one name"):
        profiles_of(inputs, {}, {}, {"ids": (1, 8), "mask": (2, 8)})
    with pytest.raises(
        QpassError,
        match=r"'total_sequence_length' is 9, which is not 'past_sequence_length' \(6\) \+ 'sequence_length' \(4\)",
    ):
        profiles_of(inputs, {}, {"ids": (1, 4), "mask": (1, 9), "key": (1, 2, 6, 16)}, {})
    with pytest.raises(QpassError, match=r"which is not 'past_sequence_length' \(9\) \+ 'sequence_length' \(0\)"):
        profiles_of(inputs, {}, {"mask": (1, 9), "key": (1, 2, 9, 16)}, {})
    with pytest.raises(QpassError, match=r"--opt ids:1x0 does not fit the input 'ids'"):
        profiles_of(inputs, {}, {"ids": (1, 0)}, {})


@pytest.mark.parametrize("name", ["batch", "Batch", "batch_size", "decoder_batch_size", "B", "N", "bs"])
def test_what_a_batch_is_called(name: str) -> None:
    inputs = {"past": Input("past", I64, (2, name)), "x": Input("x", I64, (name, "tokens"))}
    assert dims.batch({"past": (2, 3), "x": (3, 7)}, inputs) == 3
    assert dims.batch({"past": (2, 3), "x": (4, 7)}, inputs) is None


def test_where_no_batch_is_known() -> None:
    for shape in (("tokens", 4), (1, "length"), (None, 4), ("beams", 4)):
        assert dims.batch({"x": (8, 4)}, {"x": Input("x", I64, shape)}) is None
