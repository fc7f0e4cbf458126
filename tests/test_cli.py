"""The command line as a user meets it: outputs, exit codes, one-line errors, targets left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qpass import pipeline
from qpass.rules import LIFT, MERGE, RULES
from qpass.testing import model
from tests.conftest import Run

TEXT = """
<ir_version: 10, opset_import: ["" : 17]>
tiny (float[B, S, 64] x) => (float[B, S, 32] y)
<float[64] gamma, float[64] beta, float[64, 128] w1, float[128] b1, float[128, 32] w2>
{
    h = LayerNormalization<axis = -1>(x, gamma, beta)
    m1 = MatMul(h, w1)
    a1 = Add(m1, b1)
    r = Relu(a1)
    y = MatMul(r, w2)
}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(model(TEXT), path)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        np.savez(folder / f"{i}.npz", x=random.standard_normal((2, 5, 64)).astype(np.float32))
    return folder


def external(path: Path) -> onnx.ModelProto:
    """The tiny model with its weights outside, written to `path`."""
    proto = model(TEXT)
    onnx.save(proto, path, save_as_external_data=True, location="tiny.data", size_threshold=0)
    return onnx.load(path, load_external_data=False)


class TestRewrite:
    def test_default_is_w8a16_and_says_so(self, run: Run, tiny: Path) -> None:
        r = run("rewrite", tiny)
        assert r.code == 0
        assert "no --preset and no --spec, so w8a16" in r.out
        assert "WeightOnlyQuantMatmul" in r.out
        assert f"next: qpass verify {tiny} {tiny.with_name('tiny.qpass.onnx')}" in r.out.replace("\n", " ")
        assert tiny.with_name("tiny.qpass.onnx").exists()
        ledger = json.loads(tiny.with_name("tiny.qpass.ledger.json").read_text())
        assert ledger["version"] == 1
        assert ledger["totals"]["linear"] == {"sites": 2, "rewritten": 2}

    def test_json_is_json(self, run: Run, tiny: Path) -> None:
        r = run("rewrite", tiny, "--json", "-p", "w8a8")
        assert json.loads(r.out)["coverage"] == 1.0

    def test_quiet_prints_nothing(self, run: Run, tiny: Path) -> None:
        r = run("rewrite", tiny, "--quiet", "--no-progress")
        assert (r.code, r.out, r.err) == (0, "", "")

    def test_same_bytes_twice(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            assert run("rewrite", tiny, "-o", tmp_path / name / "out.onnx", "-p", "w4a16-g128").code == 0
        for name in ("out.onnx", "out.ledger.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_rewritten_again_it_stays_and_says_so(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
        assert run("rewrite", tiny, "-o", once).code == 0
        r = run("rewrite", once, "-o", twice)
        said = "once.onnx was rewritten before: 2 of its nodes are qpass's and stay as they are, and nothing else is "
        said += "changed; to quantize it in another way, rewrite the original"
        assert said in r.out
        assert "0 of 0 Linears rewritten" in r.out
        for command in ("inspect", "explain"):
            assert said in run(command, once).out
        assert onnx.load(once) == onnx.load(twice)

    def test_input_is_only_read(self, run: Run, tiny: Path) -> None:
        before = tiny.read_bytes(), tiny.stat().st_mtime_ns
        assert run("rewrite", tiny).code == 0
        assert (tiny.read_bytes(), tiny.stat().st_mtime_ns) == before

    def test_declines_are_in_the_table(self, run: Run, tiny: Path) -> None:
        proto = model(TEXT.replace("64", "96").replace("128", "96"))
        onnx.save(proto, tiny)
        r = run("rewrite", tiny, "-p", "w4a16-g128")
        assert r.code == 0
        assert "K=96 is not a multiple of the group size 128" in r.out

    def test_require_coverage(self, run: Run, tiny: Path) -> None:
        assert run("rewrite", tiny, "--require-coverage", "100%").code == 0
        onnx.save(model(TEXT.replace("64", "96")), tiny)
        r = run("rewrite", tiny, "-p", "w4a16-g128", "--require-coverage", "100%")
        assert r.code == 1
        assert "coverage is 50.0%, below 100.0%" in r.err

    def test_profile_rules(self, run: Run, tiny: Path) -> None:
        r = run("rewrite", tiny, "--profile-rules")
        rows = {words[0]: words for line in r.out.splitlines() if (words := line.split())}
        assert rows["rule"] == ["rule", "at", "tries", "hits", "declines", "match", "ms", "ms", "share"]
        at, tries, hits, declines, matching, ms, share = rows["lift_matmul"][1:]
        assert at.startswith("linears.py:")
        assert (int(tries), int(hits), int(declines)) == (2, 2, 0)
        assert 0 <= float(matching) <= float(ms)
        known = {r.name for stage in (*LIFT, *RULES) for r in stage}
        shares = [float(words[-1].rstrip("%")) for name, words in rows.items() if name in known]
        assert sum(shares) == pytest.approx(100, abs=len(shares))
        assert share.endswith("%")
        assert "all rules" in r.out

    def test_own_rules(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        rules = Path(__file__).parents[1] / "samples" / "02_own_rule.py"
        assert run("rewrite", tiny, "--rules", rules).code == 0
        r = run("rules", "--rules", rules)
        assert "fold_factor" in r.out


class TestCalibrateAndVerify:
    def test_whole_way(self, run: Run, tiny: Path, samples: Path, tmp_path: Path) -> None:
        stats = tmp_path / "stats.npz"
        r = run("calibrate", tiny, "--data", samples, "-o", stats)
        assert r.code == 0
        for preset in ("w8a8", "w8a8-static"):
            out = tmp_path / f"{preset}.onnx"
            assert run("rewrite", tiny, "-o", out, "-p", preset, "-c", stats, "--require-coverage", "100%").code == 0
            r = run("verify", tiny, out, "--data", samples, "--layers")
            assert r.code == 0, r.out
            assert "y" in r.out

    def test_static_without_calibration_names_the_command(self, run: Run, tiny: Path) -> None:
        r = run("rewrite", tiny, "-p", "w8a8-static")
        assert r.code == 2
        assert "qpass calibrate" in r.err

    def test_w8a8_without_calibration_says_unsmoothed(self, run: Run, tiny: Path) -> None:
        r = run("rewrite", tiny, "-p", "w8a8")
        assert r.code == 0
        assert "without calibration nothing is smoothed" in r.out

    def test_calibration_of_another_model(self, run: Run, tiny: Path, samples: Path, tmp_path: Path) -> None:
        stats = tmp_path / "stats.npz"
        assert run("calibrate", tiny, "--data", samples, "-o", stats).code == 0
        other = tmp_path / "other.onnx"
        onnx.save(model(TEXT, seed=1), other)
        r = run("rewrite", other, "-p", "w8a8", "-c", stats)
        assert r.code == 2
        assert "another model" in r.err

    def test_verify_not_met(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.onnx"
        assert run("rewrite", tiny, "-o", out, "-p", "w4a16").code == 0
        assert run("verify", tiny, out, "--min-cosine", "0.99999").code == 1


class TestOtherCommands:
    def test_inspect_writes_nothing(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())
        r = run("inspect", tiny, "-p", "w8a8")
        assert r.code == 0
        assert "LayernormQuantization" in r.out
        assert [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"] == before

    def test_inspect_json(self, run: Run, tiny: Path) -> None:
        facts = json.loads(run("inspect", tiny, "--json").out)["model"]
        assert (facts["linears"], facts["norms"], facts["nodes"]) == (2, 1, 5)

    def test_explain(self, run: Run, tiny: Path) -> None:
        onnx.save(model(TEXT.replace("64", "96")), tiny)
        r = run("explain", tiny, "-p", "w4a16-g128")
        assert "K=96 is not a multiple" in r.out
        assert run("explain", tiny, "--rule", "no_such_rule").code == 2

    def test_explain_a_rule(self, run: Run, tiny: Path) -> None:
        r = run("explain", tiny, "--rule", "lift_matmul")
        assert r.out == "lift_matmul has no near misses: tried at 2 nodes, rewrote 2, declined 0\n"
        r = run("explain", tiny, "--rule", "lift_gemm")
        assert r.out == "lift_gemm was not tried: the model has no node that could be the last of its pattern\n"

    def test_explain_a_site(self, run: Run, tiny: Path) -> None:
        r = run("explain", tiny, "-p", "w8a8", "--site", "MatMul@m1")
        assert "[1] linear 'Add@a1' rewritten → SmoothQuantGemm" in r.out
        assert "weight: w1 [64×128] float32, 32.8 kB → 8.7 kB" in r.out
        assert "fed by: [0] norm 'LayerNormalization@h'" in r.out
        r = run("explain", tiny, "-p", "w8a8", "--site", "LayerNorm*")
        assert "feeds: [1] 'Add@a1'" in r.out
        r = run("explain", tiny, "-p", "w8a8", "--site", "Relu@r")
        assert "its Linears: [1] 'Add@a1', [3] 'MatMul@y'" in r.out
        r = run("explain", tiny, "--site", "nothing")
        assert r.code == 2
        assert "the sites are 'LayerNormalization@h', 'Add@a1', 'Relu@r' …" in r.err

    @pytest.mark.parametrize("preset", ["w8a16", "w4a16", "w4a16-g128", "w4a16-g128-zp", "w8a8", "w8a8-static"])
    def test_spec_show_loads_back(self, run: Run, preset: str, tiny: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(run("spec", "show", preset).out)
        assert run("spec", "show", recipe).out == recipe.read_text()
        if preset != "w8a8-static":
            assert run("rewrite", tiny, "--spec", recipe).code == 0

    def test_spec_schema(self, run: Run) -> None:
        assert json.loads(run("spec", "schema").out)["type"] == "object"

    def test_spec_list(self, run: Run) -> None:
        assert "w4a16-g128-zp" in run("spec", "list").out

    def test_rules_show_hits_of_the_last_run(self, run: Run, tiny: Path) -> None:
        assert run("rewrite", tiny).code == 0
        line = next(x for x in run("rules").out.splitlines() if "weight_only" in x)
        assert " 2 " in line

    def test_rules_lists_every_stage_in_order(self, run: Run) -> None:
        lines = [x.split() for x in run("rules").out.splitlines()]
        known = {r.name for stage in (*LIFT, MERGE, *RULES) for r in stage}
        assert known <= {words[1] for words in lines if len(words) > 1}
        stages = [words[0] for words in lines if len(words) > 1 and words[1] in known]
        assert list(dict.fromkeys(stages)) == ["lift", "merge", "quantize"]

    def test_help_has_examples(self, run: Run) -> None:
        for command in ("rewrite", "explain", "inspect", "calibrate", "verify", "rules"):
            assert f"qpass {command}" in run(command, "--help").out.replace("\n", " ")

    def test_version(self, run: Run) -> None:
        assert run("--version").out.startswith("qpass ")

    def test_as_a_module(self, run: Run) -> None:
        """Where the script is not on the PATH."""
        asked = [sys.executable, "-m", "qpass", "--version"]
        assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == run("--version").out


def _no_file(tiny: Path) -> None:
    tiny.unlink()


def _text(tiny: Path) -> None:
    tiny.write_text("not a model")


def _truncated(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:1000])


def _data_missing(tiny: Path) -> None:
    external(tiny)
    tiny.with_name("tiny.data").unlink()


def _data_short(tiny: Path) -> None:
    external(tiny)
    data = tiny.with_name("tiny.data")
    data.write_bytes(data.read_bytes()[:-100])


def _moved_to(tiny: Path, location: str) -> None:
    proto = external(tiny)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    tiny.write_bytes(proto.SerializeToString())


def _data_outside(tiny: Path) -> None:
    _moved_to(tiny, "../tiny.data")
    shutil.move(tiny.with_name("tiny.data"), tiny.parent.parent / "tiny.data")


def _data_absolute(tiny: Path) -> None:
    _moved_to(tiny, str(tiny.with_name("tiny.data")))


def _opset(tiny: Path, version: int) -> None:
    proto = onnx.load(tiny)
    proto.opset_import[0].version = version
    tiny.write_bytes(proto.SerializeToString())


def _nan(tiny: Path) -> None:
    w = np.zeros((128, 32), np.float32)
    w[3, 5] = np.nan
    proto = onnx.load(tiny)
    for tensor in proto.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(numpy_helper.from_array(w, "w2"))
    onnx.save(proto, tiny)


BAD = {
    "missing file": (_no_file, "tiny.onnx"),
    "not ONNX": (_text, "tiny.onnx"),
    "truncated": (_truncated, "tiny.onnx"),
    "external data missing": (_data_missing, "tiny.data"),
    "external data short": (_data_short, "tiny.data"),
    "external data outside the folder": (_data_outside, "../tiny.data"),
    "external data absolute": (_data_absolute, "tiny.data"),
    "old opset": (lambda p: _opset(p, 12), "12"),
    "new opset": (lambda p: _opset(p, 1000), "1000"),
    "NaN weight": (_nan, "'w2'"),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD)
    @pytest.mark.parametrize("preset", ["w8a16", "w4a16-g128"])
    def test_one_line_and_the_target_untouched(
        self, run: Run, tiny: Path, case: str, preset: str, tmp_path: Path
    ) -> None:
        spoil, names = BAD[case]
        spoil(tiny)
        out = tmp_path / "out" / "model.onnx"
        out.parent.mkdir()
        out.write_text("precious")
        r = run("rewrite", tiny, "-o", out, "-p", preset)
        assert r.code == 2
        assert r.err.startswith("error: ")
        assert r.err.count("\n") == 1
        assert names in r.err
        assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]
        assert out.read_text() == "precious"

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["-p", "w8a61"], "w8a16"),
            (["-p", "w8a16", "--group-size", "32"], "group"),
            (["-p", "w4a16-g128", "--group-size", "33"], "33"),
            (["--spec", "missing.yaml"], "missing.yaml"),
            (["-c", "missing.npz"], "missing.npz"),
            (["--rules", "missing.py"], "missing.py"),
            (["--require-coverage", "lots"], "lots"),
            (["--max-memory", "lots"], "lots"),
            (["-p", "w8a16", "--spec", "x.yaml"], "give one of them"),
        ],
    )
    def test_options(self, run: Run, tiny: Path, args: list[str], says: str) -> None:
        r = run("rewrite", tiny, *args)
        assert r.code == 2
        assert says in r.err
        assert not tiny.with_name("tiny.qpass.onnx").exists()

    def test_output_over_input(self, run: Run, tiny: Path) -> None:
        before = tiny.read_bytes()
        r = run("rewrite", tiny, "-o", tiny)
        assert r.code == 2
        assert tiny.read_bytes() == before

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_unwritable_folder(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        r = run("rewrite", tiny, "-o", locked / "out.onnx")
        assert r.code == 2
        assert "locked" in r.err

    def test_folder_that_is_not_there(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        r = run("rewrite", tiny, "-o", tmp_path / "nowhere" / "out.onnx")
        assert r.code == 2
        assert "nowhere" in r.err

    def test_yaml_mistake_names_file_and_line(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("preset: w4a16-g128\ngroupsize: 32\n")
        r = run("rewrite", tiny, "--spec", recipe)
        assert r.code == 2
        assert "recipe.yaml:2" in r.err
        assert "group_size" in r.err

    def test_filter_that_matches_nothing(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("preset: w8a16\nexclude:\n  - '*lm_head*'\n")
        r = run("rewrite", tiny, "--spec", recipe)
        assert r.code == 2
        assert "recipe.yaml:3" in r.err

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("def (", "rules.py:1"),
            ("import qpass\n\nraise ValueError('mine')\n", "rules.py:3: ValueError: mine"),
            ("x = 1\n", "defines no rule"),
        ],
    )
    def test_bad_rule_files(self, run: Run, tiny: Path, tmp_path: Path, text: str, says: str) -> None:
        rules = tmp_path / "rules.py"
        rules.write_text(text)
        r = run("rewrite", tiny, "--rules", rules)
        assert r.code == 2
        assert says in r.err

    def test_unknown_option(self, run: Run, tiny: Path) -> None:
        assert run("rewrite", tiny, "--no-such-option").code == 2


def test_an_interrupted_command_says_so(tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "rewrite", pressed)
    done = run("rewrite", tiny)
    assert (done.code, done.err.strip()) == (130, "error: interrupted")
    assert [f.name for f in tiny.parent.iterdir()] == [tiny.name]
