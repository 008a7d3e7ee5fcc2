"""Checkpoints written before every format kept its layers apart: their tree, and how it becomes today's.

Until 2026-11 formats of 8 bits and above stored one array per matrix, stacked over the layers, and the optimizer's arrays lay
by kind rather than by weight: {"blocks": momentum | [mu, nu], "embed": [mu, nu], "head": [mu, nu], "remainder"}.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nanojax import weights
from nanojax.config import Config
from nanojax.quant.packed import LEVELS

LAYOUT = 2  # meta["layout"] of today's checkpoints; absent before


def abstract(config: Config, parts: dict[str, Any]) -> dict[str, Any]:
    """The old tree of shapes for today's `parts` ("params", and "opt" where it is wanted)."""
    old = {"params": dict(parts["params"])}
    if config.stored.blocks not in LEVELS:
        first, L = parts["params"]["blocks"][0], len(parts["params"]["blocks"])
        stack = lambda a: jax.ShapeDtypeStruct((L, *a.shape), a.dtype)
        old["params"]["blocks"] = {name: jax.tree.map(stack, w) for name, w in first.items()}
    if "opt" not in parts:
        return old
    new, layered = parts["opt"]["opt"], _layered(config)
    adamw = "mu" in new[layered[0]]
    moments = {m: {name: new[name][m] for name in layered} for m in (("mu", "nu") if adamw else ("momentum",))}
    opt: dict[str, Any] = {"blocks": (moments["mu"], moments["nu"]) if adamw else moments["momentum"]}
    opt |= {name: (new[name]["mu"], new[name]["nu"]) for name in new if name not in layered}
    if "remainder" in new[layered[0]]:
        opt["remainder"] = {name: new[name]["remainder"] for name in layered}
    return old | {"opt": {"step": parts["opt"]["step"], "opt": opt}}


def upgraded(config: Config, parts: dict[str, Any]) -> dict[str, Any]:
    """Today's tree of an old checkpoint's arrays. Consumes `parts`: no more than one weight exists twice."""
    layered, params = _layered(config), dict(parts.pop("params"))
    if isinstance(params["blocks"], dict):
        stacks = params.pop("blocks")
        apart = {name: _layers(stacks.pop(name)) for name in layered}
        params["blocks"] = tuple({name: apart[name][i] for name in layered} for i in range(config.model.L))
    else:
        params["blocks"] = tuple(params["blocks"])
    new: dict[str, Any] = {"params": params}
    if "opt" not in parts:
        return new
    old = parts.pop("opt")
    opt = {name: {"mu": m[0], "nu": m[1]} for name, m in old["opt"].items() if name not in ("blocks", "remainder")}
    blocks = old["opt"]["blocks"]
    for name in layered:
        opt[name] = (
            {"momentum": blocks[name]} if isinstance(blocks, dict) else {"mu": blocks[0][name], "nu": blocks[1][name]}
        )
        if "remainder" in old["opt"]:
            opt[name]["remainder"] = old["opt"]["remainder"][name]
    return new | {"opt": {"step": old["step"], "opt": opt}}


def _layered(config: Config) -> list[str]:
    return [name for name, weight in weights.table(config.model).items() if weight.use == "layer"]


@jax.jit
def _layers(stack: Any) -> tuple[Any, ...]:
    count = jax.tree.leaves(stack)[0].shape[0]
    return tuple(jax.tree.map(lambda a, i=i: jnp.copy(a[i]), stack) for i in range(count))
