"""What kernels are measured beside. Each is optional, and imports what it stands for only when it is timed."""

from __future__ import annotations

from qpass.plugins.bench.peers.base import Peer, TorchPeer
from qpass.plugins.bench.peers.cublas import Cublas
from qpass.plugins.bench.peers.humming import Humming
from qpass.plugins.bench.peers.tinygemm import Tinygemm
from qpass.plugins.bench.peers.torch_compile import TorchCompile
from qpass.plugins.bench.peers.torch_int_mm import TorchIntMm
from qpass.plugins.bench.peers.torch_linear import TorchLinear
from qpass.plugins.bench.peers.torch_scaled_mm import TorchScaledMm

__all__ = ["PEERS", "Peer"]

_ALL: tuple[type[Cublas] | type[TorchPeer], ...] = (
    Cublas,
    TorchLinear,
    TorchIntMm,
    TorchScaledMm,
    Tinygemm,
    Humming,
    TorchCompile,
)
PEERS = {peer.name: peer for peer in _ALL}
"""By name, in the order of columns; made with the dtype of the activations, a key of `jobs.DTYPES`."""
