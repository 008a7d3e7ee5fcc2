"""What the facts of a machine mean for training: one line each, ok, warning or problem, with what to do. Pure functions."""

import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from nanojax import hardware
from nanojax.card.facts import Facts
from nanojax.hardware import GIB
from nanojax.xla import CONTEXT_GIB, hides_all

Level = Literal["ok", "warning", "problem"]
# The oldest Linux driver that runs each CUDA's minor versions (NVIDIA, CUDA compatibility, table of minor versions).
OLDEST_DRIVER = {12: 525, 13: 580}
DESKTOP_GIB = 0.3  # what other programs may hold without a warning


class Line(NamedTuple):
    """One finding. A problem prevents training: on this machine's GPU if it has one."""

    level: Level
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.about}: {self.text}"


class Need(NamedTuple):
    """What a config needs, in bytes; `least` with the fewest residuals."""

    name: str
    peak: int
    least: int
    checkpoint: int


def lines(facts: Facts, need: Need | None = None) -> list[Line]:
    """Everything that the facts say; with `need`, also whether that config fits."""
    return [line for rule in RULES for line in rule(facts)] + (list(fits(facts, need)) if need else [])


def worth_telling(found: list[Line]) -> list[Line]:
    """Only warnings and problems."""
    return [line for line in found if line.level != "ok"]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def within(version: str, bounds: str) -> bool:
    """Whether 9.28.0 is within "<10.0,>=9.8". What cannot be read counts as within."""
    have = _numbers(version)
    for part in bounds.split(","):
        found = re.fullmatch(r"\s*(<=|>=|==|<|>|~=|!=)\s*([\w.*+!-]+)\s*", part)
        want = _numbers(found[2]) if found else ()
        if not found or not want or not have:
            continue
        length = max(len(have), len(want))
        a, b = (v + (0,) * (length - len(v)) for v in (have, want))
        same = a == b or (found[2].endswith("*") and have[: len(want)] == want)
        allowed = {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "~=": a >= b, "==": same, "!=": not same}
        if not allowed[found[1]]:
            return False
    return True


# -- the card ----------------------------------------------------------------------------------------------------------


def _card(f: Facts) -> Iterator[Line]:
    if not f.driver_loaded and not f.nvidia_device:
        yield Line("ok", "card", "no NVIDIA GPU; training runs on the CPU, for small models")
    elif not f.driver_loaded:
        text = (
            "an NVIDIA GPU without its driver, so training would run on the CPU; install NVIDIA's driver, then restart"
        )
        yield Line("problem", "card", text)
    elif not f.card:
        yield Line("warning", "card", "the driver does not say which GPU it has; run nvidia-smi and see what that says")
    else:
        memory = f", {_gib(f.memory_total)}" if f.memory_total else ""
        yield Line("ok", "card", f"{f.card}{memory}")
        if f.card not in {card.name for card in hardware.CARDS.values()}:
            text = "not a card that the planner knows: speeds are not modelled; a line in nanojax/hardware.py adds it"
            yield Line("warning", "card", text)
    if f.driver_loaded and hides_all(f.visible):
        yield Line("problem", "card", "CUDA_VISIBLE_DEVICES hides every GPU; unset it")
    elif f.visible and f.driver_loaded and not f.card and f.nvml_error:
        text = f"CUDA_VISIBLE_DEVICES={f.visible} may name no GPU of this machine; nvidia-smi -L lists them"
        yield Line("problem", "card", text)


def _nvml(f: Facts) -> Iterator[Line]:
    if not f.nvml_error:
        return
    if "mismatch" in f.nvml_error.lower():
        text = f"{f.nvml_error}: the driver was updated while it ran, and CUDA will not start; restart the machine"
        yield Line("problem", "driver", text)
    else:
        text = f"NVML does not answer ({f.nvml_error}); power and energy will be missing; does nvidia-smi work?"
        yield Line("warning", "driver", text)


def _driver(f: Facts) -> Iterator[Line]:
    if not f.driver_loaded:
        return
    major = _numbers(f.driver)[:1]
    if not major:
        yield Line("warning", "driver", "its version is not known; nvidia-smi shows it; jax needs 525 for CUDA 12")
        return
    for plugin in f.plugins:
        cuda = 13 if "cuda13" in plugin else 12
        if major[0] < OLDEST_DRIVER[cuda]:
            text = f"{f.driver} is too old for {plugin}, which needs {OLDEST_DRIVER[cuda]}; update the driver"
            if cuda == 13 and major[0] >= OLDEST_DRIVER[12]:
                text += ", or install nanojax[cuda12]"
            yield Line("problem", "driver", text)
            return
    cuda_text = f", CUDA up to {f.driver_cuda[0]}.{f.driver_cuda[1]}" if f.driver_cuda else ""
    yield Line("ok", "driver", f"{f.driver}{cuda_text}")


def _capability(f: Facts) -> Iterator[Line]:
    if f.capability is None:
        return
    text = f"{f.capability[0]}.{f.capability[1]}"
    least = (7, 5) if f.plugins == ["jax-cuda13-plugin"] else (5, 2)
    if f.capability < least:
        advice = f"jax's builds for its CUDA need {least[0]}.{least[1]}; train on the CPU or another card"
        yield Line("problem", "capability", f"{text}: {advice}")
    elif f.capability < (8, 0):
        advice = "no bf16 tensor cores and no flash attention: bf16 and int8 configs will be slow"
        yield Line("warning", "capability", f"{text}: {advice}")
    elif f.capability >= (10, 0):
        advice = "first compiles take long, since XLA's autotuner knows these cards less; they are kept"
        yield Line("warning", "capability", f"{text}: {advice}")
    else:
        yield Line("ok", "capability", f"{text}: bf16, int8 and flash attention")


def _memory(f: Facts) -> Iterator[Line]:
    if f.memory_free is not None and f.memory_total:
        text = f"{_gib(f.memory_free)} of {_gib(f.memory_total)} free"
        if f.memory_free < f.memory_total / 2:
            yield Line("warning", "memory", f"only {text}; close the programs that use the GPU")
        else:
            yield Line("ok", "memory", text)
    if f.display:
        text = (
            "a display is attached, whose desktop takes 0.3 to 1 GiB; a text console (on Linux with systemd: sudo systemctl "
            "isolate multi-user.target) or another GPU for it frees that"
        )
        yield Line("ok", "display", text)


def _others(f: Facts) -> Iterator[Line]:
    if not f.others:
        return
    known = [size for _, size in f.others if size]
    names = ", ".join(sorted({f"{name} {_gib(size)}" if size else name for name, size in f.others})[:6])
    if sum(known) > DESKTOP_GIB * GIB:
        yield Line("warning", "processes", f"{names} on this card; close what you can: they take its memory and time")
    else:
        yield Line("ok", "processes", f"{names} on this card")


def _power(f: Facts) -> Iterator[Line]:
    if not f.watts_limit or not f.watts_default:
        return
    if f.watts_limit < 0.97 * f.watts_default:
        raised = f"sudo nvidia-smi -pl {f.watts_default:.0f}"
        text = f"limited to {f.watts_limit:.0f} W of {f.watts_default:.0f}, so slower than planned; {raised} lifts it"
        yield Line("warning", "power", text)
    else:
        yield Line("ok", "power", f"limit {f.watts_limit:.0f} W")


# -- software ----------------------------------------------------------------------------------------------------------


def _jax(f: Facts) -> Iterator[Line]:
    jax, jaxlib = f.version("jax"), f.version("jaxlib")
    if not jax or not jaxlib:
        yield Line("problem", "jax", "not installed; pip install -e .")
        return
    if not within(jax, f.jax_wanted):
        yield Line("problem", "jax", f"{jax}, but nanojax needs {f.jax_wanted}; pip install -e . again")
    else:
        yield Line("ok", "jax", f"{jax}, Python {f.python}")


def _plugin(f: Facts) -> Iterator[Line]:
    if not f.driver_loaded:
        return
    if not f.plugins:
        text = "has no CUDA plugin, so training would run on the CPU; pip install -e '.[cuda12]'"
        yield Line("problem", "jax", text)
    if len(f.plugins) > 1:
        yield Line("warning", "jax", f"{' and '.join(f.plugins)} are both installed; pip uninstall one of them")
    for name in f.plugins:
        if f.version("jaxlib") and f.version(name) != f.version("jaxlib"):
            text = (
                f"{name} {f.version(name)} does not fit jaxlib {f.version('jaxlib')}; pip install -e '.[cuda12]' again"
            )
            yield Line("problem", "jax", text)
    if f.jax_platforms and not {"cuda", "gpu"} & set(f.jax_platforms.split(",")):
        yield Line("warning", "jax", f"JAX_PLATFORMS={f.jax_platforms} keeps it off the GPU; unset it to train there")


def _libraries(f: Facts) -> Iterator[Line]:
    if not f.driver_loaded or not f.plugins:
        return
    outside = [f"{name} {f.version(name)} (wanted {bounds})" for name, bounds in f.wanted.items()
               if f.version(name) and not within(f.version(name), bounds)]  # fmt: skip
    if outside:
        text = f"{', '.join(outside)}; pip install -e '.[cuda12]' again"
        yield Line("problem", "CUDA libraries", text)
    missing = [n for n in f.wanted if n.startswith("nvidia-") and not f.version(n)]
    if missing:
        some = ", ".join(missing[:4]) + (" and others" if len(missing) > 4 else "")
        text = f"{some} not installed, so jax takes the system's, of any version; pip install -e '.[cuda12]'"
        yield Line("warning", "CUDA libraries", text)
    if not outside and not missing:
        cudnn = next((f.version(n) for n in f.wanted if "cudnn" in n), "")
        yield Line("ok", "CUDA libraries", f"as the plugin wants them{f', cuDNN {cudnn}' if cudnn else ''}")


def _conflicts(f: Facts) -> Iterator[Line]:
    if f.library_path:
        some = ", ".join(f.library_path[:4])
        if f.driver_loaded:
            text = f"puts {some} before jax's own, which other versions of it may break; unset LD_LIBRARY_PATH"
            yield Line("warning", "LD_LIBRARY_PATH", text)
        else:
            yield Line("ok", "LD_LIBRARY_PATH", f"has {some}, which training on the CPU does not load")
    if f.system_libraries and f.driver_loaded:
        text = (
            f"{len(f.system_libraries)} in the system's folders; jax takes its own as long as LD_LIBRARY_PATH is unset"
        )
        yield Line("ok", "system CUDA", text)
    for other in ("torch", "tensorflow"):
        version = f.version(other)
        if version and "+cpu" not in version and f.driver_loaded:
            text = f"{version} is in this environment and pins CUDA libraries of its own; give it another environment"
            yield Line("warning", other, text)


def _wsl(f: Facts) -> Iterator[Line]:
    if not f.wsl2:
        return
    jax = _numbers(f.version("jax"))
    if f.nvidia_device and jax >= (0, 11) and f.allocator != "cuda_async":
        text = (
            "jax from 0.11 on may fail to allocate 4 GiB at once here; the first start tries it and takes cuda_async "
            "where it must; XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async does so at once"
        )
        yield Line("warning", "WSL2", text)
    else:
        yield Line("ok", "WSL2", "its RAM is half of Windows' unless .wslconfig says more")


def _started(f: Facts) -> Iterator[Line]:
    if f.jax_error:
        advice = "run nvidia-smi; restart the machine if that fails too"
        if "XLA_FLAGS" in f.jax_error:
            advice = "unset XLA_FLAGS, or mend what it says"
        elif "unknown backend" in f.jax_error.lower():
            advice = f"JAX_PLATFORMS={f.jax_platforms} names no device that jax knows; unset it"
        elif f.wsl2:
            advice = "in Windows run: wsl --shutdown, then try again; update Windows' driver if it stays"
        elif not f.driver_loaded and {"cuda", "gpu"} & set(f.jax_platforms.split(",")):
            advice = f"JAX_PLATFORMS={f.jax_platforms}, but there is no NVIDIA GPU with a driver here; unset it"
        elif not f.driver_loaded:
            advice = "pip install -e . again"
        yield Line("problem", "start", f"jax does not start ({f.jax_error}); {advice}")
    elif f.jax_device:
        wanted = f.driver_loaded and f.plugins and "cpu" not in f.jax_platforms
        level: Level = "problem" if wanted and f.jax_device == "cpu" else "ok"
        advice = " although there is a GPU; python -c 'import jax; jax.devices(\"cuda\")' shows why" * (level != "ok")
        yield Line(level, "start", f"jax computes on {f.jax_device}{advice}")


# -- the machine -------------------------------------------------------------------------------------------------------


def _machine(f: Facts) -> Iterator[Line]:
    if f.ram_total and f.ram_free is not None:
        low = f.ram_free < 2 * GIB
        text = f"{_gib(f.ram_free)} of {_gib(f.ram_total)} free"
        yield Line("warning" if low else "ok", "RAM", f"{text}; close other programs" if low else text)
    if f.disk_free is not None:
        level: Level = "problem" if f.disk_free < 2**28 else "warning" if f.disk_free < 5 * GIB else "ok"
        text = f"{_gib(f.disk_free)} free where runs are written"
        yield Line(level, "disk", text if level == "ok" else f"only {text}; checkpoints need more: free space")
    if f.disk_files is not None and f.disk_files < 10_000:
        yield Line(
            "warning", "disk", f"room for only {f.disk_files} more files; a checkpoint has hundreds: remove some"
        )
    if f.cache_writable is False:
        text = "the user's cache folder cannot be written: every start compiles again; set XDG_CACHE_HOME"
        yield Line("warning", "cache", text)


def fits(f: Facts, need: Need) -> Iterator[Line]:
    """Whether the config's memory, checkpoints and their copy in RAM fit."""
    if f.memory_free is None:
        text = f"{need.name} needs {_gib(need.peak)} on a card; how much is free on one here is not known"
        yield Line("ok", "fits", text)
    else:
        free = f.memory_free - CONTEXT_GIB * GIB
        text = f"{need.name} needs {_gib(need.peak)} on the card, {_gib(max(0, free))} are free for it"
        if need.peak <= free:
            yield Line("ok", "fits", text)
        elif need.least <= free:
            text += f"; it would train with fewer residuals ({_gib(need.least)}), slower: close other programs"
            yield Line("warning", "fits", text)
        else:
            text += f"; python -m nanojax.plan --config={need.name} tries what fits"
            yield Line("problem", "fits", text)
    if f.disk_free is not None and f.disk_free < 3 * need.checkpoint:
        level: Level = "problem" if f.disk_free < need.checkpoint else "warning"
        text = (
            f"{_gib(f.disk_free)} free; {need.name} keeps two checkpoints of {_gib(need.checkpoint)} and writes a third"
        )
        yield Line(level, "disk", f"{text}: free space, or choose --train.run on another disk")
    elif f.disk_free is not None:
        text = f"{_gib(f.disk_free)} free for checkpoints of {need.name}, of {_gib(need.checkpoint)} each"
        yield Line("ok", "disk", text)
    if f.ram_free is not None and f.ram_free < need.checkpoint + GIB:
        text = f"a save of {need.name} copies {_gib(need.checkpoint)} to RAM, {_gib(f.ram_free)} are free"
        text += "; give WSL2 more in .wslconfig" if f.wsl2 else "; close other programs"
        yield Line("warning", "RAM", text)
    elif f.ram_free is not None:
        yield Line("ok", "RAM", f"{_gib(f.ram_free)} free, enough for a save of {need.name}")


RULES: tuple[Callable[[Facts], Iterator[Line]], ...] = (
    _card, _nvml, _driver, _capability, _memory, _others, _power, _jax, _plugin, _libraries, _conflicts, _wsl, _started,
    _machine,
)  # fmt: skip
