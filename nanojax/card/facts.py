"""What this machine says of its GPU, its libraries and itself, as plain data. Nothing here judges, raises or imports jax."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanojax import hardware, xla

PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
CUDA_LIBRARIES = ("libcudnn", "libcublas", "libcudart", "libcusparse", "libcusolver", "libcufft", "libcupti")
PROBE_SECONDS = 120.0
PROBE = """import json, nanojax, jax
float(jax.numpy.ones(8).sum())
print(json.dumps([jax.devices()[0].platform, jax.devices()[0].device_kind]))"""


@dataclasses.dataclass(frozen=True)
class Facts:
    """None, or empty: not known. Bytes, watts. No name of a user or host and no path is in it, so it may be sent around."""

    system: str = ""
    python: str = ""
    wsl2: bool = False
    ram_total: int | None = None
    ram_free: int | None = None
    disk_free: int | None = None
    disk_files: int | None = None  # free i-nodes
    cache_writable: bool | None = None
    # the card
    nvidia_device: bool = False  # one is on the bus, with or without a driver
    driver_loaded: bool = False
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA that the driver supports
    nvml_error: str = ""
    card: str = ""
    capability: tuple[int, int] | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    display: bool | None = None
    watts_limit: float | None = None
    watts_default: float | None = None
    others: tuple[tuple[str, int | None], ...] = ()  # (program, bytes) of other processes on the card
    # software
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of installed packages
    wanted: dict[str, str] = dataclasses.field(default_factory=dict)  # package -> versions that the jax plugin asks for
    jax_wanted: str = ""  # by nanojax
    jax_platforms: str = ""
    allocator: str = ""
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    library_path: tuple[str, ...] = ()  # CUDA libraries that LD_LIBRARY_PATH puts before jax's own
    system_libraries: tuple[str, ...] = ()  # those in the system's own folders
    jax_device: str | None = None  # what jax computes on; None: not asked
    jax_error: str = ""

    def version(self, package: str) -> str:
        """Of an installed package; "" if it is not there."""
        return self.versions.get(package, "")

    @property
    def plugins(self) -> list[str]:
        """jax's installed CUDA plugins."""
        return [name for name in PLUGINS if self.version(name)]


def gather(
    environ: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    folder: Path = Path("."),
    nvml: Callable[[], Any] = lambda: importlib.import_module("pynvml"),
    smi: Callable[[str], str] = lambda fields: ask_smi(fields),
    packages: Callable[[], Mapping[str, str]] = lambda: installed(),
    requirements: Callable[[str], list[str]] = lambda name: importlib.metadata.requires(name) or [],
    probe: Callable[[], tuple[str, str]] | None = None,
) -> Facts:
    """The Facts of this machine. What cannot be read is missing; every argument is a source that a test may replace.

    Args:
      folder: where runs will be written.
      nvml: imports NVIDIA's management library for Python.
      smi: nvidia-smi's line of CSV for comma-separated fields.
      probe: (the device that jax finds, the error); None: jax is not asked.
    """
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    found["wsl2"] = bool(_try(lambda: "microsoft" in (root / "proc/version").read_text().lower(), False))
    found |= _memory(root) | _disk(folder)
    found["cache_writable"] = _try(xla.cache_usable)
    found["driver_loaded"] = hardware.nvidia_driver(root)
    found["nvidia_device"] = found["driver_loaded"] or bool(_try(lambda: _on_the_bus(root), False))
    if found["driver_loaded"]:
        found |= _from_nvml(nvml, environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip())
        if not found.get("card") or not found.get("driver"):
            found |= {k: v for k, v in (_try(lambda: _from_smi(smi)) or {}).items() if not found.get(k)}
    versions = dict(_try(packages) or {})
    found["versions"] = versions
    wanted = {}
    for name in PLUGINS:
        if name in versions:
            wanted |= _try(lambda name=name: required(requirements(name))) or {}
    found["wanted"] = wanted
    found["jax_wanted"] = (_try(lambda: required(requirements("nanojax"))) or {}).get("jax", "")
    found["jax_platforms"] = environ.get("JAX_PLATFORMS", "")
    found["allocator"] = environ.get(xla.ALLOCATOR, "")
    found["visible"] = environ.get("CUDA_VISIBLE_DEVICES")
    search = [Path(part) for part in environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    found["library_path"] = _libraries([path for path in search if "wsl" not in path.parts])
    ours = ("usr/local/cuda/lib64", "usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib/aarch64-linux-gnu")
    found["system_libraries"] = _libraries([root / part for part in ours])
    if probe:
        found["jax_device"], found["jax_error"] = _try(probe) or ("", "jax could not be asked")
    return Facts(**found)


def as_json(facts: Facts) -> dict[str, Any]:
    """The facts for a bug report; unknown ones are left out."""
    plain = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    return {name: value for name, value in plain.items() if value not in (None, "", (), {})}


def _try(read: Callable[[], Any], otherwise: Any = None) -> Any:
    """What `read` returns; `otherwise` if it raises anything: drivers and damaged installations raise what they like."""
    try:
        return read()
    except Exception:
        return otherwise


def _number(value: Any) -> int | None:
    """A count of bytes that may be believed, or None."""
    return int(value) if isinstance(value, int | float) and 0 < value < 2**62 else None


def _watts(value: Any) -> float | None:
    """A power that may be believed, or None."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e5 else None


# -- the machine -------------------------------------------------------------------------------------------------------


def _memory(root: Path) -> dict[str, int | None]:
    text = _try(lambda: (root / "proc/meminfo").read_text(), "")
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    size = lambda name: kib[name] * 1024 if name in kib else None
    return {"ram_total": size("MemTotal"), "ram_free": size("MemAvailable")}


def _disk(folder: Path) -> dict[str, int | None]:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = _try(lambda: shutil.disk_usage(folder).free)
    counts = _try(lambda: os.statvfs(folder))
    return {"disk_free": free, "disk_files": counts.f_favail if counts and counts.f_files else None}


def _on_the_bus(root: Path) -> bool:
    """Whether a display controller of NVIDIA's is on the PCI bus."""
    for device in (root / "sys/bus/pci/devices").iterdir():
        if (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03"):
            return True
    return False


def _libraries(folders: list[Path]) -> tuple[str, ...]:
    """Names of the CUDA libraries in `folders`, without the folders."""
    names: set[str] = set()
    for folder in folders:
        for library in CUDA_LIBRARIES:
            names |= set(_try(lambda f=folder, x=library: [p.name for p in f.glob(f"{x}.so*")], []))
    return tuple(sorted(names))


# -- the card ----------------------------------------------------------------------------------------------------------


def _from_nvml(nvml: Callable[[], Any], which: str) -> dict[str, Any]:
    """What NVML answers; each question by itself, because laptops, WSL2 and old drivers answer only some.

    which: of the GPUs, as CUDA_VISIBLE_DEVICES names it: a number, or the beginning of a UUID; otherwise the first.
    """
    try:
        n = nvml()
        n.nvmlInit()
    except ImportError:
        return {}  # its module is optional
    except Exception as error:
        return {"nvml_error": _one_line(error)}
    out: dict[str, Any] = {"driver": _try(lambda: _text(n.nvmlSystemGetDriverVersion()), "")}
    cuda = _try(lambda: int(n.nvmlSystemGetCudaDriverVersion_v2()))
    out["driver_cuda"] = (cuda // 1000, cuda % 1000 // 10) if cuda and 1000 < cuda < 10**6 else None
    try:
        handle = _handle(n, which)
        out["card"] = _text(n.nvmlDeviceGetName(handle))
    except Exception as error:
        return out | {"nvml_error": _one_line(error)}
    out["capability"] = _try(lambda: tuple(int(v) for v in n.nvmlDeviceGetCudaComputeCapability(handle)))
    memory = _try(lambda: n.nvmlDeviceGetMemoryInfo(handle))
    out["memory_total"] = _number(getattr(memory, "total", None))
    out["memory_free"] = _number(getattr(memory, "free", None))
    out["display"] = _try(lambda: bool(n.nvmlDeviceGetDisplayActive(handle)))
    watts = lambda function: _watts(_try(lambda: float(function(handle)) / 1e3))
    out["watts_limit"] = watts(lambda h: n.nvmlDeviceGetEnforcedPowerLimit(h))
    out["watts_default"] = watts(lambda h: n.nvmlDeviceGetPowerManagementDefaultLimit(h))
    processes: dict[int, tuple[str, int | None]] = {}
    for ask in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for p in _try(lambda ask=ask: list(getattr(n, ask)(handle)), []):
            pid = getattr(p, "pid", 0)
            if pid != os.getpid():
                processes[pid] = (_program(pid), _number(getattr(p, "usedGpuMemory", None)))
    out["others"] = tuple(processes.values())
    return out


def _handle(n: Any, which: str) -> Any:
    if which.startswith("GPU-"):
        for i in range(int(n.nvmlDeviceGetCount())):
            handle = n.nvmlDeviceGetHandleByIndex(i)
            if _text(n.nvmlDeviceGetUUID(handle)).startswith(which):
                return handle
        raise LookupError(f"no GPU is named {which}")
    return n.nvmlDeviceGetHandleByIndex(int(which) if which.isdigit() else 0)


def _text(value: Any) -> str:
    """What may be shown of a name: one line of printable characters."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:100]


def _program(pid: int) -> str:
    name = _try(lambda: _text(Path(f"/proc/{int(pid)}/comm").read_text()), "")
    return name or "a program"


SMI = ("driver_version", "name", "memory.total", "memory.free", "power.limit", "power.default_limit", "compute_cap")


def ask_smi(fields: str) -> str:
    """nvidia-smi's first line of CSV for these fields."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib") or "nvidia-smi"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]


def _from_smi(smi: Callable[[str], str]) -> dict[str, Any]:
    cells = [cell.strip() for cell in smi(",".join(SMI)).split(",")]
    if len(cells) != len(SMI):
        return {}
    driver, name, *numbers, capability = cells
    total, free, limit, default = (_try(lambda x=x: float(x)) for x in numbers)
    mib = lambda value: _number(value * 2**20) if value is not None else None
    major, _, minor = capability.partition(".")
    out = {"driver": driver, "card": name, "memory_total": mib(total), "memory_free": mib(free)}
    out |= {"watts_limit": _watts(limit), "watts_default": _watts(default)}
    return out | {"capability": (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None}


# -- software ----------------------------------------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """Versions of the packages that matter here."""
    kept = re.compile(r"jax|jaxlib|jax-cuda1[23]-(plugin|pjrt)|nvidia-.*|torch|tensorflow|nanojax|flax|optax|numpy")
    names = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {name: version for name, version in sorted(names.items()) if kept.fullmatch(name)}


def required(requirements: list[str]) -> dict[str, str]:
    """package -> version bounds, of requirements as package metadata has them; those of other extras than CUDA's left out."""
    out = {}
    for text in requirements:
        requirement, _, marker = text.partition(";")
        found = re.match(r"\s*([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^()]*)\)?", requirement)
        if found and ("extra" not in marker or "with-cuda" in marker):
            out[found[1]] = found[2].strip()
    return out


NOTICE = re.compile(r"-+$|For simplicity, JAX has removed its internal frames")  # what jax writes behind an error


def ask_jax(seconds: float = PROBE_SECONDS) -> tuple[str, str]:
    """(the device that a new process's jax computes on, the error if it finds none); a crash or a hang is an error."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return "", f"jax did not answer for {seconds:.0f} s"
    if done.returncode < 0:
        return "", f"jax's process was killed by signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip() and not NOTICE.match(line)]
    if done.returncode:
        return "", scrubbed(lines[-1])[:200] if lines else f"exit code {done.returncode}"
    platform_name, kind = json.loads(done.stdout.splitlines()[-1])
    return (kind if platform_name in ("gpu", "cuda") else platform_name), ""


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return scrubbed(lines[0])[:200] if lines else type(error).__name__


def scrubbed(text: str) -> str:
    """`text` without this user, this host and folders: an absolute path becomes its last part."""
    text = re.sub(r"(?<![\w.])(?:~|/)[^\s'\"`:,;()]*/([^\s/'\"`:,;()]+)", r"\1", text)
    for private in (platform.node(), os.environ.get("USER", ""), os.environ.get("LOGNAME", "")):
        if len(private) > 2 and private not in ("root", "user"):
            text = re.sub(rf"(?<!\w){re.escape(private)}(?!\w)", "…", text)
    return text
