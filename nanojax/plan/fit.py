"""Makes a run fit the GPU it finds: XLA's share of the memory, the best residuals, one memory line, a refusal in time."""

import dataclasses
import os
from typing import Any

from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.plan import cards, compile, device, planner
from nanojax.plan.memory import GIB

# CUDA's context, cuBLAS and cuDNN handles and the loaded kernels lie outside XLA's pool (jax-stack notes: 0.5-1 GB with
# a desktop, and the desktop's own part is already missing from the free memory that the driver reports).
CONTEXT_GIB = 0.7
# jax refuses both names at once; the second is the old one.
FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def pool_fraction(reading: device.Reading) -> float:
    """Share of the GPU's memory to give to XLA: all that is free now but the context, from 0.1 to 0.97."""
    share = (reading.memory_free - CONTEXT_GIB * GIB) / reading.memory_total
    return max(0.1, min(0.97, int(share * 100) / 100))


def set_allocator() -> str | None:
    """Before jax touches the GPU: gives XLA all free memory, so that the planned bytes are there. Returns what it did.

    None without an NVIDIA GPU. A share that the user set through jax's own variables is kept.
    """
    reading = device.read()
    if reading is None:
        return None
    total = reading.memory_total / GIB
    for name in FRACTION_NAMES:
        if name in os.environ:
            return f"XLA may use {os.environ[name]} of {reading.name}'s {total:.1f} GiB ({name}, as set)"
    share = pool_fraction(reading)
    os.environ[FRACTION_NAMES[0]] = f"{share:.2f}"
    return (
        f"XLA may use {share * total:.1f} of {reading.name}'s {total:.1f} GiB "
        f"({reading.memory_free / GIB:.1f} are free; {FRACTION_NAMES[0]}={share:.2f})"
    )


def best_residuals(config: Config, limit_bytes: int | None, say: planner.Say) -> str:
    """What compute.residuals=auto becomes here: the fastest choice, as modelled, whose step fits `limit_bytes`.

    UserError, in one line, without an NVIDIA GPU, without XLA's CUDA compiler, for an unknown GPU, or if none fits.

    Args:
      limit_bytes: XLA's pool; None = what the planner leaves to XLA on this card.
      say: told what is being compiled.
    """
    reading = device.read()
    reason = compile.plugin_missing()
    if reading is None:
        reason = "there is no NVIDIA GPU here to fit"
    if reading is None or reason:
        raise UserError(f"--compute.residuals=auto: {reason}; or choose inputs, cheap or all")
    known = [card for card in cards.CARDS.values() if card.name == reading.name]
    if not known:
        raise UserError(
            f"--compute.residuals=auto: {reading.name} is not in {cards.__file__}; add it, or choose inputs, cheap or all"
        )
    card = known[0]
    if limit_bytes is not None:
        card = dataclasses.replace(card, reserve_gib=card.memory_mib / 1024 - limit_bytes / GIB)
    return planner.best_residuals(config, card, say=say)


def pool_bytes() -> int | None:
    """Bytes that XLA may use on jax's default device; None where there is no limit (CPU). Starts the device."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_bytes(compiled: Any) -> int:
    """XLA's argument + output - alias + temp of a compiled step."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def check(compiled: Any, config: Config, limit_bytes: int | None) -> str:
    """The memory line of a compiled step. UserError, before any state exists, if it needs more than XLA's pool.

    Args:
      compiled: `jax.jit(train_step, donate_argnums=0).lower(...).compile()`.
      limit_bytes: `pool_bytes()`.
    """
    state, peak = compiled.memory_analysis().alias_size_in_bytes, peak_bytes(compiled)
    line = f"memory: state {state / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB"
    if limit_bytes is None:
        return line
    if peak > limit_bytes:
        raise UserError(
            f"{config.name or 'this config'} needs {peak / GIB:.2f} GiB on the GPU, XLA has {limit_bytes / GIB:.2f}; "
            "close what else uses the GPU, lower train.microbatch, or choose --compute.residuals=inputs; "
            f"python -m nanojax.plan --config={config.name or 'NAME'} tries what fits"
        )
    return f"{line} of XLA's {limit_bytes / GIB:.2f}"
