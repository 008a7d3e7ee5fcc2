"""The recipe of 2026 as numbers: sizes, scaling laws, rates and windows against the published ones; keys that do not fit it."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from oracles import numpy_optim2026 as oracle

from nanojax import config as configs
from nanojax import config_rules, recipe, weights
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.step import optim

TABLE = {  # depth: parameters, those that the scaling laws count, tokens per step; nanochat's, commit 92d63d4
    12: (286_261_730, 110_100_912, 2**19),
    16: (536_871_738, 234_881_792, 2**19),
    20: (896_533_746, 435_160_240, 2**20),
    22: (1_123_157_490, 569_509_292, 2**20),
    24: (1_384_122_122, 729_810_624, 2**20),
    26: (1_681_786_938, 918_423_532, 2**20),
    28: (2_018_511_234, 1_137_707_312, 2**20),
    32: (2_818_575_450, 1_677_724_672, 2**21),
}
FLOPS = {12: 7.597e8, 16: 1.586e9, 20: 2.886e9, 22: 3.763e9, 24: 4.775e9, 26: 5.991e9, 28: 7.366e9, 32: 1.0771e10}


@pytest.mark.parametrize("depth", TABLE)
def test_sizes_are_the_published_ones(depth: int) -> None:
    """Parameters exactly, FLOPs per token to the digits printed, and batch, steps and decay as the laws give them."""
    config = config_rules.resolve(recipe.nanochat_2026(depth, ratio=8))
    parameters, scaling, batch = TABLE[depth]
    assert config.model.parameters == parameters
    assert weights.scaling_parameters(config.model) == scaling
    assert config.model.flops_per_token == pytest.approx(FLOPS[depth], rel=5e-4)
    assert config.train.tokens_per_step == batch
    horizon = oracle.horizon(depth, 8)
    assert config.train.steps == horizon.steps
    assert config_rules.matrix_decay(config) == pytest.approx(horizon.decay, rel=1e-12)


@pytest.mark.parametrize("depth", [12, 24, 32])
def test_groups_have_the_published_rates(depth: int) -> None:
    """Every weight outside Muon has the rate, betas and decay of the formulas; Muon's rate grows with the batch."""
    config = config_rules.resolve(recipe.nanochat_2026(depth, ratio=8))
    groups, table = optim.groups(config), weights.table(config.model)
    want = oracle.adam_groups(config.model.D, config.train.tokens_per_step)
    for name, theirs in want.items():
        ours = groups[table[name].group]
        assert (ours.lr, *ours.betas, ours.weight_decay) == pytest.approx(tuple(theirs), rel=1e-12), name
    matrices = {table[name].group for name in table if name not in want}
    assert {groups[g].lr for g in matrices} == {oracle.muon_rate(config.train.tokens_per_step)}
    assert set(groups) == {weight.group for weight in table.values()}


def test_schedules_are_the_published_ones() -> None:
    """Rate, momentum and decay at every 97th step of d24, and in a short run, where the warm-ups win over the warm-down."""
    for steps in (5568, 50):
        config = recipe.nanochat_2026(24, ratio=8)
        config = config_rules.resolve(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)))
        rate, momentum = optim.schedules(config)
        for t in [*range(0, steps, 97 if steps > 100 else 1), steps - 1]:
            assert float(np.asarray(rate(t))) == pytest.approx(oracle.lr_factor(t, steps), rel=1e-5), t
            assert float(np.asarray(momentum(t))) == pytest.approx(oracle.muon_momentum(t, steps), rel=1e-6), t


def test_windows_are_the_published_ones() -> None:
    """Three short layers and a long one, the last always long; a quarter of the row in whole 128s, also of short rows."""
    windows = lambda depth, seq: weights.windows(config_rules.resolve(recipe.nanochat_2026(depth, 8, seq=seq)).model)
    assert windows(8, 2048) == (512, 512, 512, 2048, 512, 512, 512, 2048)
    assert windows(6, 2048) == (512, 512, 512, 2048, 512, 2048)
    assert windows(4, 1024) == (256, 256, 256, 1024)
    assert windows(2, 64) == (64, 64)


WRONG = [
    ({"model.without": "smear+bigram"}, "value, x0, smear, backout"),
    ({"model.width": 16, "model.head_dim": 16}, "24 channels"),
    ({"optim.beta1": 0.9}, "have their own"),
    ({"optim.ns_steps": 6}, "Polar Express has 5"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_what_does_not_fit_is_refused(change: dict[str, object], words: str) -> None:
    """Keys that this family does not read, and sizes that it cannot have, are refused before anything is compiled."""
    with pytest.raises(UserError, match=words):
        config_rules.resolve(configs.override(recipe.nanochat_2026(4, 8, vocab=64, seq=128), change))


def test_the_older_family_has_no_windows(tiny: Callable[..., Config]) -> None:
    """Keys of 2026 on a model of 2025 are an error, not silence."""
    with pytest.raises(UserError, match="only models of"):
        tiny(model={"window": 8})
    with pytest.raises(UserError, match="only models of"):
        tiny(model={"without": "smear"})
