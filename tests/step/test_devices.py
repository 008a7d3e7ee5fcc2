"""The step shared by two devices against the step of one: losses, state, what is exchanged and when."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import config as configs
from nanojax import config_rules, step, train, xla
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.step import devices

COLLECTIVE = re.compile(r" (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(")
ODD = {"model": {"depth": 3, "vocab": 127}, "train": {"tokens_per_step": 256, "microbatch": 2}}  # 2 divides neither
INT8 = {
    "stored": {"blocks": "int8", "embed": "int8", "head": "bf16", "momentum": "int8", "adam": "int8"},
    "accumulate": {"blocks": "bf16", "embed_head": "bf16"},
    "compute": {"dtype": "bf16", "forward": "int8", "dx": "int8", "dw": "int8", "residuals": "all"},
}
NEWEST = {"model": {**ODD["model"], "family": "2026", "width": 64, "window": 8}, "optim": {"muon": "normuon"}}


def on(config: Config, n: int) -> Config:
    return config_rules.resolve(configs.override(config, {"parallel.devices": str(n)}))


def run(config: Config, steps: int) -> tuple[list[float], step.State, Any]:
    """(losses, the plain state, the compiled step) of steps on random batches, which are the same for all numbers."""
    compiled = train._compiled(config)
    state = jax.jit(functools.partial(step.init_state, config))()
    mesh = devices.mesh_here(config) if config.several else None
    if mesh:
        state = devices.spread(config, mesh, state)
    losses = []
    for i in range(steps):
        batch = step.Batch(jax.random.randint(jax.random.key(i), config.batch_shape, 0, config.model.V))
        state, metrics = compiled(state, devices.batch_on(config, mesh, batch) if mesh else batch)
        losses.append(float(metrics["loss"]))
    return losses, devices.plain(config, state), compiled


def test_one_device_compiles_the_plain_step(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run compiles by default is train_step alone, byte for byte, and exchanges nothing."""
    config = tiny(model={"depth": 1})
    lower = lambda function, *shapes, **_: jax.jit(function, donate_argnums=0).lower(*shapes).as_text()
    monkeypatch.setattr(xla, "compiled", lower)
    text: Any = train._compiled(config)
    plain = functools.partial(step.train_step, config)
    assert text == lower(plain, step.abstract_state(config), step.abstract_batch(config))
    assert not re.search("all_reduce|reduce_scatter|all_gather|partition_id|shard", text) and config.devices == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "sections",
    [ODD, pytest.param(ODD | NEWEST, marks=pytest.mark.slow), pytest.param(ODD | INT8, marks=pytest.mark.slow)],
)
def test_two_devices_learn_what_one_does(tiny: Callable[..., Config], sections: dict[str, Any]) -> None:
    """20 steps: losses within 1e-6 in f32 (1% where rounding is stochastic), the same plain state, nothing exchanged in the
    loop over microbatches, and no device holds more than half of the optimizer's arrays, one layer or row more."""
    config = tiny(**sections)
    (one, state, _), (two, shared, compiled) = (run(on(config, n), 20) for n in (1, 2))
    rounded = "stored" in sections
    np.testing.assert_allclose(two, one, rtol=1e-2 if rounded else 1e-6)
    shape = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shape((shared.params, shared.opt)) == shape((state.params, state.opt)) and shared.accum == {}
    if not rounded:
        apart = lambda a, b: float(jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-9))
        # One number's gradient may be a sum that cancels: backout's is 1.3e-3 apart.
        worst = lambda a, b: apart(a, b) / (5e-3 if a.size == 1 else 1e-3)
        assert max(jax.tree.leaves(jax.tree.map(worst, shared.opt, state.opt))) < 1
    inside = [line for line in compiled.as_text().splitlines() if COLLECTIVE.search(line) and "while" in line]
    assert inside == [] and COLLECTIVE.search(compiled.as_text())
    own = devices.abstract(on(config, 2), devices.mesh_here(on(config, 2)))[0].opt
    each = lambda a: np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    held, whole = sum(map(each, jax.tree.leaves(own))), sum(a.nbytes for a in jax.tree.leaves(state.opt))
    assert held < whole * (2 / 3 + 0.01)  # of three layers, the first device has two


@pytest.mark.parametrize(
    "sections,said",
    [
        ({"parallel": {"devices": "3"}}, "does not divide the step's 4 microbatches"),
        ({"parallel": {"devices": "0"}}, "expected a number of devices from 1, or all"),
        ({"parallel": {"devices": "two"}}, "expected a number of devices from 1, or all"),
        (
            {"parallel": {"devices": "2"}, "accumulate": {"blocks": "momentum"}},
            "set --accumulate.blocks to f32 or bf16",
        ),
    ],
)
def test_numbers_that_cannot_be(tiny: Callable[..., Config], sections: dict[str, Any], said: str) -> None:
    """A number that does not divide the microbatches, is none, or meets sums in the momentum: one line that says what to do."""
    with pytest.raises(UserError, match=re.escape(said)):
        tiny(train={"tokens_per_step": 256, "microbatch": 2}, **sections)
