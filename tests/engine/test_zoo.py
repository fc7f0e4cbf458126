"""Every model of the zoo as an engine, in three presets, through the compiled plugins: each promised layer is there.

`make engines` compiles the plugins and runs this; the default suite has a few models, with the plugins' shells.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

import qpass
from qpass import engine as engines
from qpass import plugins
from qpass.errors import QpassError
from qpass.plugins import Library
from tests import zoo
from tests.zoo import FEW

PRESETS = {"w8a16": None, "w4a16-g128": 32, "w8a8": None}
"""With group sizes that the zoo's small Linears have; w4a16-g128 with its norms as plugins."""
REFUSED = ("gemma_dynamo23", "llama_dynamo23", "llama_nnrms_dynamo23", "qwen2_dynamo23")
"""Those that TensorRT-RTX cannot build unquantized either: it fails in opset 23's Attention."""


def build_all(path: Path, tmp_path: Path, library: Library) -> None:
    model = tmp_path / path.name
    shutil.copyfile(path, model)
    if path.stem in REFUSED:
        with pytest.raises(QpassError):
            engines.build_files(model)
        return
    usual = {name: x.shape for name, x in zoo.samples(path)[0].items()}
    least = {name: (1, *shape[1:]) for name, shape in usual.items()}  # the first dim is a batch in all of them
    for preset, group_size in PRESETS.items():
        spec = qpass.QuantSpec.preset(preset, group_size, norm_plugins=preset == "w4a16-g128")
        done = qpass.rewrite(model, tmp_path / f"{preset}.onnx", spec=spec)
        facts = engines.build_files(done.output, library=library.path, min_shapes=least, opt_shapes=usual).facts
        promised = {n for site in done.ledger.sites if site.status == "rewritten" for n in site.new_nodes}
        assert promised, "the ledger promises plugin nodes"
        became = set(facts["plugin_layers"])
        # a ledger lists the standard nodes around a plugin too, such as a Split behind a merged Linear
        assert {n for n in promised if n.rpartition(".")[2] in library.ops} <= became
        assert facts["layers"]["PLUGIN_V3"] == len(became) >= len(done.ledger.of("linear")) - 1


@pytest.mark.engines
@zoo.each()
def test_every_model(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'qpass[rtx]'")
    library = plugins.find()  # before the cache is another
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_all(path, tmp_path, library)


@zoo.each(*FEW[:3])
def test_some_models(path: Path, tmp_path: Path, library: Library) -> None:
    build_all(path, tmp_path, library)
