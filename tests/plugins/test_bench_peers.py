"""The peers of `qpass plugins bench`."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from qpass.errors import QpassError
from qpass.plugins.bench.jobs import jobs
from qpass.plugins.bench.peers import PEERS
from qpass.plugins.bench.peers.base import TorchPeer
from qpass.plugins.bench.peers.cublas import Cublas
from tests.plugins.stand_ins import a_job, bench_of


class TestPeers:
    @pytest.mark.parametrize(
        ("op", "want"),
        [
            ("SmoothQuantGemm", {"cuBLAS", "torch linear", "torch._int_mm", "torch._scaled_mm"}),
            ("WeightOnlyQuantMatmul", {"cuBLAS", "torch linear", "humming"}),
            ("WeightOnlyGroupwiseQuantMatmul", {"cuBLAS", "torch linear", "humming", "tinygemm"}),
            ("Rmsnorm", {"torch.compile"}),
            ("RmsnormQuantization", {"torch.compile"}),
            ("QuantizePerToken", {"torch.compile"}),
        ],
    )
    def test_who_does_whose_work(self, op: str, want: set[str]) -> None:
        assert {name for name, peer in PEERS.items() if peer("bfloat16").applies(jobs([op])[0])} == want

    @pytest.mark.parametrize("name", [n for n, p in PEERS.items() if issubclass(p, TorchPeer)])
    def test_one_that_is_not_installed_says_so(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
        peer = PEERS[name]("bfloat16")
        job = next(j for j in jobs(tokens=[64, 4096]) if peer.applies(j))
        assert bench_of(peer).time(job).notes[name].startswith("not installed: pip install")

    def test_one_that_cannot_be_imported_says_why(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        note = bench_of(PEERS["torch linear"]("bfloat16")).time(a_job()).notes["torch linear"]
        assert note == "torch cannot be imported: libcudart.so.13: cannot open"

    def test_those_for_few_tokens_or_many_refuse_the_others(self) -> None:
        notes = bench_of(PEERS["torch._int_mm"]("bfloat16")).time(a_job(m=16)).notes
        assert "more than 16 rows" in notes["torch._int_mm"]
        notes = bench_of(PEERS["tinygemm"]("bfloat16")).time(a_job("WeightOnlyGroupwiseQuantMatmul", 4096)).notes
        assert "256" in notes["tinygemm"]
        notes = bench_of(PEERS["tinygemm"]("float16")).time(a_job("WeightOnlyGroupwiseQuantMatmul", 4)).notes
        assert "bfloat16" in notes["tinygemm"]

    @pytest.mark.parametrize(
        ("name", "ways"),
        [
            ("torch linear", 2),
            ("torch._int_mm", 1),
            ("torch._scaled_mm", 1),
            ("tinygemm", 3),
            ("humming", 1),
            ("torch.compile", 2),
        ],
    )
    def test_each_way_has_a_call_for_every_copy(self, name: str, ways: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a PyTorch and a Humming that take everything: each variant of each op, on the stream that is asked for."""
        torch = MagicMock()
        torch.compile.side_effect = lambda work, **_: work
        humming = MagicMock()
        humming.get_heuristics_config.return_value = {"block_shape": (8, 128, 64)}
        modules = {"torch": torch, "humming.layer": humming, "humming.tune": humming, "humming.kernel.humming": humming}
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr("importlib.import_module", lambda name: modules[name])
        peer = PEERS[name]("bfloat16")
        mine = [j for j in jobs(tokens=[64], shapes=[(8192, 8192)]) if peer.applies(j)]
        mine = mine or [j for j in jobs(tokens=[16], shapes=[(0, 8192)]) if peer.applies(j)]
        peer.prepare(mine)
        for job in mine:
            made = list(peer.calls(job, 3))
            assert [len(calls) for calls in made] == [3] * ways
            for call in itertools.chain(*made):
                call(7)
        assert {c.args for c in torch.cuda.ExternalStream.call_args_list} == {(7,)}
        peer.release()
        torch.cuda.empty_cache.assert_called_once_with()

    def test_groups_and_variants_are_not_one_to_those_whom_they_concern(self) -> None:
        variants = jobs(["WeightOnlyGroupwiseQuantMatmul"], [16], [(8192, 8192)])
        assert [j.variant for j in variants] == ["int4 g128", "int4 g64", "int4 g32", "int4 g128, all"]
        counts = {n: len({PEERS[n]("bfloat16").key(j) for j in variants}) for n in ("cuBLAS", "tinygemm", "humming")}
        assert counts == {"cuBLAS": 1, "tinygemm": 3, "humming": 4}


def test_the_command_line_imports_no_framework() -> None:
    code = (
        "import sys, qpass.cli, qpass.plugins.bench.session; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "humming", "triton", "pycuda"}
    code = "import sys, qpass.cli; print(*[m for m in sys.modules if m.startswith('qpass.plugins.bench')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split(), "the bench is imported by its command alone"


def test_cublas_needs_no_more_than_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it says so; a 16-bit product stands beside 32-bit activations."""
    monkeypatch.setattr("qpass.plugins.bench.peers.cublas._library", lambda: "libno-such-cublas.so")
    peer = Cublas("float32")
    with pytest.raises(QpassError, match="pip install nvidia-cublas"):
        _ = peer._handle
    assert peer._dtype == np.float16
