"""Shapes as users write them, and what is made of what they leave out."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.engine.profiles import BATCH, LENGTH, parse, profiles_of
from qpass.errors import QpassError
from qpass.runtime import Input

I64 = np.dtype(np.int64)
INPUTS = {
    "ids": Input("ids", I64, ("batch", "length")),
    "mask": Input("mask", I64, ("batch", "length")),
    "past": Input("past", I64, ("batch", 2, "past", 16)),
    "fixed": Input("fixed", I64, (1, 3)),
}


def test_trtexec_spelling() -> None:
    assert parse("ids:1x8,mask:1x8", "min") == {"ids": (1, 8), "mask": (1, 8)}
    assert parse("'x:0':4x5", "min") == {"x:0": (4, 5)}
    assert parse(None, "min") == {}


@pytest.mark.parametrize("text", ["ids", "ids:", "ids:1x", "ids:axb", ":1x2", "ids:-1x2"])
def test_bad_spelling(text: str) -> None:
    with pytest.raises(QpassError, match=r"--opt .* is not of the form name:1x128"):
        parse(text, "opt")


def test_guesses() -> None:
    found = profiles_of(INPUTS, {}, {}, {})
    assert set(found) == {"ids", "mask", "past"}
    assert (found["ids"].min, found["ids"].opt, found["ids"].max) == tuple(zip(BATCH, LENGTH, strict=True))
    assert found["past"].guessed == ("batch", "past")
    assert found["past"].opt == (BATCH[1], 2, LENGTH[1], 16)


def test_one_input_says_it_for_all() -> None:
    found = profiles_of(INPUTS, {"ids": (1, 4)}, {"ids": (2, 16)}, {"ids": (4, 64)})
    assert (found["mask"].min, found["mask"].opt, found["mask"].max) == ((1, 4), (2, 16), (4, 64))
    assert found["mask"].guessed == ()
    assert found["past"].min == (1, 2, LENGTH[0], 16)
    assert found["past"].guessed == ("past",)


def test_what_is_left_out() -> None:
    only_opt = profiles_of(INPUTS, {}, {"ids": (2, 16)}, {})["ids"]
    assert only_opt.min == only_opt.opt == only_opt.max == (2, 16)
    only_max = profiles_of(INPUTS, {}, {}, {"ids": (2, 16)})["ids"]
    assert only_max.opt == (2, 16)
    assert profiles_of(INPUTS, {"ids": (1, 2)}, {}, {"ids": (4, 8)})["ids"].min == (1, 2)


def test_contradictions() -> None:
    with pytest.raises(QpassError, match="--min nothing: the model has no such input; it has ids, mask"):
        profiles_of(INPUTS, {"nothing": (1,)}, {}, {})
    with pytest.raises(
        QpassError, match=r"--max past:1x3x4x16 does not fit the input 'past' int64\[batch, 2, past, 16\]"
    ):
        profiles_of(INPUTS, {}, {}, {"past": (1, 3, 4, 16)})
    with pytest.raises(QpassError, match="not min ≤ opt ≤ max"):
        profiles_of(INPUTS, {"ids": (4, 4)}, {"ids": (2, 16)}, {"ids": (4, 64)})
    with pytest.raises(QpassError, match="no known rank"):
        profiles_of({"x": Input("x", I64, None)}, {}, {}, {})
