"""The whole zoo: every Linear and norm of the ground truth is found, nothing else is, and the models still run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qpass.graph import Model
from qpass.graph.emit import emit
from qpass.pipeline import Rewritten, rewrite
from qpass.rules import Lifted
from qpass.rules.unlifted import WEIGHTED
from qpass.spec import QuantSpec
from tests import zoo

PRESETS = ("w8a16", "w4a16", "w4a16-g128", "w4a16-g128-zp", "w8a8")


def spec(preset: str) -> QuantSpec:
    """A preset as the zoo's round-to-nearest numbers were made: groups of 32, scales from the amax."""
    return QuantSpec.preset(preset, 32 if "g128" in preset else None).model_copy(update={"rounding": "amax"})


@zoo.each()
def test_counts(path: Path) -> None:
    truth = zoo.truth(path)
    done = rewrite(path, spec="w8a8", dry_run=True)
    linears, norms = done.ledger.of("linear"), done.ledger.of("norm")
    wanted = [x for x in truth["linears"] if not x["tied_embedding"]]
    assert len(linears) == len(truth["linears"])
    assert len(norms) == len(truth["norms"])
    assert Counter(s.status for s in linears) == Counter(rewritten=len(wanted), excluded=len(linears) - len(wanted))
    assert sum(s.fed_by is not None for s in linears) == sum(x["fed_by_norm"] is not None for x in wanted)
    feeding = {x["fed_by_norm"] for x in wanted} - {None}
    assert Counter(s.status for s in norms) == Counter(rewritten=len(feeding), kept=len(norms) - len(feeding))
    assert [s.fed_by for s in linears if s.fed_by is not None and done.ledger.sites[s.fed_by].kind != "norm"] == []


@zoo.each()
def test_mlps(path: Path) -> None:
    """One of each layer; whisper's convolutions and BERT's head, whose activation feeds a norm, are none."""
    done = rewrite(path, spec="w8a8", dry_run=True)
    mlps, sites = done.ledger.of("mlp"), done.ledger.sites
    truth = zoo.truth(path)
    roles = Counter(x["role"] for x in truth["linears"])
    layers = roles["fc2"] + roles["down"]
    if truth["architecture"] == "distilbert":  # its classifier is behind a Linear and a ReLU too
        layers += 1
    assert [s.status for s in mlps] == ["rewritten"] * layers
    assert done.ledger.of("activation") == []
    linears = {name for s in done.ledger.of("linear") for name in s.nodes}
    norms = {name for s in done.ledger.of("norm") for name in s.nodes}
    for s in mlps:
        assert s.op == "ActivationQuantization"
        parts = [sites[i] for i in s.parts]
        assert [p.kind for p in parts] == ["linear"] * (3 if roles["gate"] else 2)
        *columns, row = parts
        assert row.op == "SmoothQuantGemm"
        assert row.fed_by is None
        assert all(c.weight and row.weight and c.weight.name != row.weight.name for c in columns)
        assert not (linears | norms).intersection(s.nodes)


@zoo.each()
def test_every_weighted_node_is_one_site(path: Path) -> None:
    done = rewrite(path, dry_run=True)
    proto = onnx.load(path)
    known = {t.name for t in proto.graph.initializer}
    for n in proto.graph.node:
        if n.op_type == "Constant" or (
            n.op_type in ("Transpose", "Cast", "Identity", "Reshape") and all(i in known for i in n.input)
        ):
            known.update(n.output)
    weighted = [n for n in proto.graph.node if n.op_type in WEIGHTED and known.intersection(n.input[:2])]
    named = Counter(name for s in done.ledger.of("linear") for name in s.nodes)
    assert [n.name for n in weighted if named[n.name] != 1] == []
    everything = [name for s in done.ledger.sites for name in s.nodes]
    assert set(everything) <= {n.name for n in proto.graph.node}
    norm_nodes = Counter(n for s in done.ledger.of("norm") for n in s.nodes)
    for n in proto.graph.node:
        if n.op_type in ("LayerNormalization", "RMSNormalization"):
            assert norm_nodes[n.name] == 1


@zoo.each()
def test_unlift_restores_the_original(path: Path) -> None:
    model = Model.load(path)
    Lifted(model).unlift()
    emitted = emit(model)
    original = onnx.ModelProto()
    original.CopyFrom(model.proto)
    assert [t.proto.name for t in emitted.initializers] == [t.name for t in original.graph.initializer]
    original.graph.ClearField("initializer")
    assert emitted.proto == original


def run(path: Path, folder: Path, preset: str) -> Rewritten:
    """Rewrite, check, run, and compare with torch."""
    done = rewrite(path, folder / "out.onnx", spec=spec(preset))
    onnx.checker.check_model(str(done.output), full_check=True)
    inputs, outputs = zoo.samples(path)
    session = ort.InferenceSession(str(done.output), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    worst = 0.0
    for name, got in zip(names, session.run(names, inputs), strict=True):
        want = outputs[name].astype(np.float64)
        if outputs[name].dtype.kind == "f":
            worst = max(worst, float(np.linalg.norm(want - got) / np.linalg.norm(want)))
    assert worst <= 1.15 * zoo.rtn(path, preset)
    return done


@zoo.each(*zoo.FEW)
@pytest.mark.parametrize("preset", ["w8a16", "w4a16-g128-zp", "w8a8"])
def test_runs(path: Path, preset: str, tmp_path: Path) -> None:
    run(path, tmp_path, preset)


@pytest.mark.slow
@zoo.each()
@pytest.mark.parametrize("preset", PRESETS)
def test_all_run(path: Path, preset: str, tmp_path: Path) -> None:
    run(path, tmp_path, preset)


@zoo.each(*zoo.FEW)
@pytest.mark.parametrize("preset", ["w4a16-g128", "w8a8"])
def test_twice_the_same_bytes(path: Path, preset: str, tmp_path: Path) -> None:
    both = []
    for _ in range(2):
        done = rewrite(path, tmp_path / "out.onnx", spec=spec(preset))
        both.append((done.output.read_bytes(), done.ledger_path.read_bytes()))
        done.output.unlink()
    assert both[0] == both[1]
