"""Promises: every way to read one gives what numpy gives."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from qpass.errors import QpassError
from qpass.graph import Blockwise, Given, Joined, Kept, Lazy, Stored
from qpass.graph.dtypes import Array, file_bytes, pack, unpack
from qpass.graph.stored import FileSource
from tests.graph.models import EXOTIC_DTYPES, floats, int8_rows, values


def stored(array: Array, folder: Path, pad: int = 3) -> Stored:
    """The array in a file, not aligned."""
    path = folder / f"{array.dtype}.bin"
    path.write_bytes(b"\0" * pad + bytes(pack(array)) + b"tail")
    return Stored(FileSource(path), pad, array.dtype, array.shape)


def check(lazy: Lazy, expected: Array) -> None:
    """All ways to read it agree with numpy, in values, shape and dtype."""
    assert (lazy.shape, lazy.dtype, lazy.ndim, lazy.size) == (
        expected.shape,
        expected.dtype,
        expected.ndim,
        expected.size,
    )
    same(lazy.load(), expected)
    if lazy.ndim:
        n = lazy.shape[0]
        for start, stop in ((0, n), (0, n // 2), (n // 2, n), (n // 3, n // 3 + 1)):
            if stop <= n:
                same(lazy.rows(start, stop), expected[start:stop])
    if lazy.ndim == 2:
        n = lazy.shape[1]
        for start, stop in ((0, n), (0, n // 2), (n // 2, n)):
            same(lazy.columns(start, stop), expected[:, start:stop])
            same(lazy.T.rows(start, stop), expected.T[start:stop])


def same(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", EXOTIC_DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(7, 5), (8, 6), (3, 5, 4), (11,), (), (0, 4), (4, 0)])
def test_stored(dtype: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    array: Array = values(dtype, shape)
    check(stored(array, tmp_path), array)
    check(Stored.of(numpy_helper.from_array(array)), array)
    same(unpack(pack(array), array.dtype, array.shape), array)
    assert stored(array, tmp_path).nbytes == file_bytes(array.dtype, array.shape) == len(pack(array))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_views_and_arithmetic(dtype: type, tmp_path: Path) -> None:
    array: Array = floats(12, 10).astype(dtype)
    row, column = floats(10, seed=1), floats(12, seed=2)
    lazy = stored(array, tmp_path)
    check(lazy.T, array.T)
    check(lazy.T.T, array)
    check(lazy.astype(np.float32), array.astype(np.float32))
    check(lazy.reshape(10, 12), array.reshape(10, 12))
    check(lazy.T.reshape(-1, 3), array.T.reshape(-1, 3))
    check(lazy.astype(np.float64).reshape(4, -1), array.astype(np.float64).reshape(4, -1))
    check(lazy.reshape(3, 4, 10).transpose(0, 2, 1), array.reshape(3, 4, 10).transpose(0, 2, 1))
    check(lazy.reshape(3, 4, 10).transpose(2, 0, 1), array.reshape(3, 4, 10).transpose(2, 0, 1))
    check(lazy.cut(3, 9), array[3:9])
    check(lazy.cut(3, 9).cut(1, 4).T, array[4:7].T)
    check(lazy.T.cut(2, 7), array.T[2:7])
    check(lazy.T.cut(2, 7).cut(1, 3), array.T[3:5])
    check(lazy.astype(np.float32).cut(0, 5), array[:5].astype(np.float32))
    check((lazy * 2.0).cut(1, 2), (array * 2.0)[1:2])
    check((lazy + lazy).cut(1, 4), (array + array)[1:4])
    check(Given(array).cut(4, 6), array[4:6])
    stack, turned = lazy.reshape(3, 4, 10), array.reshape(3, 4, 10).transpose(0, 2, 1)
    check(stack.transpose(0, 2, 1).cut(1, 3), turned[1:3])
    check(stack.transpose(0, 2, 1).cut(1, 2).reshape(10, 4), turned[1])
    check(stack.transpose(2, 0, 1).cut(1, 2), array.reshape(3, 4, 10).transpose(2, 0, 1)[1:2])
    check(Joined([stack.transpose(0, 2, 1).cut(i, i + 1).reshape(10, 4) for i in range(3)]), turned.reshape(30, 4))
    check(Joined([lazy.cut(0, 0), lazy, lazy.cut(2, 3)]), np.concatenate([array, array[2:3]]))
    check(lazy * row, array * row)
    check(row * lazy, row * array)
    check(lazy / Given(column)[:, None], array / column[:, None])
    check((lazy.T + column) - 1, (array.T + column) - 1)
    check(2.5 / (lazy.astype(np.float32) + 10), 2.5 / (array.astype(np.float32) + 10))
    check(Given(row) * Given(column)[:, None], row * column[:, None])
    check(lazy + Given(np.ones((1, 10), np.float32)), array + np.ones((1, 10), np.float32))
    check(lazy[None, :, :].reshape(12, 10) - lazy, array - array)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["T", "reshape", "scale", "shift", "cast"]), max_size=5), st.integers(0, 9))
def test_any_chain(steps: list[str], seed: int) -> None:
    array = floats(6, 8, seed=seed)
    lazy: Lazy = Stored.of(numpy_helper.from_array(array))
    for step in steps:
        match step:
            case "T":
                lazy, array = lazy.T, array.T
            case "reshape":
                lazy, array = lazy.reshape(-1, 4), array.reshape(-1, 4)
            case "scale":
                factor = floats(array.shape[1], seed=seed)
                lazy, array = lazy * factor, array * factor
            case "shift":
                offset = floats(array.shape[0], 1, seed=seed)
                lazy, array = lazy + offset, array + offset
            case _:
                lazy, array = lazy.astype(np.float16), array.astype(np.float16)
    check(lazy, array)


@pytest.mark.parametrize("shapes", [[(3, 4), (5, 4)], [(7, 4), (0, 4), (1, 4)], [(2,), (3,)], [(2, 3, 2), (1, 3, 2)]])
def test_joined(shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    arrays = [values(np.float16, s) for s in shapes]
    lazies: list[Lazy] = [Given(arrays[0]), *(Given(a) for a in arrays[1:])]
    check(Joined(lazies), np.concatenate(arrays))
    if len(shapes[0]) == 2:
        check(Joined([Given(a.T).T for a in arrays]).astype(np.float32), np.concatenate(arrays).astype(np.float32))
    with pytest.raises(ValueError, match="cannot be joined"):
        Joined([lazies[0], Given(np.zeros((3, 9), np.float16))])


def test_mistakes_are_told() -> None:
    lazy = Given(floats(3, 4))
    with pytest.raises(ValueError, match="cannot reshape"):
        lazy.reshape(5, 5)
    with pytest.raises(ValueError, match="no permutation"):
        lazy.transpose(0, 0)
    with pytest.raises(ValueError, match="two dimensions"):
        _ = lazy.reshape(3, 2, 2).T
    with pytest.raises(TypeError, match="load"):
        _ = lazy[0]
    with pytest.raises(ValueError, match=r"promised as float32\[3\]"):
        Kept((3,), np.float32, lambda: np.zeros(3)).load()
    with pytest.raises(ValueError, match="does not follow"):
        Blockwise(lazy, lambda b: (b,), [((4, 3), np.float32)], "w")


def test_kept_runs_once_for_all_threads() -> None:
    calls = []
    gate = threading.Event()

    def compute() -> Array:
        calls.append(1)
        gate.wait(5)
        return np.ones(3)

    kept = Kept((3,), np.float64, compute)
    sums: list[float] = []
    threads = [threading.Thread(target=lambda: sums.append(float(kept.load().sum()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert (len(calls), sums) == (1, [3.0] * 4)
    check(kept, np.ones(3))


def test_a_kept_value_that_fails_is_tried_again() -> None:
    denominators = iter([0, 1])

    def compute() -> Array:
        return np.full(2, 1 // next(denominators), np.float64)

    kept = Kept((2,), np.float64, compute)
    with pytest.raises(ZeroDivisionError):
        kept.load()
    same(kept.load(), np.ones(2))


def test_blockwise_results_are_promises_too() -> None:
    array = floats(9, 4)
    made = Blockwise(Given(array), int8_rows, [((9, 4), np.int8), ((9,), np.float32)], "w")
    packed, scale = int8_rows(array)
    check(made.results[0], packed)
    check(made.results[1], scale)
    check(made.results[0] * made.results[1][:, None], packed * scale[:, None])


def test_a_wrong_block_is_told() -> None:
    made = Blockwise(Given(floats(9, 4)), lambda b: (b.T,), [((9, 4), np.float32)], "w7")
    with pytest.raises(ValueError, match="w7 was promised"):
        made.results[0].load()


@pytest.mark.parametrize("how", ["shrink", "replace", "write", "remove"])
def test_a_file_that_changes_is_told(tmp_path: Path, how: str) -> None:
    lazy = stored(floats(64, 64), tmp_path)
    lazy.load()
    path = tmp_path / "float32.bin"
    match how:
        case "shrink":
            path.write_bytes(b"short")
        case "replace":
            (tmp_path / "new").write_bytes(path.read_bytes())
            (tmp_path / "new").rename(path)
        case "write":
            content = bytearray(path.read_bytes())
            os.utime(path, (0, 0))
            path.write_bytes(content)
        case _:
            path.unlink()
    for read in (lazy.load, lambda: lazy.columns(0, 3), lazy.prefetch):
        with pytest.raises(QpassError, match=r"has changed since it was opened|No such file"):
            read()


def test_a_file_for_every_tensor(tmp_path: Path) -> None:
    """More files than a process may have open."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        arrays = [floats(8, 8, seed=i) for i in range(100)]
        for i in range(100):
            (tmp_path / str(i)).mkdir()
        kept = [stored(array, tmp_path / str(i)) for i, array in enumerate(arrays)]
        for lazy, array in zip(kept, arrays, strict=True):
            same(lazy.columns(1, 3), array[:, 1:3])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_a_cut_of_sub_byte_rows(tmp_path: Path) -> None:
    """Odd rows of int4 begin inside a byte."""
    array: Array = values(ml_dtypes.int4, (7, 5))
    lazy = stored(array, tmp_path)
    check(lazy.cut(3, 6), array[3:6])
    check(lazy.cut(2, 6), array[2:6])
    assert isinstance(lazy.cut(2, 6), Stored)


def test_what_cannot_be_cut_or_joined() -> None:
    with pytest.raises(ValueError, match="rows 1 to 9 of 4"):
        Given(floats(4, 3)).cut(1, 9)
    with pytest.raises(ValueError, match="cannot be joined"):
        Joined([Given(floats(4, 3)), Given(floats(4, 2))])


def test_an_expert_of_a_stack_reads_nothing_of_the_others(tmp_path: Path) -> None:
    array: Array = floats(4, 6, 5)
    stack = stored(array, tmp_path)
    expert = stack.transpose(0, 2, 1).cut(2, 3).reshape(5, 6)
    (leaf,) = expert.leaves()
    assert isinstance(leaf, Stored)
    assert (leaf.shape, leaf.offset) == ((6, 5), 3 + 2 * 30 * array.itemsize)


def test_a_result_under_another_shape_is_the_same_result() -> None:
    source: Array = floats(12, 5)
    group = Blockwise(Given(source), lambda b: (b * 2,), [((12, 5), source.dtype)], "twice")
    (twice,) = group.results
    check(twice.reshape(3, 4, 5), (source * 2).reshape(3, 4, 5))
    check(twice.reshape(3, 4, 5).reshape(12, 5), source * 2)
    assert twice.reshape(3, 4, 5).reshape(12, 5) is twice
