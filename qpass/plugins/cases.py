"""What `qpass plugins selftest` runs: every signature of every op, and sizes off every tile and vector boundary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qpass.ops import REGISTRY, Op
from qpass.ops.base import Attr
from qpass.ops.examples import Case, example, signatures
from qpass.ops.weight_only_quant_matmul import INT4

Make = Callable[[], Case]
"""Makes a case when it is its turn: all of them at once take gigabytes."""

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
MATMULS = ("SmoothQuantGemm", "WeightOnlyQuantMatmul", "WeightOnlyGroupwiseQuantMatmul")
ROW_OPS = tuple(name for name in REGISTRY if name not in MATMULS)

TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 191, 257, 300, 513)
WEIGHTS = (
    (8, 32),
    (24, 128),
    (33, 64),
    (1, 256),
    (129, 160),
    (512, 256),
    (1000, 384),
    (250, 640),
    (256, 4096),
    (3000, 512),
)
ODD_K = (1, 2, 7, 24, 33, 50, 100, 130, 1002)
"""Of weights whose rows are not 16-byte aligned; only ops without groups can have them."""
ROWS = (1, 2, 3, 5, 8, 31, 64, 200, 1000)
LARGE = {
    (4096, 4096): (1, 16, 64, 200),
    (1024, 11008): (1, 16, 64, 200),
    (8192, 2048): (1, 5, 16),
    (11008, 1024): (3, 8, 600),
    (8192, 1024): (160, 300, 384),
    (27648, 512): (70, 150, 200) * 2,
    (22016, 512): (3, 5, 8, 9, 12, 16, 17, 24, 32) * 3 + (70, 100, 128, 160, 192, 300) * 2,
}
"""Weights as they are divided among all of a large GPU's multiprocessors: each by some numbers of tokens. The last are
divided into tiles of 192 channels where there are 132 of these, and beside 150 tokens and more so are tokens."""
BESIDE = ((12, 8192, 2304), (16, 8192, 2048), (16, 4096, 6400), (5, 8192, 17408))
"""Tokens, N and K of products that make their tokens' integers themselves on a large Hopper: of plain weights alone."""
PARTS = ((20, 264, 768), (64, 520, 1280))
"""The same of weights whose groups' scales and zero points do not begin at multiples of 16 bytes, row by row."""
STREAM_K = ((200, 17190, 3072), (500, 8496, 3072), (384, 17200, 3072))
"""The same of those whose stages are dealt out there among blocks: their tiles are no multiple of 132."""
LENGTHS = (1, 2, 7, 8, 24, 33, 64, 100, 128, 255, 256, 768, 1000, 1024, 1026, 2048, 4095, 4096, 5120, 8192, 8200, 12288)
LONG = (16384, 20000, 32768, 65544, 131072)


def every_case(only: Sequence[str] = (), quick: bool = False) -> list[Make]:
    """The cases of these ops, by default all.

    Args:
        quick: a part of them, for tools under which kernels run a hundred times slower.
    """
    ops = [REGISTRY[name] for name in REGISTRY if not only or name in only]
    cases: list[Make] = []
    for op in ops:
        signed, sized = list(_every_signature(op)), list(_matmul_sizes(op) if op.name in MATMULS else _row_sizes(op))
        special = list(_special(op))
        if quick:  # steps have no factor in common with what turns in a list: dtypes, signatures, sizes, kinds of cases
            signed, sized, special = _each_once(signed, len(_dtypes(op))), sized[::11], special[::7]
        cases += [*signed, *sized, *special]
    return cases


def _every_signature(op: Op) -> Iterator[Make]:
    for i, (attrs, dtype) in enumerate(itertools.product(signatures(op), _dtypes(op))):
        yield partial(example, op, attrs, dtype, lead=(2, 3), n=24, k=128, seed=i)


def _each_once(signed: Sequence[Make], dtypes: int) -> list[Make]:
    """Of every signature one dtype, which moves on with the signature and once more with every round of dtypes: no
    attribute that turns as dtypes do is seen with one of them alone."""
    return [signed[i * dtypes + (i + i // dtypes) % dtypes] for i in range(len(signed) // dtypes)]


def _dtypes(op: Op) -> tuple[np.dtype[Any], ...]:
    """Those that its T may have; one where it has none."""
    return FLOATS if any(i.kind == "T" for i in op.inputs) else FLOATS[:1]


def _matmul_sizes(op: Op) -> Iterator[Make]:
    """Every number of tokens with every weight, on signatures in turn."""
    turn = itertools.cycle(itertools.product(signatures(op), _dtypes(op)))
    rounds = len(_dtypes(op)) + 1  # coprime to the number of dtypes or not, each size is seen with several
    for (m, (n, k)), _ in itertools.product(itertools.product(TOKENS, WEIGHTS), range(rounds)):
        attrs, dtype = next(turn)
        yield _matmul(op, attrs, dtype, (m,), n, k)
    if "group_size" not in {a.name for a in op.attributes}:
        for m, k, n in itertools.product((1, 16, 70, 130), ODD_K, (1, 24, 130)):
            attrs, dtype = next(turn)
            yield _matmul(op, attrs, dtype, (m,), n, k)
    for (n, k), few in LARGE.items():
        for m in few:
            attrs, dtype = next(turn)
            yield _matmul(op, attrs, dtype, (m,), n, k)
    if "weight_type_id" in {a.name for a in op.attributes}:
        plain = [a for a in signatures(op) if not a.get("has_zero") and not a.get("quant_algo")]
        for (m, n, k), attrs, dtype in itertools.product(BESIDE, plain, FLOATS[1:]):
            if k < 8192 or attrs.get("group_size", 128) == 128:  # so large a weight takes a while
                yield _matmul(op, attrs, dtype, (m,), n, k)
        some = itertools.cycle(list(signatures(op))[::7])
        for dtype, (m, n, k) in itertools.product(FLOATS[1:], STREAM_K):
            yield _matmul(op, next(some), dtype, (m,), n, k)
        grouped = [a for a in signatures(op) if "quant_algo" in a]
        for (m, n, k), attrs, dtype in itertools.product(PARTS, grouped, FLOATS[1:]):
            yield _matmul(op, attrs, dtype, (m,), n, k)


def _matmul(op: Op, attrs: dict[str, Attr], dtype: np.dtype[Any], lead: tuple[int, ...], n: int, k: int) -> Make:
    multiple = _multiple(attrs)
    return partial(example, op, attrs, dtype, lead=lead, n=n, k=-(-k // multiple) * multiple, seed=n + 7 * k + lead[0])


def _multiple(attrs: dict[str, Attr]) -> int:
    """Of what K must be a multiple."""
    return int(attrs.get("group_size", 0)) or (2 if attrs.get("weight_type_id") == INT4 else 1)


def _row_sizes(op: Op) -> Iterator[Make]:
    turn = itertools.cycle(itertools.product(signatures(op), _dtypes(op)))
    for rows, k in itertools.chain(itertools.product(ROWS, LENGTHS), itertools.product((1, 3), LONG)):
        if rows * k > 4_000_000:
            continue
        for _ in range(len(_dtypes(op)) + 1):
            attrs, dtype = next(turn)
            multiple = _multiple(attrs)
            yield partial(
                example, op, attrs, dtype, lead=(rows,), n=1, k=-(-k // multiple) * multiple, seed=rows + 7 * k
            )


def _special(op: Op) -> Iterator[Make]:
    """No tokens, no leading dims, more rows than a grid's y may have, zeros, large values, broadcasting residuals."""
    some = list(signatures(op))
    few = some[:: max(1, len(some) // 6)]
    for i, (attrs, dtype) in enumerate(itertools.product(few, _dtypes(op))):
        make = partial(example, op, attrs, dtype)
        yield partial(make, lead=(2, 0), n=40, k=128)
        yield partial(make, lead=(), n=40, k=128)
        yield partial(_scaled, partial(make, lead=(4,), n=24, k=256), 0.0)
        yield partial(_scaled, partial(make, lead=(4,), n=24, k=256), 30.0)
        if i % 4 == 0:
            yield partial(make, lead=(70_000,), n=8, k=32 if op.name not in MATMULS else 128)
    if op.name.startswith("Quantize") and any(i.name == "smoother" for i in op.inputs):
        for (attrs, dtype), k in itertools.product(itertools.product(some, _dtypes(op)), (1536, 4096, 6152)):
            yield partial(_wide, partial(example, op, attrs, dtype, lead=(70,), n=1, k=k))
    for attrs, dtype in itertools.product((a for a in some if "group_size" in a and op.name in MATMULS), _dtypes(op)):
        for m in (5, 70):
            yield partial(_uneven, partial(example, op, attrs, dtype, lead=(m,), n=40, k=512))
    seeds = itertools.count()  # of each its own: one number on the edge of two integers would count for all signatures
    for attrs, dtype in itertools.product((a for a in some if a.get("has_residual")), _dtypes(op)):
        for mine, other in (((3, 5), (1, 5)), ((1, 5), (3, 5)), ((2, 3, 4), (4,)), ((2, 1, 4), (3, 1)), ((5,), ())):
            yield partial(_broadcasting, op, attrs, dtype, mine, other, next(seeds))


def _uneven(make: Make) -> Case:
    """A groupwise product where float16 is short of range: large x · pre_quant_scale, and all that counts in groups
    whose scales are a hundred thousandth of the row's largest, on which x is zero."""
    case = make()
    given = {t.name: i for i, t in enumerate(case.op.inputs)}
    inputs = list(case.inputs)
    group = int(case.attrs["group_size"])

    def change(name: str, by: float) -> NDArray[Any]:
        old = inputs[given[name]]
        assert old is not None
        new: NDArray[Any] = (old.astype(np.float32) * np.float32(by)).astype(old.dtype)
        inputs[given[name]] = new
        return new

    change("x", 5e3)[..., :group] = 0
    change("scale", 1e-7)[:, 0] *= 1e5
    if inputs[given["pre_quant_scale"]] is not None:
        change("pre_quant_scale", 50)
    return Case(case.op, case.attrs, inputs)


def _wide(make: Make) -> Case:
    """Rows of all sizes that floats have, one of zeros, and smoothers far from 1 in a tenth of the columns."""
    case = make()
    given = {t.name: i for i, t in enumerate(case.op.inputs)}
    inputs = list(case.inputs)
    x = inputs[given["x"]]
    assert x is not None
    most = 6e4 if x.dtype == np.float16 else 1e38
    sizes = np.concatenate([[0], np.logspace(-36, 20, x.shape[0] - 1)])  # the largest by the least smoother is finite
    inputs[given["x"]] = np.clip(x.astype(np.float64) * sizes[:, None], -most, most).astype(x.dtype)
    smoother = inputs[given["smoother"]]
    if smoother is not None:
        inputs[given["smoother"]] = smoother = smoother.copy()
        smoother[::10] *= np.logspace(-14, 14, smoother[::10].size, dtype=np.float32)
    return Case(case.op, case.attrs, inputs)


def _broadcasting(
    op: Op, attrs: dict[str, Attr], dtype: np.dtype[Any], mine: tuple[int, ...], other: tuple[int, ...], seed: int
) -> Case:
    """A norm whose residual has other leading dims."""
    inputs = list(example(op, attrs, dtype, lead=mine, k=192, seed=seed).inputs)
    residual = next(i for i, t in enumerate(op.inputs) if t.name == "residual")
    inputs[residual] = example(op, attrs, dtype, lead=other, k=192, seed=seed + 10_000).inputs[residual]
    return Case(op, attrs, inputs)


def _scaled(make: Make, by: float) -> Case:
    """A case with its activations multiplied; one row of them is left as it is."""
    case = make()

    def scaled(x: NDArray[Any]) -> NDArray[Any]:
        y = np.clip(np.rint(x.astype(np.float32) * by) if x.dtype == np.int8 else x.astype(np.float32) * by, -128, 127)
        result: NDArray[Any] = y.astype(x.dtype)
        result[-1] = x[-1]
        return result

    names = [t.name for t in case.op.inputs]
    inputs = [
        scaled(x) if name in ("x", "q", "up") and x is not None else x
        for name, x in zip(names, case.inputs, strict=True)
    ]
    return Case(case.op, case.attrs, inputs)
