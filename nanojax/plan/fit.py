"""Makes the planned bytes really there before training: XLA's share of the GPU, one memory line, a refusal in time."""

import os
from typing import Any

from nanojax.config import Config, UserError
from nanojax.plan import device
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


def check(compiled: Any, config: Config, limit_bytes: int | None) -> str:
    """The memory line of a compiled step. UserError, before any state exists, if it needs more than XLA's pool.

    Args:
      compiled: `jax.jit(train_step, donate_argnums=0).lower(...).compile()`.
      limit_bytes: the pool, `jax.devices()[0].memory_stats()["bytes_limit"]`; None = no limit known (CPU).
    """
    m = compiled.memory_analysis()
    state = m.alias_size_in_bytes
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
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
