"""Batches that a model can learn from, made from a config alone."""

import numpy as np

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
