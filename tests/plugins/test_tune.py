"""The table of tile choices: read by the library (compiled without kernels), made from times that stand-ins tell."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qpass
from benchmarks.tuning import header
from qpass import gpu, plugins
from qpass.errors import QpassError
from qpass.plugins import DeviceTensor, Library
from qpass.plugins.bench import machine
from qpass.plugins.bench.jobs import DTYPES, Job
from qpass.plugins.bench.timing import Call, Time
from qpass.plugins.compile import source_folder
from qpass.plugins.library import Choice
from qpass.plugins.tune.choice import Row, entries
from qpass.plugins.tune.products import KINDS, USUAL, job, of_model, products
from qpass.plugins.tune.report import record, rows_of
from qpass.plugins.tune.session import Tuner
from qpass.plugins.tune.table import Entry, beside, merged, parse, read, to_text, update
from qpass.spec import QuantSpec
from qpass.testing import model
from tests.conftest import Run

H200 = "NVIDIA H200"
W8A8 = ("w8a8", 8192, 8192)


def row(m: int, us: dict[str, float], product: tuple[str, int, int] = W8A8, rule: str = "skinny") -> Row:
    return Row(*product, m, rule, us)


def entry(m: int, variant: str, product: tuple[str, int, int] = W8A8) -> Entry:
    return Entry(*product, m, variant)


class TestChoice:
    def test_the_fastest(self) -> None:
        chosen = row(64, {"skinny": 40.0, "mma": 90.0, "sm90_64x64": 25.0})
        assert (chosen.variant, chosen.gain) == ("sm90_64x64", 1.6)
        assert row(64, {"skinny": 40.0, "mma": 90.0}).variant == "skinny"

    def test_a_win_within_what_runs_differ_by_is_none(self) -> None:
        assert row(64, {"skinny": 102.0, "mma": 100.0}).variant == "skinny"
        assert row(64, {"skinny": 102.1, "mma": 100.0}).variant == "mma"

    def test_what_lies_between_measured_numbers_of_tokens(self) -> None:
        fast, slow = {"skinny": 10.0, "mma": 5.0}, {"skinny": 10.0, "mma": 20.0}
        assert entries([row(1, slow), row(2, fast)]) == [entry(1, "rule"), entry(2, "mma")]
        assert entries([row(2, fast), row(4, slow)]) == [entry(2, "mma"), entry(4, "rule")]
        assert entries([row(16, fast), row(4096, fast)]) == [entry(7, "rule"), entry(4096, "mma")], "both say the same"
        other = {"skinny": 10.0, "sm90_64x64": 5.0}
        far = entries([row(4096, other), row(1, fast)])
        assert far == [entry(1, "mma"), entry(2047, "rule"), entry(4096, "sm90_64x64")]

    def test_the_rules_own_are_left_to_it(self) -> None:
        """But said, in place of what an older table has for the shape."""
        slow = {"skinny": 10.0, "mma": 20.0}
        assert entries([row(m, slow) for m in (1, 16, 4096)]) == [entry(4096, "rule")]
        assert entries([row(1, {"skinny": 9.0, "mma": 5.0}, ("w8a16", 8, 8)), row(1, slow)]) == [
            entry(1, "mma", ("w8a16", 8, 8)),
            entry(1, "rule"),
        ]


class TestTable:
    TEXT = f"qpass tuning 1\ndevice {H200}\nw8a8 8192 8192 64 skinny  # µs\n\n# more\nw4a16-g128 128 256 1 mma\n"

    def test_text_and_back(self) -> None:
        tables = parse(self.TEXT)
        assert tables == {H200: (entry(64, "skinny"), entry(1, "mma", ("w4a16-g128", 128, 256)))}
        assert parse(to_text(tables)) == tables

    def test_merging_replaces_a_product_whole_and_nothing_else(self) -> None:
        tables = {
            H200: (entry(64, "mma"), entry(128, "mma"), entry(1, "mma", ("w8a16", 8, 8))),
            "other": (entry(1, "mma"),),
        }
        new = merged(tables, H200, [entry(32, "skinny")])
        assert new == {H200: (entry(1, "mma", ("w8a16", 8, 8)), entry(32, "skinny")), "other": (entry(1, "mma"),)}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "first line"),
            ("qpass tuning 2\n", "first line"),
            ("qpass tuning 1\nw8a8 1 1 1 mma\n", "line 2 wants .* below a device"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 1 1 mma\n", "line 3"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 1 -1 1 mma\n", "line 3"),
        ],
    )
    def test_a_malformed_file_is_not_written_over(self, text: str, said: str, tmp_path: Path) -> None:
        path = tmp_path / "table"
        path.write_text(text)
        with pytest.raises(QpassError, match=rf"(?s)table is no table of tuning: .*{said}.*remove it"):
            update(path, H200, [entry(1, "mma")])
        assert path.read_text() == text

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(QpassError, match="cannot be read"):
            read(tmp_path)


Tabled = Callable[[str | None], Library]


@pytest.fixture
def tabled(shells: Library, tmp_path: Path) -> Tabled:
    """A library of its own, whose table is not read yet, with this text beside it."""

    def copy(text: str | None) -> Library:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        library = Library(Path(shutil.copy(shells.path, folder)))
        if text is not None:
            beside(library.path).write_text(text)
        return library

    return copy


class TestInTheLibrary:
    def test_names_are_the_same_on_both_sides(self, shells: Library) -> None:
        assert shells.kinds == tuple(KINDS)
        assert shells.variants[:4] == ("auto", "rule", "skinny", "mma")
        for kind, (op, attrs) in KINDS.items():
            for dtype in ("bfloat16", "float16"):
                made = job((kind, 256, 512), 3, dtype)
                assert (made.op, made.m, made.n, made.k) == (op, 3, 256, 512)
                assert made.attrs.items() >= (attrs.items() if kind != "w8a8" else set())
                assert made.outputs(DTYPES[dtype])["y"][0].name == ("float32" if kind.endswith("float32") else dtype)

    def test_what_it_finds(self, tabled: Tabled, capfd: pytest.CaptureFixture[str]) -> None:
        lines = (
            "w8a8 64 32 16 skinny\nw8a8 64 32 1 mma\nw8a8 64 32 99 rule\nw8a8 64 32 128 sm90_64x64\nw8a16 64 32 7 mma"
        )
        library = tabled(f"qpass tuning 1\ndevice {H200}\n{lines}\ndevice other\nw8a8 64 32 5 mma\n")
        found = {m: library.tuned(H200, "w8a8", 64, 32, m) for m in (1, 2, 16, 17, 99, 100, 128, 129)}
        names = ["mma", "skinny", "skinny", "rule", "rule", "sm90_64x64", "sm90_64x64", "rule"]
        assert list(found.values()) == names, found
        assert library.tuned(H200, "w8a16", 64, 32, 7) == "mma"
        assert library.tuned("other", "w8a8", 64, 32, 1) == "mma"
        for product in (("w8a8", 32, 64), ("w8a8", 64, 31), ("w8a8-float32", 64, 32), ("w4a16-g128", 64, 32)):
            assert library.tuned(H200, *product, 1) == "rule"
        assert library.tuned("another", "w8a8", 64, 32, 1) == "rule"
        with pytest.raises(QpassError, match="has no kind w2a2; it has w8a8, "):
            library.tuned(H200, "w2a2", 64, 32, 1)
        assert not capfd.readouterr().err

    def test_what_is_written_is_what_it_finds(self, tabled: Tabled) -> None:
        """Every number of tokens, by Python's entries and by the library."""
        variants = ("skinny", "mma", "sm90_64x64", "sm90_128x128")
        rows = [row(m, {v: 1.0 + (m * (i + 3)) % 7 for i, v in enumerate(variants)}) for m in (1, 2, 5, 8, 40, 64, 90)]
        made = entries(rows)
        assert len({e.variant for e in made}) > 2
        library = tabled(to_text({H200: tuple(made)}))
        for m in range(1, 100):
            want = next((e.variant for e in made if m <= e.m), "rule")
            assert library.tuned(H200, *W8A8, m) == want, m

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "it cannot be read, or is empty"),
            ("# nothing\n", "it is empty"),
            ("qpass tuning 2\n", 'line 1: wants "qpass tuning 1"'),
            ("\0\xff" * 1000, 'line 1: wants "qpass tuning 1"'),
            ("qpass tuning 1\nw8a8 64 32 1 mma\n", "line 2: a device must come first"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 64 32 mma\n", "line 3: wants kind, N, K, M and variant"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 64 32 1 fast\n", "line 3: there is no variant fast"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 64 32 1 auto\n", "line 3: there is no variant auto"),
            (f"qpass tuning 1\ndevice {H200}\nw2a2 64 32 1 mma\n", "line 3: there is no kind w2a2"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 64 0 1 mma\n", "line 3: N, K and M are whole numbers above 0"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 {10**30} 1 1 mma\n", "line 3: N, K and M are whole numbers above 0"),
            (f"qpass tuning 1\ndevice {H200}\nw8a8 64 32 1 mma\nw8a8 64 32 1 skinny\n", "w8a8 64 32 1 twice"),
        ],
    )
    def test_a_malformed_file_is_told_and_ignored(
        self, text: str, said: str, tabled: Tabled, capfd: pytest.CaptureFixture[str]
    ) -> None:
        library = tabled(text)
        for _ in range(2):
            assert library.tuned(H200, "w8a8", 64, 32, 1) == "rule"
        told = capfd.readouterr().err
        assert told.startswith(f"qpass: {beside(library.path)} is ignored: ")
        assert said in told
        assert told.count("\n") == 1, "once"

    def test_without_a_file(self, tabled: Tabled, capfd: pytest.CaptureFixture[str]) -> None:
        assert tabled(None).tuned(H200, "w8a8", 64, 32, 1) == "rule"
        assert not capfd.readouterr().err

    def test_what_is_compiled_in_is_of_the_records(self, tmp_path: Path) -> None:
        there = source_folder() / "kernels" / "tuning_defaults.h"
        assert there.read_text() == header(source_folder() / "tuning"), "run python -m benchmarks.tuning"
        told = record([row(64, {"skinny": 40.0, "mma": 30.0})], H200, "bfloat16", "", "13.0")
        (tmp_path / "a.json").write_text(json.dumps(told))
        assert f'    "device {H200}\\n"\n    "w8a8 8192 8192 31 rule\\n"\n    "w8a8 8192 8192 64 mma\\n";' in header(
            tmp_path
        )
        assert rows_of(told) == [row(64, {"skinny": 40.0, "mma": 30.0})]


MLP = """
<ir_version: 10, opset_import: ["" : 17]>
mlp (float[batch, length, 128] x) => (float[batch, length, 128] y)
<float[128, 256] w1, float[256, 128] w2>
{
    [fc1] m1 = MatMul(x, w1)
    [act] r = Relu(m1)
    [fc2] y = MatMul(r, w2)
}
"""


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.onnx"
    onnx.save(model(MLP), path)
    return path


class TestProducts:
    @pytest.mark.parametrize(
        ("preset", "kinds"),
        [
            ("w8a8", ["w8a8", "w8a8-float32"]),
            ("w8a16", ["w8a16"]),
            ("w4a16", ["w4a16"]),
            ("w4a16-g128", ["w4a16-g128"]),
        ],
    )
    def test_of_a_rewritten_model(self, preset: str, kinds: list[str], mlp: Path) -> None:
        path = qpass.rewrite(mlp, spec=QuantSpec.preset(preset)).output
        assert of_model(path) == {(kind, *nk) for kind in kinds for nk in ((256, 128), (128, 256))}
        assert products([path], [], kinds[:1]) == [(kinds[0], 128, 256), (kinds[0], 256, 128)]
        with pytest.raises(QpassError, match="the models have no such products"):
            products([path], [], ["w8a16-g32"])

    def test_of_shapes(self) -> None:
        assert products([], [(64, 128)]) == sorted((kind, 64, 128) for kind in USUAL)
        assert products([], [(64, 2), (64, 2)], ["w4a16"]) == [("w4a16", 64, 2)]


class StandInCall:
    """A call that takes as long as the variant that was chosen last."""

    def __init__(self, times: dict[str, float], rule: str, job: Job) -> None:
        self.times = times
        self.rule = rule
        self.job = job
        self.now = "auto"

    def __call__(self, stream: int) -> float:
        return self.times[self.now]

    def choice(self) -> Choice:
        return Choice(tuple(self.times), self.rule, self.job.variant)

    def take(self, variant: str) -> None:
        self.now = variant


class StandInOurs:
    """`times` are µs by M and variant; below 0 a variant fails."""

    dtype = "bfloat16"
    times: dict[int, dict[str, float]]

    def __init__(self, *_: Any) -> None: ...

    def bytes(self, job: Job) -> int:
        return job.bytes(DTYPES[self.dtype])

    def calls(self, job: Job, copies: int) -> list[StandInCall]:
        return [StandInCall(self.times[job.m], "skinny", job)] * copies


class StandInTimer:
    bandwidth = 1e12

    def copies(self, size: int) -> int:
        return 2

    def time(self, calls: Sequence[Call]) -> Time:
        us = float(calls[0](0))
        if us < 0:
            raise QpassError("CUDA: not supported")
        return Time(us, 1.0)

    def check(self) -> None: ...


@pytest.fixture
def ours() -> type[StandInOurs]:
    class Ours(StandInOurs):
        times = {16: {"skinny": 10.0, "mma": 30.0}, 64: {"skinny": 40.0, "mma": -1.0, "sm90_64x64": 25.0}}  # noqa: RUF012

    return Ours


class TestTuner:
    def test_rows_and_table(self, ours: type[StandInOurs], tmp_path: Path) -> None:
        target, steps = tmp_path / "lib.so.tuning", []
        update(target, H200, [entry(1, "mma"), entry(3, "mma", ("w8a16", 8, 8))])
        tuner = Tuner(StandInTimer(), ours(), H200, target)
        rows = tuner.run([W8A8], [64, 16, 64], lambda done, total: steps.append((done, total)))
        assert [(r.m, r.variant, r.us) for r in rows] == [
            (16, "skinny", {"skinny": 10.0, "mma": 30.0}),
            (64, "sm90_64x64", {"skinny": 40.0, "sm90_64x64": 25.0}),
        ]
        assert read(target)[H200] == (
            entry(3, "mma", ("w8a16", 8, 8)),
            entry(31, "rule"),
            entry(64, "sm90_64x64"),
        )
        assert steps == [(1, 2), (2, 2)]

    def test_a_failure_of_the_rules_own_ends_it(self, ours: type[StandInOurs], tmp_path: Path) -> None:
        """What was done before is in the table."""
        target = tmp_path / "lib.so.tuning"
        tuner = Tuner(StandInTimer(), ours(), H200, target)
        tuner.run([W8A8], [16])
        before = target.read_text()
        ours.times = {16: {"skinny": -1.0, "mma": 3.0}}
        with pytest.raises(QpassError, match="w8a8 64×64 at M 16 by skinny: CUDA: not supported"):
            tuner.run([("w8a8", 64, 64)], [16])
        assert target.read_text() == before


@pytest.fixture
def on_gpu(tabled: Tabled, ours: type[StandInOurs], cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    library = tabled(None)
    monkeypatch.setenv("QPASS_PLUGINS", str(library.path))
    monkeypatch.setattr("qpass.plugins.bench.timing.Timer", StandInTimer)
    monkeypatch.setattr("qpass.plugins.bench.ours.Ours", ours)
    monkeypatch.setattr(gpu, "device", lambda: types.SimpleNamespace(name=lambda: H200))
    monkeypatch.setattr(machine, "clocks", dict)
    return library


class TestCommand:
    ARGS = ("plugins", "tune", "--shape", "8192x8192", "--kind", "w8a8", "--m", "16,64")

    def test_the_library_takes_what_was_found(self, on_gpu: Library, run: Run) -> None:
        done = run(*self.ARGS)
        assert done.code == 0, done.err
        assert "sm90_64x64" in done.out
        assert "1.60" in done.out
        assert f"{on_gpu.path}.tuning has it" in done.out
        assert on_gpu.tuned(H200, *W8A8, 64) == "sm90_64x64"
        assert on_gpu.tuned(H200, *W8A8, 16) == "rule"

    def test_json_is_a_record(self, on_gpu: Library, run: Run, tmp_path: Path) -> None:
        told = json.loads(run(*self.ARGS, "--json", "-o", tmp_path / "mine").out)
        assert [r.variant for r in rows_of(told)] == ["skinny", "sm90_64x64"] == [r["variant"] for r in told["rows"]]
        assert (told["device"], told["dtype"]) == (H200, "bfloat16")
        assert parse((tmp_path / "mine").read_text())[H200][-1] == entry(64, "sm90_64x64")
        assert not beside(on_gpu.path).exists()

    def test_what_is_wrong_is_said_before_anything_runs(
        self, on_gpu: Library, run: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "bad").write_text("nothing")
        for args, said in (
            ((), "nothing to tune: give rewritten models, or shapes"),
            ((mlp,), "has no plugin nodes that multiply by a weight; rewrite it first"),
            ((tmp_path / "none.onnx",), "no such file"),
            (("--shape", "64"), "--shape 64: w8a8 wants N and K"),
            (("--shape", "64x64"), "--shape 64x64: w4a16-g128 wants N, and K a multiple of 128"),
            (("--shape", "64x64", "--kind", "w2a2"), "--kind w2a2: there are w8a8, "),
            (("--shape", "64x128", "--m", "1,,2"), "--m 1,,2: wants whole numbers"),
            (("--shape", "64x128", "--m", "0"), "--m 0: wants whole numbers"),
            (("--shape", "64x128", "--dtype", "float32"), "wants bfloat16 or float16"),
            (("--shape", "64x128", "--library", tmp_path / "no.so"), "no such plugin library"),
            (("--shape", "64x128", "-o", tmp_path), "it is a folder"),
            (("--shape", "64x128", "-o", tmp_path / "bad"), "is no table of tuning"),
            (("--shape", "64x128", "-o", on_gpu.path), "would overwrite the input"),
        ):
            refused = run("plugins", "tune", *args)
            assert (refused.code, said in refused.err) == (2, True), (args, refused.err)
        assert (tmp_path / "bad").read_text() == "nothing"

    def test_no_library_and_no_gpu(
        self, shells: Library, run: Run, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "compile them with `qpass plugins build`" in run(*self.ARGS).err

        def none() -> None:
            raise QpassError("there is no CUDA GPU on this machine")

        monkeypatch.setattr(gpu, "driver", none)
        monkeypatch.setattr(plugins, "find", lambda *_: shells)
        refused = run(*self.ARGS, "-o", tmp_path / "mine")
        assert (refused.code, "no CUDA GPU" in refused.err) == (2, True)


def test_variants_of_a_call(shells: Library) -> None:
    """Products ask the kernels, which are not there; other ops go one way. Nonsense is refused before that."""
    f16, i8, f32 = DTYPES["float16"], np.dtype(np.int8), DTYPES["float32"]
    made = job(W8A8, 5, "float16")
    gemm = shells.node(made.op, made.attrs)
    inputs = [DeviceTensor(0, *t) for t in made.inputs(f16).values()]
    outputs = [DeviceTensor(0, *t) for t in made.outputs(f16).values()]
    with pytest.raises(QpassError, match="SmoothQuantGemm: there is no kernel"):
        gemm.choice(inputs, outputs)
    with pytest.raises(QpassError, match="3 inputs and 1 outputs, wants 4 and 1"):
        gemm.choice(inputs[1:], outputs)
    gemm.take("mma")
    with pytest.raises(ValueError, match="tuple"):
        gemm.take("nothing")
    x, q, scale = DeviceTensor(0, f16, (5, 64)), DeviceTensor(0, i8, (5, 64)), DeviceTensor(0, f32, (5, 1))
    assert shells.node("QuantizePerToken", {"has_smoother": 0}).choice([x], [q, scale]) == Choice((), "auto", "")
