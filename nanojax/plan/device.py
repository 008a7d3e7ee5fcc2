"""The NVIDIA GPU in this machine, seen through NVML or nvidia-smi: name, memory, power, energy. Never imports jax."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import time
from typing import Any

from nanojax import nvidia_driver


@dataclasses.dataclass(frozen=True)
class Reading:
    """One look at the GPU. Bytes; watts; `joules` counts since the driver was loaded, None where it is not counted."""

    name: str
    memory_total: int
    memory_free: int
    watts: float | None
    watts_limit: float | None
    joules: float | None


def read(index: int | None = None) -> Reading | None:
    """The GPU now, or None without a driver. Through pynvml if installed (0.1 ms), else nvidia-smi (about 50 ms).

    Args:
      index: which GPU; None = the first that CUDA_VISIBLE_DEVICES names, else 0.
    """
    if not nvidia_driver():
        return None
    if index is None:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        index = int(first) if first.isdigit() else 0
    if importlib.util.find_spec("pynvml"):
        reading = _read_nvml(index)
        if reading:
            return reading
    return _read_smi(index)


def _read_nvml(index: int) -> Reading | None:
    import pynvml  # type: ignore[import-not-found]

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return None

    def optional(function: Any) -> float | None:  # laptops and WSL2 answer only some of these
        try:
            return function(handle) / 1e3
        except pynvml.NVMLError:
            return None

    return Reading(
        name=name if isinstance(name, str) else name.decode(),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        watts=optional(pynvml.nvmlDeviceGetPowerUsage),
        watts_limit=optional(pynvml.nvmlDeviceGetEnforcedPowerLimit),
        joules=optional(pynvml.nvmlDeviceGetTotalEnergyConsumption),
    )


_SMI = ("name", "memory.total", "memory.free", "power.draw", "power.limit")


def _read_smi(index: int) -> Reading | None:
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if not program:
        return None
    command = [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_smi(done.stdout)


def parse_smi(line: str) -> Reading | None:
    """A Reading from one line of nvidia-smi's CSV (MiB and watts; `[N/A]` where the card does not say)."""
    parts = [part.strip() for part in line.strip().split(",")]
    if len(parts) != len(_SMI):
        return None

    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:
            return None

    total, free, watts, limit = (number(part) for part in parts[1:])
    if total is None or free is None:
        return None
    return Reading(parts[0], int(total * 2**20), int(free * 2**20), watts, limit, None)


class PowerMeter:
    """Energy of the GPU since it was made. `update()` at every log line; each call costs one `read`.

    NVML's own counter where there is one, else the power at each update times the time since the one before.
    """

    def __init__(self) -> None:
        self._last, self._time = read(), time.monotonic()
        self.joules = 0.0  # since the meter was made
        self.watts: float | None = self._last.watts if self._last else None  # mean since the update before
        self.available = self._last is not None and (self._last.joules is not None or self._last.watts is not None)

    def update(self) -> None:
        """Reads the GPU, adds to `joules`, sets `watts` (None where there is no GPU or it does not say)."""
        if self._last is None:
            return
        reading, now = read(), time.monotonic()
        if reading is None:
            self.watts = None
            return
        seconds = max(now - self._time, 1e-9)
        if reading.joules is not None and self._last.joules is not None and reading.joules >= self._last.joules:
            spent = reading.joules - self._last.joules
        elif reading.watts is not None:
            before = self._last.watts if self._last.watts is not None else reading.watts
            spent = (before + reading.watts) / 2 * seconds
        else:
            self.watts = None
            return
        self.joules += spent
        self.watts = spent / seconds
        self._last, self._time = reading, now
