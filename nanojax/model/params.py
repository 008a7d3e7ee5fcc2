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
from nanojax.model.initial import initializer
from nanojax.model.seam import NamedParams, Rows
from nanojax.ops.linear import float_dtype
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
        return {name: encode(w, config.stored_as(table[name])) for name, w in drawn.items()}

    keys = jax.random.split(block_key, config.model.L)
    blocks: list[Any] = [None] * config.model.L
    for alike in _alike(table, config.model.L):
        layer = weights.layer_weights(table, alike[0])
        has, numbers = {name: w for name, w in layer.items() if w.use == "layer"}, jnp.array(alike)
        draw = lambda layer, has=has: stored(model.init_layer(config, has, *layer))
        stacks = lax.map(draw, (numbers, keys[numbers]))
        for place, i in enumerate(alike):
            blocks[i] = at(stacks, place) | stored(_tables(layer, keys[i]))
    return {**stored(model.init_once(config, embed_key, head_key)), "blocks": tuple(blocks)}


def _tables(layer: weights.Table, key: jax.Array) -> dict[str, jax.Array]:
    """A layer's embeddings, f32. Each is drawn where it will lie: d28's, stacked, would exist twice (1.5 GiB)."""
    embeddings = [name for name, weight in layer.items() if weight.use == "rows"]
    draw = lambda name, i: initializer(layer[name])(jax.random.fold_in(key, i), layer[name].shape)
    return {name: draw(name, i) for i, name in enumerate(embeddings)}


def _alike(table: weights.Table, L: int) -> list[list[int]]:
    """The layers, those with the same weights together: each set is compiled once."""
    sets: dict[tuple[str, ...], list[int]] = {}
    for i in range(L):
        sets.setdefault(tuple(weights.layer_weights(table, i)), []).append(i)
    return list(sets.values())


def rows(config: Config, params: Params, tokens_BT: jax.Array) -> Rows:
    """f32 rows [B,T,D] that the tokens select from each embedding of the model. The whole table is never decoded."""
    return {name: _select(params[name], tokens_BT) for name in _embeddings(config)}


def rows_before(config: Config, params: Params, before_BT: jax.Array) -> Rows:
    """`rows` of the tokens before; zeros where there is none, marked by -1."""
    found = rows(config, params, jnp.maximum(before_BT, 0))
    return {name: jnp.where(before_BT[..., None] >= 0, x, 0.0) for name, x in found.items()}


def layer_rows(config: Config, layer: NamedParams, i: int, tokens_BT: jax.Array) -> Rows:
    """Rows [B,T,D] that the tokens select from each embedding of layer i, in the compute dtype."""
    has = weights.layer_weights(weights.table(config.model), i)
    dtype = float_dtype(config.compute)
    return {name: _select(layer[name], tokens_BT).astype(dtype) for name, weight in has.items() if weight.use == "rows"}


def _embeddings(config: Config) -> list[str]:
    table = weights.table(config.model)
    return [name for name, weight in table.items() if weight.use == "rows" and not weight.layered]


def _select(table: Stored, tokens_BT: jax.Array) -> jax.Array:
    return decode(jax.tree.map(lambda a: a[tokens_BT], table))


def shared_weights(config: Config, params: Params) -> NamedParams:
    """The weights that are read whole outside the layers, other than the head."""
    return {name: params[name] for name, weight in weights.table(config.model).items() if weight.use == "shared"}
