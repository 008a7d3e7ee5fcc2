"""How gradients arise: one microbatch forward, then backward layer by layer into accumulators.

The layers run forward, and each keeps what its vjp needs (compute.residuals). The chunked loss turns the last output into
its gradient. The layers' vjps run in reverse, and each dW is added to its accumulator at once. The full gradient, the full
float view of the parameters and the full logits never exist.

Both directions are unrolled, and every layer's accumulators are arrays of their own. In a scan XLA copies each slice of
parameters, residuals and accumulators out of its stack and back, and cannot add dW to its accumulator within the matmul
(d32 on an RTX 4070, modelled, before rows were kernels: 5.1k tokens/s with scans, 7.5k without; 26 and 70 s to compile).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import weights
from nanojax.config import Config
from nanojax.model import Params, family
from nanojax.model.forward import causal, rematerialised
from nanojax.model.params import rows, shared_weights
from nanojax.model.seam import NamedParams, Shared, Taps
from nanojax.ops.cross_entropy import loss_and_grads
from nanojax.quant.rounding import add_rounded, dither_vectors, shifted
from nanojax.step.state import Arrays, Mix, abstract_state

F32 = jnp.float32


class Saved(NamedTuple):
    """What one layer keeps for backward: its vjp without the layer's parameters, which are in memory anyway.

    A vjp is a tree of arrays, and those that are the layer's own parameters are left out. They are recognised by identity:
    while jax traces, a residual that is an input is that input. jax does not promise this. Where it fails, a parameter
    is kept once more: the result is the same and the memory bars fail.
    """

    tree: Any  # the vjp's structure
    arrays: dict[int, jax.Array]  # its leaves by place, without parameters
    parameters: dict[int, int]  # place -> which leaf of the layer belongs there

    @classmethod
    def without(cls, layer: Any, vjp: Any) -> "Saved":
        """`vjp` without the leaves of `layer`."""
        leaves, tree = jax.tree.flatten(vjp)
        own = {id(leaf): j for j, leaf in enumerate(jax.tree.leaves(layer))}
        parameters = {place: own[id(leaf)] for place, leaf in enumerate(leaves) if id(leaf) in own}
        return cls(tree, {place: leaf for place, leaf in enumerate(leaves) if place not in parameters}, parameters)

    def vjp(self, layer: Any) -> Any:
        """The vjp again, with the leaves of `layer` in their places."""
        own = jax.tree.leaves(layer)
        leaves = self.arrays | {place: own[j] for place, j in self.parameters.items()}
        return jax.tree.unflatten(self.tree, [leaves[place] for place in range(len(leaves))])


def forward_backward(
    config: Config,
    params: Params,
    accum: Arrays,
    tokens_BT1: jax.Array,
    weights_BT: jax.Array | None,
    mix: dict[str, Mix],
    key: jax.Array,
) -> tuple[jax.Array, Arrays]:
    """The loss of one microbatch, and `accum` with its gradients added.

    Args:
      weights_BT: f32 weight of each target in the step's loss. None: the loss is the mean over the step's tokens, and what is
        returned is the sum of nats.
      mix: how the accumulator of each weight takes a gradient; Mix(1, 1) where it is not named.
      key: for the stochastic rounding of bf16 accumulators.
    """
    table, model = weights.table(config.model), family.of(config)
    tokens_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    embed_key, head_key, layer_key, *more = jax.random.split(key, 3 + len(table))
    accum = dict(accum)

    # forward
    once, once_taps = shared_weights(config, params), _taps(table, "shared")
    enter = lambda rows, taps: model.enter(config, rows, once, taps)
    leave = lambda taps, x, shared: model.leave(config, once, taps, x, shared)
    x_BTD, shared = enter(rows(config, params, tokens_BT), once_taps)
    x_BTD, saved = _layers_forward(config, params["blocks"], x_BTD, shared)
    x_BTD, leave_vjp = jax.vjp(leave, once_taps, x_BTD, shared)

    # the loss
    (head,) = (name for name, weight in table.items() if weight.use == "head")
    scale = 1 / config.train.tokens_per_step if weights_BT is None else weights_BT.reshape(-1)
    x_MD, targets_M = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    with jax.named_scope("loss"):
        loss, accum[head], dx = loss_and_grads(
            config.compute, config.model.softcap, params[head], accum[head], x_MD, targets_M, scale, head_key
        )

    # backward
    d_leave, dx, dshared = leave_vjp(dx.reshape(x_BTD.shape))
    dx, dshared = _layers_backward(config, params["blocks"], saved, dx, dshared, accum, mix, layer_key)
    # Recomputed, behind a barrier: otherwise XLA keeps forward's f32 rows until now (d32: 16 MiB per row of tokens).
    tokens_BT, dx = lax.optimization_barrier((tokens_BT, dx))
    _, enter_vjp = jax.vjp(enter, rows(config, params, tokens_BT), once_taps)
    drows, d_enter = enter_vjp((dx, dshared))
    one = Mix(jnp.float32(1), jnp.float32(1))
    keys = iter([embed_key, *more])
    for name, d in drows.items():
        accum[name] = _add_rows(accum[name], tokens_BT, d, next(keys))
    for name in once_taps:
        noise = dither_vectors(next(keys), max(table[name].shape))
        accum[name] = add_rounded(accum[name], d_leave[name] + d_enter[name], noise, *mix.get(name, one))
    return loss, accum


def _layers_forward(
    config: Config, blocks: tuple[NamedParams, ...], x_BTD: jax.Array, shared: Shared
) -> tuple[jax.Array, list[Saved]]:
    """The last block's output, and what each layer keeps."""
    table, model = weights.table(config.model), family.of(config)
    attention = causal(config)
    saved = []
    for i in range(config.model.L):
        layer, x_BTD = lax.optimization_barrier((blocks[i], x_BTD))
        taps = _taps(weights.layer_weights(table, i), "layer")

        def run(x: jax.Array, shared: Shared, taps: Taps, i: int = i, layer: NamedParams = layer) -> jax.Array:
            attend = lambda q, k, v: attention(i, q, k, v)
            block = lambda layer, taps, x, shared: model.block(config, i, layer, taps, x, shared, attend)[0]
            return rematerialised(config, block)(layer, taps, x, shared)

        with jax.named_scope(f"layer_{i}"):
            x_BTD, vjp = jax.vjp(run, x_BTD, shared, taps)
        saved.append(Saved.without(layer, vjp))
    return x_BTD, saved


def _layers_backward(
    config: Config,
    blocks: tuple[NamedParams, ...],
    saved: list[Saved],
    dx: jax.Array,
    dshared: Shared,
    accum: Arrays,
    mix: dict[str, Mix],
    key: jax.Array,
) -> tuple[jax.Array, Shared]:
    """Gradients of the first block's input and of what the layers share; the layers' accumulators in `accum` are replaced."""
    table = weights.table(config.model)
    names = sorted(name for name, weight in table.items() if weight.use == "layer")
    sums = {name: dict(zip(table[name].layers, accum[name])) for name in names}
    noise = dither_vectors(key, max(max(table[name].shape) for name in names))
    one = Mix(jnp.float32(1), jnp.float32(1))
    for i in reversed(range(config.model.L)):
        kept = saved.pop()
        # Behind a barrier with dx. Otherwise XLA transposes every layer's parameters before the microbatches, and shares with
        # forward what is recomputed from the residuals, holding it for all layers (d32 in bf16: 1 GiB).
        arrays, dx = lax.optimization_barrier((kept.arrays, dx))
        layer, dx = lax.optimization_barrier((blocks[i], dx))
        new = {}
        with jax.named_scope(f"backward_{i}"):
            dx, more, dws = kept._replace(arrays=arrays).vjp(layer)(dx)
            dshared = jax.tree.map(jnp.add, dshared, more)
            for name, dw in dws.items():
                draw = shifted(noise, i * len(names) + names.index(name))
                new[name] = add_rounded(sums[name][i], dw, draw, *mix.get(name, one))
        # A layer is finished before the next begins. Otherwise XLA joins layers' sums and holds their dW until then.
        dx, dshared, new = lax.optimization_barrier((dx, dshared, new))
        for name, total in new.items():
            sums[name][i] = total
    accum |= {name: tuple(sums[name][i] for i in table[name].layers) for name in names}
    return dx, dshared


def _add_rows(total_VD: jax.Array, tokens_BT: jax.Array, drows_BTD: jax.Array, key: jax.Array) -> jax.Array:
    """total plus an embedding's gradient. A token's occurrences are summed in f32 first; each row is then rounded once."""
    tokens, drows = tokens_BT.reshape(-1), drows_BTD.reshape(-1, drows_BTD.shape[-1])
    unique, place = jnp.unique(tokens, return_inverse=True, size=tokens.size, fill_value=total_VD.shape[0])
    sums = jnp.zeros(drows.shape, F32).at[place.reshape(-1)].add(drows)
    old = total_VD.at[unique].get(mode="clip")
    new = add_rounded(old, sums, dither_vectors(key, max(old.shape)))
    return total_VD.at[unique].set(new, mode="drop", unique_indices=True)


def _taps(table: weights.Table, use: str) -> dict[str, jax.Array]:
    return {name: jnp.zeros(weight.shape, F32) for name, weight in table.items() if weight.use == use}


def residual_bytes(config: Config) -> int:
    """Bytes that one microbatch's forward keeps for backward."""

    def kept(params: Params, tokens: jax.Array) -> list[jax.Array]:
        x, shared = family.of(config).enter(config, rows(config, params, tokens), shared_weights(config, params), None)
        saved = _layers_forward(config, params["blocks"], x, shared)[1]
        return list({id(leaf): leaf for layer in saved for leaf in layer.arrays.values()}.values())

    tokens = jax.ShapeDtypeStruct((config.train.microbatch, config.model.T), jnp.int32)
    arrays = jax.eval_shape(kept, abstract_state(config).params, tokens)
    return sum(a.size * a.dtype.itemsize for a in arrays)
