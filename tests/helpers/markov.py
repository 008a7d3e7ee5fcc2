"""Batches that a model can learn from, made from a config alone; training on them beside an oracle."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import step
from nanojax.config import Config


def batches(config: Config, steps: int) -> np.ndarray:
    """`steps` batches [A,B,T+1] of a Markov chain with three successors per token."""
    rng = np.random.default_rng(0)
    V, (A, B, T1) = config.model.V, config.batch_shape
    follow = rng.integers(0, V, (V, 3))
    out = np.zeros((steps, A, B, T1), np.int32)
    out[..., 0] = rng.integers(0, V, out.shape[:3])
    for t in range(1, T1):
        out[..., t] = follow[out[..., t - 1], rng.integers(0, 3, out.shape[:3])]
    return out


def train_beside(oracle: Any, config: Config, state: step.State, steps: int) -> tuple[step.State, list[Any], list[Any]]:
    """(state after `steps` steps, our metrics, what oracle.step(tokens) returned), both on the same batches."""
    run = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    ours, theirs = [], []
    for tokens in batches(config, steps):
        theirs.append(oracle.step(tokens))
        state, metrics = run(state, step.Batch(jnp.asarray(tokens)))
        ours.append(metrics)
    return state, ours, theirs
