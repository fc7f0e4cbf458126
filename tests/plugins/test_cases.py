"""The selftest's quick cases are of every kind that the whole of them has: what compute-sanitizer and the tests see."""

from __future__ import annotations

import math

import pytest

from qpass.ops import REGISTRY
from qpass.ops.examples import Case, signatures
from qpass.plugins.cases import MATMULS, ROW_OPS, every_case
from qpass.plugins.selftest import activation_dtype

SKINNY = 64
"""Tokens up to which a product of a weight goes by the kernel for few alone: gemm.h's kSkinnyTokens."""
DTYPES = ("float32", "float16", "bfloat16")


def quick(name: str) -> list[Case]:
    return [make() for make in every_case([name], quick=True)]


def tokens(case: Case) -> int:
    x = case.inputs[0]
    assert x is not None
    return math.prod(x.shape[:-1])


@pytest.mark.parametrize("name", MATMULS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_few_and_of_many_tokens(name: str, dtype: str) -> None:
    """In 16 bits those of many go by other kernels, of whichever weight."""
    of_it = [c for c in quick(name) if activation_dtype(c) == dtype]
    assert sum(tokens(c) > SKINNY for c in of_it) >= 4
    assert sum(0 < tokens(c) <= SKINNY for c in of_it) >= 4


@pytest.mark.parametrize("name", ROW_OPS)
def test_rows_of_many_lengths_in_every_dtype(name: str) -> None:
    """Not in the first alone, as a step that is a multiple of the number of dtypes has it."""
    lengths: dict[str, set[int]] = {dtype: set() for dtype in DTYPES}
    for case in quick(name):
        x = case.inputs[0]
        assert x is not None
        lengths[activation_dtype(case)].add(x.shape[-1])
    assert min(map(len, lengths.values())) >= 5, lengths


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_signature(name: str) -> None:
    seen = {tuple(sorted(c.attrs.items())) for c in quick(name)}
    assert seen >= {tuple(sorted(attrs.items())) for attrs in signatures(REGISTRY[name])}


@pytest.mark.parametrize("name", list(REGISTRY))
def test_it_is_a_part(name: str) -> None:
    assert 0 < len(every_case([name], quick=True)) < len(every_case([name])) / 4
