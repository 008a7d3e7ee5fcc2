"""Golden metrics: the first losses of two tiny runs as literal numbers, so that no change of what a step computes goes unseen."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import step
from nanojax.config import Config

INT8: dict[str, dict[str, Any]] = dict(
    model=dict(width=256, head_dim=64),
    stored=dict(blocks="int8", embed="bf16", head="bf16", momentum="int8", adam="int8"),
    accumulate=dict(blocks="bf16", embed_head="bf16"),
    compute=dict(loss_chunk=16, dtype="bf16", forward="int8", dx="int8", dw="int8"),
)
# changed sections, relative tolerance, and nats per token of steps 1 to 5 on a CPU
GOLDEN = {
    "f32": ({}, 2e-5, [4.85203, 4.79767, 4.64933, 4.5859, 4.24696]),
    "int8": (INT8, 2e-4, [4.85203, 4.78546, 4.6321, 4.56657, 4.2685]),
}
CHANGED = """
The losses of {name} have changed.
expected: {expected}
got:      {got}
If this change should not alter what a step computes, it has a bug. If it should, put the new numbers into GOLDEN in
tests/step/test_golden.py, and say in the commit why they differ. This prints them again:
    .venv/bin/python -m pytest tests/step/test_golden.py"""


def losses(config: Config, steps: int) -> list[float]:
    """Losses of the first steps on tokens of which the frequent ones are soon learnt: token i has frequency 1 / (i + 1)."""
    frequency = 1 / np.arange(1, config.model.V + 1)
    rng = np.random.default_rng(0)
    state = jax.jit(step.init_state, static_argnums=0)(config)
    train_step = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    out = []
    for _ in range(steps):
        tokens = rng.choice(config.model.V, config.batch_shape, p=frequency / frequency.sum())
        state, metrics = train_step(state, step.Batch(jnp.asarray(tokens, jnp.int32)))
        out.append(float(metrics["loss"]))
    return out


@pytest.mark.parametrize("name", ["f32", pytest.param("int8", marks=pytest.mark.long)])
def test_first_losses(tiny: Callable[..., Config], name: str) -> None:
    """Five steps of two microbatches each. The tolerances cover sums in another CPU's order (SSE4.2 to AVX-512), which in int8
    change codes; a learning rate wrong by 2% fails in both."""
    sections, tolerance, expected = GOLDEN[name]
    got = [round(loss, 5) for loss in losses(tiny(**sections), 5)]
    assert got == pytest.approx(expected, rel=tolerance), CHANGED.format(name=name, expected=expected, got=got)
