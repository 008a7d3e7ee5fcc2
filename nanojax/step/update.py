"""How gradients are applied: each weight's optimizer, one layer or one chunk of rows at a time, then stored again."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import weights
from nanojax.config import Config, Format
from nanojax.model import Params
from nanojax.model.params import at
from nanojax.quant import decode, encode, packed
from nanojax.quant.formats import Stored
from nanojax.quant.rounding import dither
from nanojax.step import optim
from nanojax.step.share import ALONE, Share
from nanojax.step.state import Arrays, Opt, State, remainder_bits

F32 = jnp.float32
ROWS_BYTES = 32 << 20  # f32 bytes of the embedding's or head's rows that are updated at one time


def apply_all(
    config: Config, state: State, totals: Arrays, scale: jax.Array, key: jax.Array, share: Share = ALONE
) -> tuple[Params, Opt, Arrays]:
    """(params, opt, accumulators) after every weight's optimizer has seen scale*total.

    Accumulators come back as zeros, or not at all where the state has none; those that are momenta become the optimizer's.

    Args:
      share: what this device updates, if it is one of several: `totals` and state.opt have its own layers and rows only.
    """
    table = weights.table(config.model)
    layered = sorted(name for name, weight in table.items() if weight.use == "layer")
    layer_key, *other_keys = jax.random.split(key, 1 + len(table))
    opt: Opt = {}
    cleared: Arrays = {}
    new: dict[str, Any] = {}
    for j, name in enumerate(layered):
        with jax.named_scope(optim.group_of(config, name, table[name]).optimizer):
            new[name], opt[name], cleared[name] = _update_layers(
                config, state, name, totals[name], scale, j, layer_key, share
            )
        # One weight after the other: each holds its new layers twice.
        new, opt, cleared, scale = lax.optimization_barrier((new, opt, cleared, scale))
    params: Params = {}
    for name, weight_key in zip((name for name in table if name not in layered), other_keys):
        update: Any = _update_embeddings if table[name].layered else _update_once
        with jax.named_scope(f"{optim.group_of(config, name, table[name]).optimizer}_{name}"):
            made, opt[name], cleared[name] = update(config, state, name, totals[name], scale, weight_key, share)
        (new if table[name].layered else params)[name] = made
    params["blocks"] = _by_layer(table, new)
    for name, weight in table.items():
        if optim.summed_into_momentum(config, weight):
            opt[name]["momentum"] = cleared.pop(name)
    return params, opt, cleared


def _update_layers(
    config: Config,
    state: State,
    name: str,
    totals: tuple[jax.Array, ...],
    scale: jax.Array,
    j: int,
    key: jax.Array,
    share: Share,
) -> tuple[tuple[Stored, ...], dict[str, Any], tuple[jax.Array, ...]]:
    """(its arrays by layer, its entry of opt, its accumulators) of the j-th of the layers' weights."""
    weight = weights.table(config.model)[name]
    layers = share.layers(tuple(state.params["blocks"][i][name] for i in weight.layers))
    into_momentum = optim.summed_into_momentum(config, weight)
    opt = {m: a for m, a in state.opt[name].items() if not (into_momentum and m == "momentum")}
    tx: Any = optim.transform(config, name, weight)
    key = jax.random.fold_in(key, j)
    phases = jax.random.key(config.train.seed)

    def layer(opt: Any, k: jax.Array) -> tuple[Any, Stored]:
        number = share.number(k, len(layers))
        keys = jax.random.split(jax.random.fold_in(key, number))
        total, p = _pick(tuple(zip(totals, layers)), k)
        old = at(opt, k)
        remainder = old.pop("remainder", None)
        before = optim.OptState(state.step, old)
        updates, after = tx.update(total.astype(F32) * scale, before, p, key=keys[0])
        moments = dict(after.moments)
        if isinstance(p, packed.Packed):
            phase = jax.random.fold_in(jax.random.fold_in(phases, number), j)
            p, rest = apply_with_remainder(p, remainder, updates, remainder_bits(config, weight), phase, state.step)
            if rest is not None:
                moments["remainder"] = rest
        else:
            p = apply_rounded(p, updates, config.stored_as(weight), keys[1])
        p, moments = lax.optimization_barrier((p, moments))
        return _put(opt, moments, k), p

    opt, stack = lax.scan(layer, opt, jnp.arange(len(layers)))
    stack = share.gathered(stack, len(weight.layers))
    new = tuple(at(stack, k) for k in range(len(weight.layers)))
    if into_momentum:
        return new, opt, totals
    if not state.accum:  # its zeros would be those that the sums began with, kept until here (d32: 96 MiB)
        return new, opt, ()
    new, opt, totals = lax.optimization_barrier((new, opt, totals))
    return new, opt, jax.tree.map(jnp.zeros_like, totals)


def _update_once(
    config: Config, state: State, name: str, total: jax.Array, scale: jax.Array, key: jax.Array, share: Share
) -> tuple[Stored, dict[str, Any], jax.Array]:
    """(its array, its entry of opt, its accumulator) of a weight that exists once."""
    return _update_rows(config, state.step, name, (state.params[name], state.opt[name], total), scale, key, share)


def _update_embeddings(
    config: Config,
    state: State,
    name: str,
    totals: tuple[jax.Array, ...],
    scale: jax.Array,
    key: jax.Array,
    share: Share,
) -> tuple[tuple[Stored, ...], dict[str, Any], tuple[jax.Array, ...]]:
    """(its arrays by layer, its entry of opt, its accumulators) of an embedding that layers have, one after the other."""
    weight = weights.table(config.model)[name]
    done: list[Any] = []
    for place, i in enumerate(weight.layers):
        opt = {m: arrays[place] for m, arrays in state.opt[name].items()}
        carry = state.params["blocks"][i][name], opt, totals[place]
        new = _update_rows(config, state.step, name, carry, scale, jax.random.fold_in(key, i), share)
        new, scale = lax.optimization_barrier((new, scale))
        done.append(new)
    params, opts, cleared = zip(*done)
    return params, {m: tuple(opt[m] for opt in opts) for m in opts[0]}, cleared


def _update_rows(
    config: Config, step: jax.Array, name: str, carry: Any, scale: jax.Array, key: jax.Array, share: Share
) -> Any:
    """`carry` (parameter, the optimizer's arrays, accumulator) updated a chunk of rows at a time."""
    weight = weights.table(config.model)[name]
    if not share.divides(weight):
        share = ALONE
    tx: Any = optim.transform(config, name, weight)
    carry = (share.rows(carry[0]), *carry[1:])
    key = share.key(key)
    n = _chunks((share.of(weight.shape[0]), *weight.shape[1:]))
    form = config.stored_as(weight)

    def rows(carry: Any, k: jax.Array) -> tuple[Any, None]:
        params, opt, total = carry
        keys = jax.random.split(jax.random.fold_in(key, k))
        p, grads = at(params, k), at(total, k).astype(F32) * scale
        before = optim.OptState(step, at(opt, k))
        updates, after = tx.update(grads, before, p, key=keys[0])
        p = apply_rounded(p, updates, form, keys[1])
        new = lax.optimization_barrier((p, dict(after.moments), jnp.zeros_like(at(total, k))))
        return tuple(_put(old, part, k) for old, part in zip(carry, new)), None

    carry = jax.tree.map(lambda a: a.reshape(n, a.shape[0] // n, *a.shape[1:]), carry)
    carry, _ = lax.scan(rows, carry, jnp.arange(n))
    params, *others = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), carry)
    return share.gathered(params, weight.shape[0]), *others


def _chunks(shape: tuple[int, ...]) -> int:
    """Chunks of rows in which an array of this shape is updated: the fewest equal ones below ROWS_BYTES in f32."""
    rows = shape[0]
    least = math.ceil(math.prod(shape) * 4 / ROWS_BYTES)
    return next(n for n in range(least, rows + 1) if rows % n == 0)


def apply_rounded(stored: Stored, update: jax.Array, form: Format, key: jax.Array) -> Stored:
    """A stored parameter plus its f32 update: decode, add, encode stochastically.

    optax.apply_updates would truncate int8.
    """
    return encode(decode(stored) + update, form, jax.random.fold_in(key, 0))


def apply_with_remainder(
    stored: packed.Packed, remainder: jax.Array | None, update: jax.Array, bits: int, key: jax.Array, step: jax.Array
) -> tuple[packed.Packed, jax.Array | None]:
    """`apply_rounded` below 8 bits, and the new remainder (None with 0 bits). `key` is the same at every step.

    What rounding leaves of a weight is not lost (packed.encode_fine). Rounded anew to 16 levels or fewer, weights would take
    up more noise at every step than update.
    """
    noise = dither(jax.random.fold_in(key, 0), step, update.shape)
    return packed.encode_fine(packed.decode_fine(stored, remainder, bits) + update, noise, stored, bits)


def _pick(layers: tuple[Any, ...], k: jax.Array) -> Any:
    """layers[k] for a traced k. A stack that k indexes would be a copy of all layers."""
    return lax.switch(k, [lambda tree=tree: tree for tree in layers])


def _put(tree: Any, new: Any, k: jax.Array) -> Any:
    """A tree of stacks with element k replaced."""
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, k, 0), tree, new)


def _by_layer(table: weights.Table, new: dict[str, tuple[Stored, ...]]) -> tuple[dict[str, Stored], ...]:
    """Arrays by weight, then layer, as arrays by layer, then weight."""
    at_layer = {name: dict(zip(table[name].layers, arrays)) for name, arrays in new.items()}
    count = 1 + max(i for arrays in at_layer.values() for i in arrays)
    return tuple({name: arrays[i] for name, arrays in at_layer.items() if i in arrays} for i in range(count))
