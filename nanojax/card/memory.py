"""The memory that a run will need, tried before it starts: allocated and freed. Where it is not there, fewer residuals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import config as configs
from nanojax import step as steps
from nanojax import xla
from nanojax.card.advice import Need
from nanojax.cli import UserError, first_line
from nanojax.config import Config
from nanojax.hardware import GIB
from nanojax.plan import planner

SLACK = (
    GIB // 4
)  # temporaries beside the residuals, before the step is compiled: 0.1 to 0.2 GiB in the plans of configs/
Take = Callable[[Sequence[int]], None]


def planned(config: Config) -> list[int]:
    """Bytes of the buffers that a run holds at once, before its step is compiled: the state's arrays, then temporaries.

    Of several devices' state what one of them would hold: no device holds more.
    """
    if config.compute.residuals == "auto":
        config = configs.override(config, {"compute.residuals": "inputs"})
    state = [_bytes(leaf) for leaf in jax.tree.leaves(steps.abstract_state(config))]
    logits = min(config.compute.loss_chunk, config.train.microbatch * config.row) * config.model.V * 4
    within = steps.accumulator_bytes(config) if config.several else 0
    return [*state, within + steps.residual_bytes(config) + steps.operand_bytes(config) + max(SLACK, logits)]


def compiled(config: Config, train_step: Any) -> list[int]:
    """The same of the compiled step."""
    state = [_bytes(leaf) for leaf in jax.tree.leaves(steps.abstract_state(config))]
    return [*state, max(0, xla.peak_bytes(train_step) - sum(state))]


def need(config: Config) -> Need:
    """What the doctor compares with the card, the disk and RAM."""
    state = steps.abstract_state(config)
    saved = sum(map(_bytes, jax.tree.leaves((state.params, state.opt))))
    least = configs.override(config, {"compute.residuals": "inputs"})
    return Need(config.name, sum(planned(config)), sum(planned(least)), saved)


def take(sizes: Sequence[int]) -> None:
    """Allocates buffers of these bytes on the default device, all at once, touches them, and frees them.

    Raises what jax raises where the memory is not there.
    """
    held: list[jax.Array] = []
    try:
        held.extend(jnp.zeros(max(1, size), jnp.uint8) for size in sizes)
        jax.block_until_ready(held)
    finally:
        for array in held:
            array.delete()


def fitting(
    config: Config,
    build: Callable[[Config], Any],
    take: Take | None,
    may_lower: bool,
    say: Callable[[str], None],
) -> tuple[Config, Any, str]:
    """(config, its compiled step, a line on its memory): with the config's residuals, or the most below them that fit.

    Args:
      build: compiles the step.
      take: tries the memory; None: only compares the compiled peak with XLA's limit, as on a CPU.
      may_lower: whether fewer residuals may be taken; False where they were set by hand.
      say: told each change.

    Raises UserError where the peak is beyond XLA's limit and nothing less may be taken.
    """
    while True:
        train_step = build(config)
        lower = fewer(config) if take and may_lower else None
        try:
            line = planner.check(train_step, config, xla.pool_bytes())
            why = "" if take is None else _refused(take, compiled(config, train_step))
        except UserError as error:
            if lower is None:
                raise
            line, why = "", str(error).split(";")[0]
        if why and lower is not None:
            say(f"compute.residuals={lower} instead of {config.compute.residuals}: {why}")
            config = configs.override(config, {"compute.residuals": lower})
            continue
        if why:
            say(f"warning: {why}; training starts all the same; close other programs that use the GPU if it fails")
        return config, train_step, line


def fewer(config: Config) -> str | None:
    """The next choice of compute.residuals, which keeps less; None after the last."""
    ladder = planner.residual_ladder()
    now = config.compute.residuals
    rest = ladder[ladder.index(now) + 1 :] if now in ladder else ladder[-1:]
    return rest[0] if rest else None


def _refused(take: Take, sizes: Sequence[int]) -> str:
    """Why these buffers are not to be had; "" if they are."""
    try:
        take(sizes)
        return ""
    except Exception as error:  # an allocator that fails raises several types
        return f"the planned {sum(sizes) / GIB:.2f} GiB cannot be allocated ({first_line(error)})"


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
