from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.calibrate import NpzFiles
from qpass.calibrate.sources import Batch, Samples
from qpass.errors import QpassError
from qpass.runtime import Input

IDS = Input("ids", np.dtype(np.int64), ("batch", "sequence"))
MASK = Input("mask", np.dtype(np.int64), ("batch", "sequence"))
PAST = Input("past.0.key", np.dtype(np.float32), ("batch", 2, "past", 4))


def write(folder: Path, *files: dict[str, Any]) -> NpzFiles:
    for i, arrays in enumerate(files):
        np.savez(folder / f"{i:02}.npz", **{k: np.asarray(v) for k, v in arrays.items()})  # type: ignore[arg-type]
    return NpzFiles([folder])


def samples(source: NpzFiles, *inputs: Input, notes: list[str] | None = None) -> Samples:
    return Samples(source, {i.name: i for i in inputs}, None if notes is None else notes.append)


def batches(found: Samples, limit: int = 100, start: int = 0) -> list[Batch]:
    return list(found.batches(lambda _: limit, start))


def ids(*shape: int, start: int = 0) -> np.ndarray[Any, Any]:
    return np.arange(start, start + np.prod(shape)).reshape(shape)


def test_files_and_folders_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        np.savez(tmp_path / f"{name}.npz", ids=ids(1, 2))
    assert [f.stem for f in NpzFiles([tmp_path]).files] == ["a", "b", "c"]
    assert [f.stem for f in NpzFiles([tmp_path / "c.npz", tmp_path / "a.npz"]).files] == ["c", "a"]


def test_batches_are_cut_and_go_on(tmp_path: Path) -> None:
    found = samples(write(tmp_path, {"ids": ids(5, 3)}, {"ids": ids(1, 2)}, {"ids": ids(2, 2)}), IDS)
    assert (found.sizes, found.total) == ([5, 1, 2], 8)
    cut = batches(found, 2)
    assert [(b.start, b.size) for b in cut] == [(0, 2), (2, 2), (4, 1), (5, 1), (6, 2)]
    assert [Path(b.name).name for b in cut] == [
        "00.npz, samples 0 to 1",
        "00.npz, samples 2 to 3",
        "00.npz, sample 4",
        "01.npz",
        "02.npz",
    ]
    np.testing.assert_array_equal(cut[1].feeds["ids"], ids(5, 3)[2:4])
    assert Path(cut[1].sample(1)).name == "00.npz, sample 3"
    assert [(b.start, b.size) for b in batches(found, 2, start=3)] == [(3, 2), (5, 1), (6, 2)]
    assert batches(found, start=8) == []


def test_the_batch_axis_need_not_be_the_first(tmp_path: Path) -> None:
    cache = Input("cache", np.dtype(np.float32), (3, "batch", "past"))
    scalar = Input("scale", np.dtype(np.float32), ())
    source = write(tmp_path, {"ids": ids(4, 3), "cache": ids(3, 4, 2), "scale": 2.0})
    both = Samples(source, {i.name: i for i in (IDS, cache, scalar)})
    # the cache's first dim is no batch, so nothing says which axis is: the file is run as it is
    assert [b.size for b in batches(both, 1)] == [1]
    cache = Input("cache", np.dtype(np.float32), ("batch", "past", 2))
    lengths = Input("lengths", np.dtype(np.int64), ("batch",))
    source = write(tmp_path, {"ids": ids(4, 3), "cache": ids(4, 5, 2), "scale": 2.0, "lengths": ids(4)})
    cut = batches(Samples(source, {i.name: i for i in (IDS, cache, scalar, lengths)}), 3)
    assert [b.size for b in cut] == [3, 1]
    assert [b.feeds["lengths"].tolist() for b in cut] == [[0, 1, 2], [3]]
    assert all(b.feeds["scale"] == 2 for b in cut)


def test_packed_tokens_are_no_batch(tmp_path: Path) -> None:
    found = samples(write(tmp_path, {"ids": ids(9)}), Input("ids", np.dtype(np.int64), ("tokens",)))
    assert [b.feeds["ids"].shape for b in batches(found, 1)] == [(9,)]


def test_a_fixed_batch_size(tmp_path: Path) -> None:
    fixed = Input("ids", np.dtype(np.int64), (2, "sequence"))
    assert [b.size for b in batches(samples(write(tmp_path, {"ids": ids(6, 3)}), fixed), 1)] == [2, 2, 2]
    with pytest.raises(QpassError, match="holds 5 samples, but the model takes 2 at a time"):
        samples(write(tmp_path, {"ids": ids(5, 3)}), fixed)


def test_a_sample_without_batch_axis(tmp_path: Path) -> None:
    (batch,) = batches(samples(write(tmp_path, {"ids": ids(3), "mask": ids(3)}), IDS, MASK))
    assert batch.feeds["ids"].shape == batch.feeds["mask"].shape == (1, 3)


def test_numbers_of_another_width_are_cast(tmp_path: Path) -> None:
    pixels = Input("pixels", np.dtype(np.float16), ("batch", 2))
    source = write(
        tmp_path, {"ids": ids(1, 3).astype(np.int32), "pixels": np.ones((1, 2)), "mask": np.ones((1, 3), bool)}
    )
    (batch,) = batches(samples(source, IDS, MASK, pixels))
    assert {n: a.dtype.name for n, a in batch.feeds.items()} == {"ids": "int64", "pixels": "float16", "mask": "int64"}


def test_an_empty_past_is_made(tmp_path: Path) -> None:
    notes: list[str] = []
    (batch,) = batches(samples(write(tmp_path, {"ids": ids(3, 4)}), IDS, PAST, notes=notes))
    assert batch.feeds["past.0.key"].shape == (3, 2, 0, 4)
    assert notes == ["the data lacks 'past.0.key', taken as empty"]


def test_arrays_that_are_no_inputs_are_said(tmp_path: Path) -> None:
    notes: list[str] = []
    (batch,) = batches(samples(write(tmp_path, {"ids": ids(1, 2), "labels": ids(1)}), IDS, notes=notes))
    assert list(batch.feeds) == ["ids"]
    assert notes == ["the data's 'labels' are no inputs of the model and not used"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"idz": ids(1, 2), "mask": ids(1, 2)},
            r"00.npz lacks the input 'ids' int64\[batch, sequence\]; it has 'idz', 'mask'",
        ),
        ({"ids": np.ones((1, 2)), "mask": ids(1, 2)}, r"'ids' is float64\[1, 2\], the model wants 'ids' int64"),
        ({"ids": ids(1, 2, 3), "mask": ids(1, 2)}, r"'ids' is int64\[1, 2, 3\], the model wants"),
        ({"ids": ids(3, 2), "mask": ids(2, 2)}, r"'ids' holds 3 samples but 'mask' 2"),
        ({"ids": np.array([["a"]]), "mask": ids(1, 1)}, r"'ids' is <U1\[1, 1\], the model wants"),
        ({"ids": np.array([[None]]), "mask": ids(1, 1)}, r"'ids' is object\[1, 1\], the model wants"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(QpassError, match=message):
        samples(write(tmp_path, arrays), IDS, MASK)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(QpassError, match="no such file"):
        NpzFiles([tmp_path / "x.npz"])
    with pytest.raises(QpassError, match=r"holds no \.npz file"):
        NpzFiles([tmp_path])
    with pytest.raises(QpassError, match="no data"):
        NpzFiles([])
    (tmp_path / "a.npz").write_bytes(b"hello")
    with pytest.raises(QpassError, match=r"no \.npz file, or is truncated"):
        samples(NpzFiles([tmp_path]), IDS)
    np.savez(tmp_path / "a.npz", ids=ids(100, 100))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:5000])
    with pytest.raises(QpassError, match="truncated"):
        samples(NpzFiles([tmp_path]), IDS)


def test_a_damaged_array(tmp_path: Path) -> None:
    found = samples(write(tmp_path, {"ids": ids(100, 100)}), IDS)
    data = bytearray((tmp_path / "00.npz").read_bytes())
    data[5000] ^= 1
    (tmp_path / "00.npz").write_bytes(data)
    with pytest.raises(QpassError, match="cannot read"):
        batches(found)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    one = write(tmp_path / "a", {"ids": ids(2, 3)}, {"ids": ids(1, 2)})
    np.savez_compressed(tmp_path / "b" / "x.npz", ids=ids(2, 3))
    np.savez_compressed(tmp_path / "b" / "y.npz", ids=ids(1, 2))
    os.utime(tmp_path / "b" / "x.npz", (0, 0))
    same = NpzFiles([tmp_path / "b"])
    other = write(tmp_path / "c", {"ids": ids(2, 3)}, {"ids": ids(1, 2, start=1)})
    swapped = NpzFiles([tmp_path / "a" / "01.npz", tmp_path / "a" / "00.npz"])
    assert one.fingerprint() == same.fingerprint()
    assert len({one.fingerprint(), other.fingerprint(), swapped.fingerprint()}) == 3
