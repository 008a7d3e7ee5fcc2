"""Fifty steps of training against an independent numpy implementation of the published recipe."""

import jax
import numpy as np
import pytest
from helpers import markov
from oracles.numpy_recipe import Recipe

from nanojax import step as steps
from nanojax.config import Compute, Config, Model, Optim, Train
from nanojax.config_rules import resolve

STEPS = 50


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 4])
def test_fifty_steps_equal_numpy(depth: int) -> None:
    """Same nanochat init, same batches, f32: losses and gradient norms within 1e-3, every parameter tensor within 1e-3.

    Losses in nats; norms and tensors relative (tensor: norm of the difference over the norm of the distance travelled).
    """
    model = Model(depth=depth, width=32 * depth, head_dim=32, vocab=48, seq=24)
    optim = Optim(warmup=0.1, warmdown=0.4, final_lr=0.1, momentum_warmup=30, weight_decay=0.01)
    train = Train(steps=STEPS, tokens_per_step=192, microbatch=4, seed=3)
    config = resolve(Config(model=model, optim=optim, train=train, compute=Compute(loss_chunk=48)))
    state = jax.jit(steps.init_state, static_argnums=0)(config)
    first = jax.tree.map(np.asarray, state.params)
    oracle = Recipe(first, config)
    state, metrics, theirs = markov.train_beside(oracle, config, state, STEPS)
    ours = [(float(each["loss"]), float(each["grad_norm"])) for each in metrics]
    ours, theirs = np.array(ours), np.array(theirs)
    assert theirs[0, 0] == pytest.approx(np.log(48)) and theirs[-5:, 0].mean() < theirs[0, 0] - 0.3  # it has learnt
    assert np.abs(ours[:, 0] - theirs[:, 0]).max() < 1e-3
    assert np.abs(ours[:, 1] / theirs[:, 1] - 1).max() < 1e-3
    errors = jax.tree.map(
        lambda a, b, a0: float(np.linalg.norm(a - b) / np.linalg.norm(b - a0)),
        jax.tree.map(np.asarray, state.params),
        oracle.params,
        first,
    )
    print("loss", np.abs(ours[:, 0] - theirs[:, 0]).max(), "tensors", errors)
    assert max(jax.tree.leaves(errors)) < 1e-3, errors
