"""Parameters: their tree, their initialisation, and the rows that tokens select.

{"embed": [V,D], "blocks": (one {name: array} per layer), "head": [V,D]}: weights that exist once stand beside "blocks",
whatever format they are stored in. `params` are stored; `weights` are floats.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import weights
from nanojax.config import Config
from nanojax.model import family
from nanojax.model.seam import NamedParams, Rows
from nanojax.quant import decode, encode
from nanojax.quant.formats import Stored

Params = dict[str, Any]  # name -> Stored, and "blocks" -> a tuple of {name: Stored}


def at(tree: Any, i: Any) -> Any:
    """Element i (an int, or a traced index) of every array of a tree of stacks."""
    take = lambda a: a[i] if isinstance(i, int) else lax.dynamic_index_in_dim(a, i, keepdims=False)
    return jax.tree.map(take, tree)


def init_params(config: Config, key: jax.Array) -> Params:
    """Parameters as config.stored says, rounded to nearest. Under jit no more than one layer ever exists in f32."""
    table, model = weights.table(config.model), family.of(config)
    embed_key, block_key, head_key = jax.random.split(key, 3)

    def stored(drawn: dict[str, jax.Array]) -> dict[str, Stored]:
        return {name: encode(w, getattr(config.stored, table[name].stored)) for name, w in drawn.items()}

    keys = jax.random.split(block_key, config.model.L)
    blocks: list[Any] = [None] * config.model.L
    for alike in _alike(table, config.model.L):
        has, numbers = weights.layer_weights(table, alike[0]), jnp.array(alike)
        draw = lambda layer, has=has: stored(model.init_layer(config, has, *layer))
        stacks = lax.map(draw, (numbers, keys[numbers]))
        for place, i in enumerate(alike):
            blocks[i] = at(stacks, place)
    return {**stored(model.init_once(config, embed_key, head_key)), "blocks": tuple(blocks)}


def _alike(table: weights.Table, L: int) -> list[list[int]]:
    """The layers, those with the same weights together: each set is compiled once."""
    sets: dict[tuple[str, ...], list[int]] = {}
    for i in range(L):
        sets.setdefault(tuple(weights.layer_weights(table, i)), []).append(i)
    return list(sets.values())


def rows(config: Config, params: Params, tokens_BT: jax.Array) -> Rows:
    """f32 rows [B,T,D] that the tokens select from each embedding. The whole table is never decoded."""
    names = [name for name, weight in weights.table(config.model).items() if weight.use == "rows"]
    return {name: decode(jax.tree.map(lambda a: a[tokens_BT], params[name])) for name in names}


def shared_weights(config: Config, params: Params) -> NamedParams:
    """The weights that are read whole outside the layers, other than the head."""
    return {name: params[name] for name, weight in weights.table(config.model).items() if weight.use == "shared"}
