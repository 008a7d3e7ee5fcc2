"""What each GPU can do, and what this machine's GPU reports: peaks, bandwidth, memory, power. Never imports jax."""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from nanojax.cli import UserError

GIB = 2**30

# -- what each GPU can do ----------------------------------------------------------------------------------------------

# Dense tensor-core operations per clock and SM (a multiply-add is two). They reproduce NVIDIA's whitepaper totals, and
# tests hold them to it: GA102 v2.0 (RTX 3090: bf16 with f32 accumulate 71, tf32 35.6, int8 284), Ada v2.02 (RTX 4090:
# bf16 165.2, fp8 with f32 accumulate 330.3, tf32 82.6, int8 660.6), RTX Blackwell v1.1 (RTX 5090: bf16 209.5, fp8 with
# f32 accumulate 419, tf32 104.8, int8 838), Hopper v1.04 (H100 SXM: bf16 989.4, fp8 and int8 1978.9, tf32 494.7).
# GeForce halves the rate of f32 accumulation, so its int8 is 4x its bf16; on Hopper it is 2x. f32 is the plain FMA rate
# (Hopper clocks it 8 % higher than its tensor cores: 66.9 in the whitepaper, 61.8 here).
_PER_CLOCK = {
    "8.6": {"bf16": 512, "int8": 2048, "fp8": 0, "tf32": 256, "f32": 256},
    "8.9": {"bf16": 512, "int8": 2048, "fp8": 1024, "tf32": 256, "f32": 256},
    "9.0": {"bf16": 4096, "int8": 8192, "fp8": 8192, "tf32": 2048, "f32": 256},
    "12.0": {"bf16": 512, "int8": 2048, "fp8": 1024, "tf32": 256, "f32": 256},
}
# Shared memory per SM, the most that one block may opt in to, threads per SM (CUDA programming guide).
_SM_LIMITS = {
    "8.6": (102400, 101376, 1536),
    "8.9": (102400, 101376, 1536),
    "9.0": (233472, 232448, 2048),
    "12.0": (102400, 101376, 1536),
}
DTYPES = ("bf16", "int8", "fp8", "tf32", "f32")


@dataclasses.dataclass(frozen=True)
class Card:
    """One model of GPU. The peaks are computed at `clock_ghz`: NVIDIA's boost clock unless noted."""

    key: str
    name: str  # as the driver reports it
    capability: str  # CUDA compute capability
    sms: int
    clock_ghz: float
    gb_per_s: float  # memory bandwidth, 10^9 bytes per second
    memory_mib: int  # as nvidia-smi reports it
    l2_mib: int
    watts: int  # the board's power limit
    reserve_gib: float  # not available to XLA's buffers: CUDA context, libraries, a desktop

    def peak(self, dtype: str) -> float:
        """Dense operations per second of matmuls on `dtype` operands; 0 if unsupported. Sums are f32, of int8 int32."""
        return self.sms * self.clock_ghz * 1e9 * _PER_CLOCK[self.capability][dtype]

    @property
    def lane_ops(self) -> float:
        """32-bit vector instructions per second: 128 lanes per SM."""
        return self.sms * self.clock_ghz * 1e9 * 128

    @property
    def bandwidth(self) -> float:
        """Bytes per second of device memory."""
        return self.gb_per_s * 1e9

    @property
    def budget_bytes(self) -> int:
        """The most that the compiled step may need: 10.5 GiB on a 12 GB desktop card, 6.8 GiB on an 8 GB laptop."""
        return int(self.memory_mib * 2**20 - self.reserve_gib * GIB)

    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto in text form: enough for its GPU compiler to compile without the card."""
        major, minor = self.capability.split(".")
        shared, optin, threads = _SM_LIMITS[self.capability]
        # The driver keeps ~2.5 % of the memory for itself (12,282 MiB are reported as 11,987 to CUDA on an RTX 4070).
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {self.sms} fpus_per_core: 128 clock_rate_ghz: {self.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_mib * 2**20}
  device_memory_size: {int(self.memory_mib * 2**20 * 0.976)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{_PALLAS[self.capability]}"
"""


# jax 0.11 and 0.12: Pallas recognises an absent GPU's capability by its name, and only by these. XLA uses the numbers.
_PALLAS = {
    "8.6": "NVIDIA A10",
    "8.9": "NVIDIA GeForce RTX 4090",
    "9.0": "NVIDIA H100",
    "12.0": "NVIDIA RTX PRO 6000",
}


# SMs, boost clock, bandwidth, L2 and power: NVIDIA's product pages and the whitepapers above. Memory: what nvidia-smi
# prints. Reserve: 1.5 GiB on a desktop card that also drives the screen, 1.2 GiB on a laptop (the integrated GPU drives
# the screen), 1.0 GiB on a server card.
CARDS: dict[str, Card] = {
    card.key: card
    for card in (
        Card("rtx3060", "NVIDIA GeForce RTX 3060", "8.6", 28, 1.777, 360, 12288, 3, 170, 1.5),
        Card("rtx3090", "NVIDIA GeForce RTX 3090", "8.6", 82, 1.695, 936, 24576, 6, 350, 1.5),
        Card("rtx4060ti_16gb", "NVIDIA GeForce RTX 4060 Ti", "8.9", 34, 2.535, 288, 16380, 32, 165, 1.5),
        Card("rtx4070", "NVIDIA GeForce RTX 4070", "8.9", 46, 2.475, 504, 12282, 36, 200, 1.494),
        # Laptop: 35-115 W, boost 1.23-2.175 GHz. 1.9 GHz is what 115 W sustain on 36 SMs under tensor load, scaled from
        # the desktop card's 200 W on 46 SMs. In a thin machine with a lower limit the days are a best case.
        Card("rtx4070_laptop", "NVIDIA GeForce RTX 4070 Laptop GPU", "8.9", 36, 1.9, 256, 8188, 32, 115, 1.196),
        Card("rtx4070_super", "NVIDIA GeForce RTX 4070 SUPER", "8.9", 56, 2.475, 504, 12282, 48, 220, 1.494),
        Card("rtx4070_ti_super", "NVIDIA GeForce RTX 4070 Ti SUPER", "8.9", 66, 2.61, 672, 16376, 48, 285, 1.5),
        Card("rtx4090", "NVIDIA GeForce RTX 4090", "8.9", 128, 2.52, 1008, 24564, 72, 450, 1.5),
        Card("rtx5070", "NVIDIA GeForce RTX 5070", "12.0", 48, 2.512, 672, 12227, 48, 250, 1.5),
        Card("rtx5090", "NVIDIA GeForce RTX 5090", "12.0", 170, 2.407, 1792, 32607, 96, 575, 1.5),
        # SXM boards; 1.83 GHz is the clock behind the whitepaper's peaks (989.4 = 132 x 4096 x 1.83 GHz).
        Card("h100", "NVIDIA H100 80GB HBM3", "9.0", 132, 1.83, 3352, 81559, 50, 700, 1.0),
        Card("h200", "NVIDIA H200", "9.0", 132, 1.83, 4800, 143771, 50, 700, 1.0),
    )
}


def find_card(name: str, option: str = "--card=") -> Card:
    """The card called `name`: rtx4070, RTX-4070, 4070 Super, the driver's name.

    UserError that begins with `option` if it is unknown.
    """
    wanted = _plain(name)
    for card in CARDS.values():
        if wanted in (re.sub(r"rtx|[^a-z0-9]", "", card.key), _plain(card.name)):
            return card
    raise UserError(
        f"{option}{name}: unknown card; known are {', '.join(CARDS)}; to add one, add a line to CARDS in {__file__}"
    )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|gpu|80gb|hbm3e?|[^a-z0-9]", "", name.lower())


def card_of_config(config_name: str) -> Card:
    """The card in a config's name (depth_hardware, or depth_2xhardware): the longest key in it, or the RTX 4070 if none."""
    tails = {key.removeprefix("rtx"): card for key, card in CARDS.items()}
    inside = [tail for tail in tails if re.search(rf"(^|_)(\d+x)?(rtx)?{tail}(_|$)", config_name)]
    return tails[max(inside, key=len)] if inside else CARDS["rtx4070"]


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the cards of a step. `gb_per_s`: 10^9 bytes per second that a card sends and receives at the same time."""

    key: str
    name: str
    gb_per_s: float
    microseconds: float  # before the first byte of an exchange arrives

    def seconds(self, size: float) -> float:
        """The time in which each card sends `size` bytes and receives as many."""
        return size / (self.gb_per_s * 1e9) + self.microseconds * 1e-6


# Assumed shares of the nominal rate: sockets 90 % of 1.25 GB/s; PCIe 4 x8 60 % of 15.75 GB/s, because GeForce cards exchange
# through the host's memory; NVLink of an H100 80 % of 450 GB/s.
LINKS = {
    link.key: link
    for link in (
        Link("10GbE", "10 Gbit Ethernet", 1.125, 100),
        Link("pcie4", "PCIe 4 x8, through the host's memory", 9.45, 30),
        Link("nvlink", "NVLink of an H100", 360, 10),
    )
}

# -- this machine's GPU ------------------------------------------------------------------------------------------------


def nvidia_driver(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA kernel driver: Linux's own, or WSL2's through /dev/dxg."""
    if (root / "proc/driver/nvidia/version").exists():
        return True
    return (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists()


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the driver reports now. Bytes, watts; joules since the driver was loaded. None: the driver does not say."""

    name: str
    memory_total: int
    memory_free: int
    watts: float | None
    watts_limit: float | None
    joules: float | None


def read_gpu(index: int | None = None) -> Reading | None:
    """The GPU's Reading; None without a driver. Asks pynvml if it is installed (0.1 ms), otherwise nvidia-smi (50 ms).

    Args:
      index: which GPU; None: the first in CUDA_VISIBLE_DEVICES, or 0.
    """
    if not nvidia_driver():
        return None
    if index is None:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        index = int(first) if first.isdigit() else 0
    return _read_nvml(index) or _read_smi(index)


def _read_nvml(index: int) -> Reading | None:
    """None for whatever goes wrong: NVML raises several types, and a damaged one returns what is no answer."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    except Exception:
        return None
    if not 0 <= free <= total or not total:
        return None

    def optional(function: str) -> float | None:  # laptops and WSL2 answer only some of these
        try:
            value = float(getattr(pynvml, function)(handle)) / 1e3
            return value if 0 <= value < math.inf else None
        except Exception:
            return None

    return Reading(
        name=name,
        memory_total=total,
        memory_free=free,
        watts=optional("nvmlDeviceGetPowerUsage"),
        watts_limit=optional("nvmlDeviceGetEnforcedPowerLimit"),
        joules=optional("nvmlDeviceGetTotalEnergyConsumption"),
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
    """A Reading from one line of nvidia-smi's CSV (MiB and watts; `[N/A]` if the card does not say); None on other text."""
    parts = [part.strip() for part in line.strip().split(",")]
    if len(parts) != len(_SMI):
        return None

    def number(text: str) -> float | None:
        try:
            value = float(text)
            return value if 0 <= value < math.inf else None
        except ValueError:
            return None

    total, free, watts, limit = (number(part) for part in parts[1:])
    if not total or free is None or free > total:
        return None
    return Reading(parts[0], int(total * 2**20), int(free * 2**20), watts, limit, None)


class PowerMeter:
    """The GPU's energy since the meter was made. Each `update` costs one `read_gpu`.

    Uses NVML's energy counter if the card has one, otherwise the trapezoidal sum of the power at each update.
    """

    def __init__(self) -> None:
        self._last, self._time = read_gpu(), time.monotonic()
        self.joules = 0.0  # since the meter was made
        self.watts: float | None = self._last.watts if self._last else None  # mean since the previous update
        self.available = self._last is not None and (self._last.joules is not None or self._last.watts is not None)

    def update(self) -> None:
        """Reads the GPU, adds to `joules` and sets `watts` (None without a GPU, or if it does not say)."""
        if self._last is None:
            return
        reading, now = read_gpu(), time.monotonic()
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
