"""Fifty steps of the recipe of 2026 against an independent numpy implementation of its model, optimizer and schedules."""

from typing import Any

import jax
import numpy as np
import pytest
from helpers import markov
from helpers.oracle_2026 import Tree, apart, joined
from oracles import numpy_gpt2026, numpy_optim2026

from nanojax import config as configs
from nanojax import config_rules
from nanojax import step as steps
from nanojax.config import Compute, Config, Train
from nanojax.recipe import nanochat_2026

STEPS = 50
MUON = ("q", "k", "v", "o", "up", "down", "gate")


class Recipe:
    """Trains the oracle's model with the oracle's optimizer, all in float64."""

    def __init__(self, params: Tree, config: Config):
        m = config.model
        self.params, self.config, self.count = params, config, 0
        self.model = numpy_gpt2026.Model(m.H, m.window, m.rope_base)
        self.adam = numpy_optim2026.adam_groups(m.D, config.train.tokens_per_step)
        self.rate = numpy_optim2026.muon_rate(config.train.tokens_per_step)
        self.states: dict[tuple[str, int], Any] = {}

    def step(self, tokens: np.ndarray) -> float:
        """One update; the loss before it."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        loss, grads = numpy_gpt2026.loss_and_grads(self.params, flat[:, :-1], flat[:, 1:], self.model)
        blocks = [self._update(w, g, i) for i, (w, g) in enumerate(zip(self.params["blocks"], grads["blocks"]))]
        once = {name: w for name, w in self.params.items() if name != "blocks"}
        self.params = self._update(once, grads, -1) | {"blocks": tuple(blocks)}
        self.count += 1
        return loss

    def _update(self, weights: Tree, grads: Tree, layer: int) -> Tree:
        t = self.count
        factor = numpy_optim2026.lr_factor(t, STEPS)
        out = {}
        for name, w in weights.items():
            if name in MUON:
                state = self.states.get((name, layer), numpy_optim2026.muon_state(w))
                decay = numpy_optim2026.muon_decay(t, STEPS, config_rules.matrix_decay(self.config))
                mu = numpy_optim2026.muon_momentum(t, STEPS)
                out[name], new = numpy_optim2026.muon_step(w, grads[name], state, self.rate * factor, mu, decay)
            else:
                m, v = self.states.get((name, layer), (np.zeros(w.shape), np.zeros(w.shape)))
                out[name], *new = numpy_optim2026.adamw_step(w, grads[name], m, v, t, self.adam[name], factor)
            self.states[name, layer] = new
        return out


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, 4])
def test_fifty_steps_equal_numpy(depth: int) -> None:
    """In f32 with windows shorter than the rows, every loss is within 1e-4 nats of float64 numpy's.

    Every parameter tensor ends within 1e-3, as the norm of the difference over that of the distance travelled. The parameters
    begin without zeros. With the recipe's own, whose branches begin as zeros, the gradients of the mixing factors and of
    backout are 0 but for rounding (the last norm takes out their scale), and AdamW makes full steps of that noise's sign.
    """
    base = nanochat_2026(depth, ratio=8, vocab=48, seq=24)
    sizes = {"model.width": 32 * depth, "model.head_dim": 32, "model.window": 9}
    config = configs.override(base, sizes)
    train = Train(steps=STEPS, tokens_per_step=192, microbatch=4, seed=3)
    config = config_rules.resolve(configs.dataclasses.replace(config, train=train, compute=Compute(loss_chunk=48)))
    state = jax.jit(steps.init_state, static_argnums=0)(config)
    first = numpy_gpt2026.random_params(np.random.default_rng(2), depth, 48, 32, 32 * depth)
    state = state._replace(params=joined(first))
    oracle = Recipe(first, config)
    state, metrics, theirs = markov.train_beside(oracle, config, state, STEPS)
    ours = [float(each["loss"]) for each in metrics]
    assert theirs[-1] < theirs[0] - 0.1  # it has learnt
    print("loss", np.abs(np.array(ours) - theirs).max(), theirs[0], theirs[-1])
    travelled = lambda a, b, a0: float(np.linalg.norm(a - b) / np.linalg.norm(b - a0))
    errors = jax.tree.map(travelled, apart(state.params), oracle.params, first)
    print(errors)
    assert np.abs(np.array(ours) - theirs).max() < 1e-4
    assert max(jax.tree.leaves(errors)) < 1e-3, errors
