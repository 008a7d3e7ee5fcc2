"""Runs begun before every format kept its layers apart go on from their checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from nanojax import step
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.run import checkpoint, run_folder

LAYERED = ("qkv", "o", "up", "down")
FORMATS: dict[str, dict[str, Any]] = {
    "f32": {},
    "int8": dict(stored=dict(blocks="int8", embed="bf16", head="int8", momentum="int8", adam="int8")),
    "momentum": dict(
        stored=dict(blocks="bf16", momentum="bf16"),
        accumulate=dict(blocks="momentum"),
        optim=dict(nesterov=False, clip=0.0),
    ),
    "adamw": dict(stored=dict(blocks="int8", adam="int8"), optim=dict(matrix="adamw")),
    "b2.67": dict(stored=dict(blocks="b2.67")),
}


def random_state(config: Config) -> step.State:
    """The state with another number in every place of its parameters and optimizer state."""

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        place = jnp.arange(leaf.size).reshape(leaf.shape) + len(str(path))
        return (place % 97).astype(leaf.dtype)

    state = step.init_state(config)
    filled = jax.tree_util.tree_map_with_path(fill, (state.params, state.opt))
    return state._replace(step=jnp.int32(7), params=filled[0], opt=filled[1])


def old_parts(config: Config, state: step.State) -> dict[str, Any]:
    """The tree that was saved before: stacks of layers at 8 bits and above, and the optimizer's arrays by kind."""
    stack = lambda *layers: jnp.stack(layers)
    params = dict(state.params)
    if config.stored.blocks != "b2.67":
        params["blocks"] = {n: jax.tree.map(stack, *[layer[n] for layer in state.params["blocks"]]) for n in LAYERED}
    moments = [{n: state.opt[n][m] for n in LAYERED} for m in state.opt["qkv"] if m != "remainder"]
    opt: dict[str, Any] = {"blocks": moments[0] if len(moments) == 1 else tuple(moments)}
    opt |= {name: (state.opt[name]["mu"], state.opt[name]["nu"]) for name in ("embed", "head")}
    if "remainder" in state.opt["qkv"]:
        opt["remainder"] = {n: state.opt[n]["remainder"] for n in LAYERED}
    return {"params": params, "opt": {"step": state.step, "opt": opt}}


def save_old(run: Path, config: Config, state: step.State, wrong: str = "") -> None:
    """A checkpoint as it was written before, without a layout in its meta; the check of `wrong` does not fit."""
    run_folder.write_config(run, config)
    parts = old_parts(config, state)
    sums = jax.device_get(checkpoint.checks(parts)[0])
    checks = {path: int(value) + (path == wrong) for path, value in sums.items()}
    meta = {"step": 7, "data": {"row": 3}, "checks": checks}
    writer = checkpoint.open_for_saving(run, config)
    writer.save_checkpointables(7, {**parts, "meta": meta})
    writer.close()


@pytest.mark.long
@pytest.mark.parametrize("name", ["int8", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS if f != "int8")])
def test_old_checkpoints_restore(tiny: Callable[..., Config], name: str, tmp_path: Path) -> None:
    """Every array comes back bit for bit, in today's tree, with the data's position."""
    config = tiny(**FORMATS[name])
    state = random_state(config)
    save_old(tmp_path, config, state)
    restored = checkpoint.restore(tmp_path, config)
    assert restored is not None and restored[1]["data"] == {"row": 3}
    chex.assert_trees_all_equal(restored[0], state)


@pytest.mark.long
def test_damage_in_an_old_checkpoint_is_seen(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """The checks of an old checkpoint are those of its own arrays; one that does not fit names the stack."""
    config = tiny()
    save_old(tmp_path, config, random_state(config), wrong="params/blocks/up")
    with pytest.raises(UserError, match="params/blocks/up is not what was saved"):
        checkpoint.restore(tmp_path, config)
