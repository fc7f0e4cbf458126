from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpass.calibrate import ActivationStats, Header, Stats, calibrate
from qpass.calibrate.plan import Tap, plan
from qpass.calibrate.run import _Gathering
from qpass.calibrate.sources import NpzFiles, Samples
from qpass.errors import QpassError
from qpass.runtime import Runner, inputs_of, load
from qpass.testing import feeds, model
from tests.calibrate.conftest import TEXT, activations, ids

Progress = Callable[[int, int], None]


def same(a: ActivationStats, b: ActivationStats) -> None:
    for part in ("amax", "square_sum", "rows", "tokens"):
        np.testing.assert_array_equal(getattr(a, part), getattr(b, part))
    np.testing.assert_array_equal(a.histogram.counts, b.histogram.counts)
    assert a.count == b.count


def test_statistics_are_those_of_all_tokens(tiny: Path, samples: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    stats = calibrate(tiny, [samples], tmp_path / "s.npz", progress=lambda *a: done.append(a))
    assert done == [(4, 11), (5, 11), (11, 11)]
    assert list(stats.tensors) == ["h", "r"]
    for name, x in zip("hr", activations(tiny, sorted(samples.iterdir())), strict=True):
        found = stats.get(name)
        assert found is not None
        assert found.count == len(x)  # padding is left out
        np.testing.assert_allclose(found.amax, np.abs(x).max(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found.mean_square, np.square(x).mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.rows, x[found.tokens], rtol=1e-3, atol=1e-3)
        assert found.percentile(99) == pytest.approx(np.percentile(np.abs(x), 99), rel=2**-6)
    assert stats.get("m") is None
    assert (stats.done, stats.total, stats.tokens) == (11, 11, len(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "samples", "tiny.onnx"]


@pytest.mark.parametrize("left", [False, True])
def test_what_padding_holds_does_not_matter(tiny: Path, tmp_path: Path, left: bool) -> None:
    batch = ids(4, 6, left=left)
    other = batch | {"input_ids": np.where(batch["attention_mask"] > 0, batch["input_ids"], 49)}
    found = []
    for name, arrays in (("a", batch), ("b", other)):
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        found.append(calibrate(tiny, [tmp_path / f"{name}.npz"], tmp_path / f"s{name}.npz"))
    for name in "hr":
        same(found[0].tensors[name], found[1].tensors[name])


def test_a_named_mask(tiny: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ids(3, 5))  # type: ignore[arg-type]
    stats = calibrate(tiny, [tmp_path / "a.npz"], tmp_path / "s.npz", mask="input_ids")  # an odd one: id 0 is padding
    assert stats.tensors["h"].count == np.count_nonzero(ids(3, 5)["input_ids"])
    with pytest.raises(QpassError, match=r"no input 'maks' .* 'input_ids', 'attention_mask'"):
        calibrate(tiny, [tmp_path / "a.npz"], tmp_path / "s.npz", mask="maks")


def test_a_mask_that_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.ones((1, 3), int), attention_mask=np.zeros((1, 3), int))
    with pytest.raises(QpassError, match=r"no token .* choose another mask than 'attention_mask'"):
        calibrate(tiny, [tmp_path / "a.npz"], tmp_path / "s.npz")


def test_same_bytes_twice(tiny: Path, samples: Path, tmp_path: Path) -> None:
    for name in "ab":
        calibrate(tiny, [samples], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- bounded memory


def test_no_more_than_the_budget_is_held(tiny: Path, samples: Path, tmp_path: Path, monkeypatch: Any) -> None:
    held: list[int] = []
    run = Runner.run

    def watched(self: Runner, *args: Any) -> Iterator[Any]:
        for group in run(self, *args):
            held.append(sum(a.nbytes for a in group.values()))
            yield group

    monkeypatch.setattr(Runner, "run", watched)
    whole = calibrate(tiny, [samples], tmp_path / "a")
    assert max(held) == 6 * 9 * (8 + 16) * 4
    for memory in (3000, 1000, 600, 1):
        held.clear()
        cut = calibrate(tiny, [samples], tmp_path / "b", memory=memory, force=True)
        assert max(held) <= max(memory, 9 * 16 * 4)  # one activation of one sample is the least
        for name in "hr":
            np.testing.assert_allclose(cut.tensors[name].square_sum, whole.tensors[name].square_sum, rtol=1e-6)
            np.testing.assert_array_equal(cut.tensors[name].tokens, whole.tensors[name].tokens)
            np.testing.assert_allclose(cut.tensors[name].rows, whole.tensors[name].rows, rtol=1e-2)


def test_the_plan_groups_before_it_cuts_batches(tiny: Path, samples: Path) -> None:
    found = Samples(NpzFiles([samples]), inputs_of(load(tiny)))
    taps = [Tap(n, np.dtype(np.float32), ("batch", "sequence", k)) for n, k in (("h", 8), ("r", 16))]
    assert plan(taps, found, 1 << 20).groups == (("h", "r"),)
    assert plan(taps, found, 2 * 9 * 24 * 4).limits == (2, 3, 2)  # samples of 7, 5 and 9 tokens
    small = plan(taps, found, 9 * 16 * 4)
    assert small.groups == (("h",), ("r",))
    assert small.limits == (1, 1, 1)
    unknown = [Tap(n, np.dtype(np.float16), (None, None, 8)) for n in "ab"]
    assert plan(unknown, found, 9 * 8 * 2).groups == (("a",), ("b",))


def test_statistics_are_read_when_asked_for(tiny: Path, samples: Path, tmp_path: Path) -> None:
    stats = calibrate(tiny, [samples], tmp_path / "s.npz")
    (tmp_path / "s.npz").unlink()
    assert "h" in stats.tensors
    with pytest.raises(QpassError, match="remove it and run `qpass calibrate` again"):
        stats.get("h")


# -- going on


def interrupt(at: int) -> Progress:
    def progress(done: int, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("at", [1, 4, 5, 8])
def test_an_interrupted_run_goes_on(tiny: Path, samples: Path, tmp_path: Path, at: int) -> None:
    calibrate(tiny, [samples], tmp_path / "whole", rows=9, memory=600)
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny, [samples], tmp_path / "s", rows=9, memory=600, progress=interrupt(at))
    assert not (tmp_path / "s").exists()
    done: list[int] = []
    calibrate(
        tiny, [samples], tmp_path / "s", rows=9, memory=600, note=notes.append, progress=lambda d, _: done.append(d)
    )
    assert notes == [f"goes on after {at} of 11 samples, where the last run was interrupted"]
    assert done[0] > at
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "s.partial").exists()


def test_an_end_inside_a_batch_goes_on_from_the_last_saved_state(
    tiny: Path, samples: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    calibrate(tiny, [samples], tmp_path / "whole")
    take, calls = _Gathering._take, []

    def dies(self: _Gathering, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 6:  # the second tensor of the third file
            raise MemoryError
        take(self, *args)

    monkeypatch.setattr(_Gathering, "_take", dies)
    with pytest.raises(MemoryError):
        calibrate(tiny, [samples], tmp_path / "s", checkpoint=0)
    assert Stats.load(tmp_path / "s.partial").done in (4, 5)  # not at once again after a slow save
    with pytest.raises(QpassError, match=r"covers . of 11 samples"):
        Stats.load(tmp_path / "s.partial").check(tiny)
    monkeypatch.undo()
    calibrate(tiny, [samples], tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("change", ["model", "data", "rows", "mask", "seed", "force"])
def test_what_is_of_something_else_is_not_gone_on_with(tiny: Path, samples: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny, [samples], tmp_path / "s", progress=interrupt(4))
    settings: dict[str, Any] = {}
    if change == "model":
        onnx.save(model(TEXT, seed=1), tiny)
    elif change == "data":
        np.savez(samples / "1.npz", **ids(1, 5, seed=99))  # type: ignore[arg-type]
    else:
        settings = {change: {"rows": 3, "mask": "input_ids", "seed": 1, "force": True}[change]}
    notes: list[str] = []
    calibrate(tiny, [samples], tmp_path / "s", note=notes.append, **settings)
    assert notes == []
    assert not (tmp_path / "s.partial").exists()


def test_a_finished_file_is_used_again(tiny: Path, samples: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "s.npz"
    calibrate(tiny, [samples], out)
    before = out.stat().st_mtime_ns, out.read_bytes()
    moved = tmp_path / "elsewhere.onnx"
    shutil.copy(tiny, moved)
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "__init__", None)  # nothing is run
        calibrate(moved, [samples], out, note=notes.append)
    assert notes == [f"{out} has them already, of this model and data"]
    assert (out.stat().st_mtime_ns, out.read_bytes()) == before
    calibrate(tiny, [samples], out, force=True)
    assert out.stat().st_mtime_ns > before[0]


# -- the file


def test_check_of_another_model(tiny: Path, samples: Path, tmp_path: Path) -> None:
    stats = calibrate(tiny, [samples], tmp_path / "s.npz")
    stats.check(tiny)
    other = tmp_path / "other.onnx"
    onnx.save(model(TEXT, seed=1), other)
    with pytest.raises(QpassError) as error:
        stats.check(other)
    for part in ("another model", "tiny.onnx", str(other), f"qpass calibrate {other} --data", "-o"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_model_is_told_by_its_weights(tmp_path: Path, samples: Path) -> None:
    (tmp_path / "a").mkdir()
    one = tmp_path / "a" / "m.onnx"
    onnx.save(model(TEXT), one, save_as_external_data=True, location="m.data", size_threshold=0)
    stats = calibrate(one, [samples], tmp_path / "s.npz")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "m.data", (0, 0))
    stats.check(tmp_path / "b" / "m.onnx")
    data = bytearray((tmp_path / "b" / "m.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "b" / "m.data").write_bytes(data)
    with pytest.raises(QpassError, match="another model"):
        stats.check(tmp_path / "b" / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"hello", "zip", "array"])
def test_a_file_that_is_no_statistics(tiny: Path, samples: Path, tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "s.npz"
    if content == "zip":
        np.savez(path, x=np.zeros(3))
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(QpassError, match="holds no statistics"):
        Stats.load(path)
    with pytest.raises(QpassError, match="choose another file with -o"):  # not overwritten
        calibrate(tiny, [samples], path)
    assert path.read_bytes() == before


def test_places_that_cannot_be_written(tiny: Path, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(QpassError, match="is a folder"):
        calibrate(tiny, [samples], tmp_path)
    with pytest.raises(QpassError, match=r"cannot write .* -o"):
        calibrate(tiny, [samples], tmp_path / "missing" / "s.npz")
    with pytest.raises(QpassError, match="no such file"):
        Stats.load(tmp_path / "s.npz")


# -- models of all kinds


def test_what_is_not_finite_is_named_with_its_sample(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 4] x) => (float[batch, 2] y) <float[4, 4] w1, float[4, 2] w2>
    { m = MatMul(x, w1)  e = Exp(m)  y = MatMul(e, w2) }
    """
    path = tmp_path / "m.onnx"
    onnx.save(model(text), path)
    for i, value in enumerate((1.0, 1e4)):
        np.savez(tmp_path / f"{i}.npz", x=np.full((1, 4), value, np.float32))
    with pytest.raises(QpassError, match=r"activation 'e' is inf \(channel \d\) in .*1\.npz; leave that sample out"):
        calibrate(path, [tmp_path / "0.npz", tmp_path / "1.npz"], tmp_path / "s")


def test_a_sample_that_the_model_refuses(tiny: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.full((1, 3), 50), attention_mask=np.ones((1, 3), int))
    with pytest.raises(QpassError) as error:
        calibrate(tiny, [tmp_path / "a.npz"], tmp_path / "s")
    assert "cannot run on" in str(error.value)
    assert "a.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_linears_in_subgraphs_are_said(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[batch, 4] x, bool c) => (float[batch, 4] y) <float[4, 4] w, float[4, 4] v>
    {
        h = MatMul(x, w)
        y = If(c) <then_branch = yes () => (float[batch, 4] a) { a = MatMul(h, v) },
                   else_branch = no () => (float[batch, 4] b) { b = Identity(h) }>
    }
    """
    path = tmp_path / "m.onnx"
    onnx.save(model(text), path)
    np.savez(tmp_path / "a.npz", x=np.ones((2, 4), np.float32), c=np.array(True))
    notes: list[str] = []
    stats = calibrate(path, [tmp_path / "a.npz"], tmp_path / "s", note=notes.append)
    assert notes == ["1 Linears lie in subgraphs (If, Loop, Scan) and are not calibrated"]
    assert list(stats.tensors) == ["x"]  # an input of the graph itself


def test_a_model_without_linears(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        model('<ir_version: 10, opset_import: ["" : 17]> g (float[b, 4] x) => (float[b, 4] y) { y = Relu(x) }'), path
    )
    np.savez(tmp_path / "a.npz", x=np.ones((2, 4), np.float32))
    with pytest.raises(QpassError, match="has no Linear to calibrate"):
        calibrate(path, [tmp_path / "a.npz"], tmp_path / "s")


def test_other_sources(tiny: Path, tmp_path: Path) -> None:
    class Made:
        def __len__(self) -> int:
            return 2

        def name(self, item: int) -> str:
            return f"sentence {item}"

        def headers(self, item: int) -> dict[str, Header]:
            return {n: Header(a.dtype, a.shape) for n, a in self.read(item).items()}

        def read(self, item: int) -> dict[str, Any]:
            return ids(item + 1, 4, seed=item)

        def fingerprint(self) -> str:
            return "made"

    assert calibrate(tiny, Made(), tmp_path / "s").total == 3


def test_models_of_the_zoo(zoo: list[Path], tmp_path: Path) -> None:
    for number, path in enumerate(zoo[::2]):
        arrays = feeds(onnx.load(path), batch=3, sequence=7, total_sequence=9, past_sequence=2, decoder_sequence=7)
        counts = {3 * 7, 3 * 17, 3 * 32, 3}  # tokens, image patches, frames of sound, pooled samples
        if "attention_mask" in arrays:
            arrays["attention_mask"][:] = 1
            arrays["attention_mask"][1, -2:] = 0
            counts = {3 * 7 - 2, 3} | ({3 * 7} if "decoder_input_ids" in arrays else set())
        np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        whole = dict(calibrate(path, [tmp_path / "a.npz"], tmp_path / "whole", force=True).tensors)
        assert len(whole) >= 7
        assert {s.count for s in whole.values()} <= counts, path.name
        if number % 3 == 0:
            cut = calibrate(path, [tmp_path / "a.npz"], tmp_path / "cut", force=True, memory=10_000).tensors
            for name, stats in whole.items():
                np.testing.assert_allclose(cut[name].amax, stats.amax, rtol=0.02, atol=0.02)
                assert cut[name].count == stats.count
