"""The GPU that is measured on, and the clocks that it runs at, by nvidia-smi."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from shutil import which

from qpass import gpu

_CLOCKS = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw")
#: What holds the clock down: its newer name, its older one, and for drivers that know neither.
_HELD = (("clocks_event_reasons.active",), ("clocks_throttle_reasons.active",), ())
IDLE, SETTING = "idle", "applications clocks setting"
#: NVML's bits of it, from the lowest.
_REASONS = (
    IDLE,
    SETTING,
    "software power cap",
    "hardware slowdown",
    "sync boost",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "hardware power brake",
    "display clock setting",
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
    """SM clock and the highest there is in MHz, °C and W at a moment, and what holds the clock down; None: not told."""

    sm: float | None
    max_sm: float | None
    temperature: float | None
    power: float | None
    held_by: tuple[str, ...] | None

    @property
    def locked(self) -> bool | None:
        """Whether a setting such as `nvidia-smi --lock-gpu-clocks` holds the clock down."""
        return SETTING in self.held_by if self.held_by is not None else None

    @property
    def throttled(self) -> tuple[str, ...]:
        """What holds the clock down but having nothing to do."""
        return tuple(reason for reason in self.held_by or () if reason != IDLE)

    @classmethod
    def now(cls) -> Clocks | None:
        """Of a GPU that is at work; an idle one has other clocks. None where nvidia-smi tells nothing."""
        for held in _HELD:
            if said := _query(*_CLOCKS, *held):
                sm, highest, temperature, power = map(_number, said[: len(_CLOCKS)])
                return cls(sm, highest, temperature, power, _reasons(said[-1]) if held else None)
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


def _reasons(text: str) -> tuple[str, ...] | None:
    """The names of a mask such as 0x0000000000000004; bits that are new keep their number."""
    try:
        mask = int(text, 16)
    except ValueError:  # [N/A]
        return None
    names = dict(enumerate(_REASONS))
    return tuple(names.get(bit, f"reason {1 << bit:#x}") for bit in range(mask.bit_length()) if mask >> bit & 1)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None
