"""The GPU that is measured on, and the clocks that it runs at, by nvidia-smi."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from shutil import which

from qpass import gpu

_CLOCKS = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw")
#: Whether a setting holds the clock down: its newer name, its older one, and for drivers that know neither.
_HELD = (
    ("clocks_event_reasons.applications_clocks_setting",),
    ("clocks_throttle_reasons.applications_clocks_setting",),
    (),
)


@dataclass(frozen=True)
class Machine:
    """A GPU and its driver: `driver` is "unknown" without nvidia-smi, `cuda` is the newest that it knows."""

    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    driver: str
    cuda: str

    @classmethod
    def here(cls) -> Machine:
        device, version = gpu.device(), int(gpu.driver().get_driver_version())
        return cls(
            device.name(),
            gpu.capability(),
            int(device.multiprocessor_count),
            int(device.total_memory()),
            gpu.l2_bytes(),
            (_query("driver_version") or ["unknown"])[0],
            f"{version // 1000}.{version % 1000 // 10}",
        )


@dataclass(frozen=True)
class Clocks:
    """SM clock and the highest there is in MHz, °C and W at a moment; None for what is not told.

    `locked`: a setting such as `nvidia-smi --lock-gpu-clocks` holds the clock down.
    """

    sm: float | None
    max_sm: float | None
    temperature: float | None
    power: float | None
    locked: bool | None

    @classmethod
    def now(cls) -> Clocks | None:
        """Of a GPU that is at work; an idle one has other clocks. None where nvidia-smi tells nothing."""
        for held in _HELD:
            if said := _query(*_CLOCKS, *held):
                state = said[len(_CLOCKS)] if held else ""
                sm, highest, temperature, power = map(_number, said[: len(_CLOCKS)])
                return cls(sm, highest, temperature, power, {"Active": True, "Not Active": False}.get(state))
        return None

    def __str__(self) -> str:
        told = zip((self.sm, self.max_sm, self.temperature, self.power), ("MHz", "MHz at most", "°C", "W"), strict=True)
        return ", ".join(f"{value:.0f} {unit}" for value, unit in told if value is not None) or "not told"


def _query(*fields: str) -> Sequence[str] | None:
    """What nvidia-smi says of the GPU that is used; None where it says nothing, or does not know a field."""
    smi = which("nvidia-smi")
    if smi is None:
        return None
    command = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", gpu.device().pci_bus_id()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = [word.strip() for word in done.stdout.strip().split(",")]
    return said if not done.returncode and len(said) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None
