"""A machine whose GPU is made up: its facts, its answers to the trial, its memory. What it chooses, the CPU computes."""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from nanojax import xla
from nanojax.card import start
from nanojax.card.facts import Facts
from nanojax.card.questions import Answer, Outcome, answering
from nanojax.config import Config
from nanojax.ops import attention, columns, linear, rope, rows

GIB = 2**30
WANTED = {"jax-cuda12-pjrt": "==0.10.2", "nvidia-cudnn-cu12": "<10.0,>=9.8", "nvidia-cublas-cu12": ">=12.1.3.1"}
VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
VERSIONS |= {"nvidia-cudnn-cu12": "9.28.0.42", "nvidia-cublas-cu12": "12.9.3.13"}
GOOD = Facts(
    system="Linux 6.8", python="3.12.1", ram_total=64 * GIB, ram_free=48 * GIB, disk_free=500 * GIB, cache_writable=True,
    nvidia_device=True, driver_loaded=True, driver="570.86.10", driver_cuda=(12, 8), card="NVIDIA GeForce RTX 4070",
    capability=(8, 9), memory_total=12282 * 2**20, memory_free=11800 * 2**20, display=False, watts_limit=200.0,
    watts_default=200.0, versions=VERSIONS, wanted=WANTED, jax_wanted="<0.13,>=0.10.2",
)  # fmt: skip
SECONDS = {"xla": 1.0, "pallas": 0.8, "chunked": 1.0, "cudnn": 0.9, "off": 1.0, "on": 0.7}


def facts(**changes: Any) -> Facts:
    """A healthy RTX 4070, but for these."""
    return dataclasses.replace(GOOD, **changes)


def runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row kernels and cuDNN's attention, where they are chosen, are computed by XLA on the CPU."""
    for module in (rows, rope, columns, linear):
        monkeypatch.setattr(module, "implementation", lambda choice: "xla")
    monkeypatch.setattr(attention, "default_implementation", lambda choice: "chunked")


def outcome(config: Config) -> Outcome:
    """What two layers give, the same for all choices; each fast one makes it faster."""
    c = config.compute
    return Outcome(5.0, {"up": jnp.arange(64.0)}, SECONDS[c.rows] * SECONDS[c.attention] * SECONDS[c.fused])


def off(factor: float) -> Callable[[Config], Outcome]:
    """Gradients that are wrong by this factor."""
    return lambda config: outcome(config)._replace(sums={"up": jnp.arange(64.0) * factor})


def slow(config: Config) -> Outcome:
    """The right results, in twice the time of plain XLA."""
    return outcome(config)._replace(seconds=2.0)


def raises(error: BaseException) -> Callable[..., Any]:
    """A function that raises it."""

    def function(*_: Any) -> Any:
        raise error

    return function


XLA_FAILS = jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with non-zero error code 255\nmore")
NO_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes")


def asking(
    faults: dict[str, Callable[[Config], Outcome]] | None = None,
    refused: tuple[str, ...] = (),
    checks: Callable[[Config, str], Any] = lambda config, choice: (),
    asked: list[str] | None = None,
) -> Any:
    """What start.Card.asking is: the real answers of the trial's process, from this process and made-up kernels.

    Args:
      faults: by a choice's value ("pallas"), or "together" where several are fast, what the two layers do instead.
      refused: allocators that have no memory.
      asked: gets the questions.
    """

    def run(config: Config) -> Outcome:
        c = config.compute
        fast = [value for value in (c.rows, c.attention, c.fused) if value in ("pallas", "cudnn", "on")]
        keys = ["together"] if len(fast) > 1 else fast or ["plain"]
        return next((faults[key](config) for key in keys if faults and key in faults), outcome(config))

    @contextlib.contextmanager
    def context(config: Config) -> Iterator[Any]:
        def ask(question: str, allocator: str) -> Answer:
            if asked is not None:
                asked.append(f"{question} ({allocator})")
            take = raises(NO_MEMORY) if allocator in refused else lambda sizes: None
            return answering(config, run, checks, take)(question)

        yield ask

    return context


def card(asking: Any = asking(), facts: Callable[[], Facts] = facts, **changes: Any) -> start.Card:
    """A GPU with this trial and these facts, and memory enough."""
    yes = lambda: True
    return start.Card(yes, yes, facts, asking, lambda sizes: None)._replace(**changes)


def allocators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The allocators that are chosen, which this process does not take."""
    monkeypatch.delenv(xla.ALLOCATOR, raising=False)
    used: list[str] = []
    monkeypatch.setattr(xla, "use_allocator", used.append)
    return used


class NvmlError(Exception):
    """As pynvml's."""


def nvml(**changes: Any) -> Any:
    """NVIDIA's library for an RTX 4070; a change is a function, a value that its function returns, or an exception."""
    mib = 2**20
    answers: dict[str, Any] = {
        "nvmlInit": None, "nvmlSystemGetDriverVersion": "570.86.10", "nvmlSystemGetCudaDriverVersion_v2": 12080,
        "nvmlDeviceGetHandleByIndex": "handle", "nvmlDeviceGetName": b"NVIDIA GeForce RTX 4070",
        "nvmlDeviceGetCudaComputeCapability": (8, 9), "nvmlDeviceGetDisplayActive": 1,
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=12282 * mib, free=11000 * mib),
        "nvmlDeviceGetEnforcedPowerLimit": 150_000, "nvmlDeviceGetPowerManagementDefaultLimit": 200_000,
        "nvmlDeviceGetComputeRunningProcesses": [types.SimpleNamespace(pid=1, usedGpuMemory=700 * mib)],
        "nvmlDeviceGetGraphicsRunningProcesses": [], "nvmlDeviceGetPowerUsage": 30_000,
        "nvmlDeviceGetTotalEnergyConsumption": 1000,
    }  # fmt: skip
    functions = {}
    for name, value in (answers | changes).items():
        if isinstance(value, BaseException):
            functions[name] = raises(value)
        elif callable(value):
            functions[name] = value
        else:
            functions[name] = lambda *_, value=value: value
    return types.SimpleNamespace(NVMLError=NvmlError, **functions)
