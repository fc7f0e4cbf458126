"""Rewriting a rewritten model changes nothing, whatever the preset; what was left out can be rewritten later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpass.calibrate import Stats, calibrate
from qpass.errors import QpassError
from qpass.ops import DOMAIN
from qpass.pipeline import Rewritten, rewrite
from qpass.quant_mode import QuantMode
from qpass.spec import PRESETS, QuantSpec
from qpass.testing import feeds
from tests import zoo
from tests.rules.kit import Graph, error, recipe, site
from tests.rules.test_experts import moe_block, product


def two_linears() -> onnx.ModelProto:
    g = Graph()
    h = g.op("LayerNormalization", g.input("x", ["B", 32]), g.gain(32))
    h = g.op("Relu", g.op("MatMul", h, g.weight(32, 64), name="first"))
    return g.model(g.op("MatMul", h, g.weight(64, 32), name="second"))


def statistics(path: Path) -> Stats:
    """Statistics of a model over made-up inputs."""
    sample = path.with_suffix(".npz")
    np.savez(sample, **feeds(onnx.load(path)))  # type: ignore[arg-type] # numpy's own stub
    return calibrate(path, [sample], path.with_suffix(".stats"), force=True)


def spec_of(preset: str) -> QuantSpec:
    return QuantSpec.preset(preset, 32 if "g128" in preset else None)


def again(done: Rewritten, output: Path, preset: str | QuantSpec, **options: Any) -> Rewritten:
    """Rewrites an output once more; nothing may change and every site must have a reason."""
    spec = spec_of(preset) if isinstance(preset, str) else preset
    twice = rewrite(done.output, output, spec=spec, **options)
    assert twice.output.read_bytes() == done.output.read_bytes()
    count = sum(n.domain == DOMAIN for n in onnx.load(done.output, load_external_data=False).graph.node)
    assert any(f"was rewritten before: {count} of its nodes" in r for r in twice.remarks)
    assert all(s.status in ("kept", "excluded", "declined") and s.reason for s in twice.ledger.sites)
    assert twice.ledger.bytes_before == twice.ledger.bytes_after
    left = [n.name for n in onnx.load(done.output, load_external_data=False).graph.node if n.domain != DOMAIN]
    assert {n for s in twice.ledger.sites for n in s.nodes} <= set(left)
    return twice


@pytest.mark.parametrize("preset", PRESETS)
@zoo.each(*zoo.FEW)
def test_zoo(path: Path, preset: str, tmp_path: Path) -> None:
    stats = None
    if preset == "w8a8-static":
        stats = tmp_path / "stats.npz"
        np.savez(tmp_path / "sample.npz", **zoo.samples(path)[0])  # type: ignore[arg-type] # numpy's own stub
        calibrate(path, [tmp_path / "sample.npz"], stats)
    first = [rewrite(path, tmp_path / f"{i}.onnx", spec=spec_of(preset), calibration=stats) for i in range(2)]
    assert first[0].output.read_bytes() == first[1].output.read_bytes()
    assert first[0].ledger.to_json() == first[1].ledger.to_json()
    again(first[0], tmp_path / "again.onnx", preset, calibration=stats)
    again(first[0], tmp_path / "again.onnx", "w4a16" if preset != "w4a16" else "w8a8")


@pytest.mark.parametrize("preset", PRESETS)
def test_experts(preset: str, tmp_path: Path) -> None:
    onnx.save(moe_block(), tmp_path / "moe.onnx")
    stats = statistics(tmp_path / "moe.onnx")
    once = rewrite(tmp_path / "moe.onnx", tmp_path / "once.onnx", spec=spec_of(preset), calibration=stats)
    for second in PRESETS:
        twice = again(once, tmp_path / "twice.onnx", second)
        assert not twice.ledger.sites
    onnx.save(product("transposed on the right"), tmp_path / "one.onnx")
    again(rewrite(tmp_path / "one.onnx"), tmp_path / "twice.onnx", "w8a16")


def test_weights_in_a_data_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qpass.graph.save.INSIDE", 0)
    monkeypatch.setattr("qpass.graph.save.INSIDE_AS_BEFORE", 0)
    onnx.save(two_linears(), tmp_path / "model.onnx")
    once = rewrite(tmp_path / "model.onnx", tmp_path / "once.onnx")
    twice = rewrite(once.output, tmp_path / "twice.onnx")
    data = [next(f for f in d.saved.files if f.suffix == ".data") for d in (once, twice) if d.saved is not None]
    assert data[0].read_bytes() == data[1].read_bytes()
    assert onnx.load(once.output) == onnx.load(twice.output)


class TestWhatWasLeft:
    def models(self, tmp_path: Path) -> tuple[Path, QuantSpec]:
        path = tmp_path / "model.onnx"
        onnx.save(two_linears(), path)
        return path, recipe(QuantMode.use_weight_only(), exclude=["second"])

    def test_the_same_recipe_again(self, tmp_path: Path) -> None:
        """Its other filters have nothing to match any more: a remark, no error."""
        path, spec = self.models(tmp_path)
        once = rewrite(path, spec=spec)
        twice = again(once, tmp_path / "twice.onnx", spec)
        assert [(s.name, s.status) for s in twice.ledger.of("linear")] == [("second", "excluded")]
        both = recipe(QuantMode.use_weight_only(), exclude=["second"], overrides=[{"match": "first", "mode": "none"}])
        twice = again(once, tmp_path / "twice.onnx", both)
        assert any("'first'" in r and "rewritten already" in r for r in twice.remarks)

    @pytest.mark.parametrize("preset", ["w8a16", "w4a16", "w8a8"])
    def test_later(self, preset: str, tmp_path: Path) -> None:
        """Bodies that both runs need are there once."""
        path, spec = self.models(tmp_path)
        once = rewrite(path, spec=spec)
        twice = rewrite(once.output, tmp_path / "twice.onnx", spec=preset)
        assert [(s.name, s.status) for s in twice.ledger.of("linear")] == [("second", "rewritten")]
        assert any(r.endswith("what was left is rewritten now") for r in twice.remarks)
        result = onnx.load(twice.output)
        onnx.checker.check_model(result, full_check=True)
        keys = [(f.domain, f.name, f.overload) for f in result.functions]
        assert len(set(keys)) == len(keys)
        assert error(onnx.load(path), result) < (0.3 if preset == "w4a16" else 0.03)
        again(twice, tmp_path / "thrice.onnx", "w8a16")

    def test_bodies_of_another_version(self, tmp_path: Path) -> None:
        path, spec = self.models(tmp_path)
        once = rewrite(path, spec=spec)
        changed = onnx.load(once.output)
        changed.functions[0].doc_string = "something else"
        onnx.save(changed, once.output)
        with pytest.raises(QpassError, match="rewritten by another version of qpass"):
            rewrite(once.output, tmp_path / "twice.onnx", spec="w8a16")

    def test_static_scales_need_statistics_of_the_model_as_it_is(self, tmp_path: Path) -> None:
        path, spec = self.models(tmp_path)
        stats = statistics(path)
        once = rewrite(path, spec=spec)
        with pytest.raises(QpassError, match="calibration of another model"):
            rewrite(once.output, tmp_path / "twice.onnx", spec="w8a8-static", calibration=stats)
        own = statistics(once.output)
        twice = rewrite(once.output, tmp_path / "twice.onnx", spec="w8a8-static", calibration=own)
        assert site(twice, "linear").status == "rewritten"


def test_a_norm_without_linears_is_kept_with_its_reason(tmp_path: Path) -> None:
    g = Graph()
    n = g.op("LayerNormalization", g.input("x", ["B", 8]), g.gain(8))
    onnx.save(g.model(g.op("MatMul", g.op("Relu", n), g.weight(8, 8))), tmp_path / "m.onnx")
    twice = again(rewrite(tmp_path / "m.onnx"), tmp_path / "twice.onnx", "w8a8")
    assert [(s.kind, s.status) for s in twice.ledger.sites] == [("norm", "kept")]
