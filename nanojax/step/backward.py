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
from nanojax.model.params import layer_rows, rows, shared_weights
from nanojax.model.seam import NamedParams, Rows, Shared, Taps
from nanojax.ops import cross_entropy, linear
from nanojax.quant import Quantized
from nanojax.quant.rounding import add_rounded, dither_vectors, shifted
from nanojax.step.state import Arrays, Mix, abstract_state

F32 = jnp.float32
Noise = tuple[jax.Array, jax.Array]  # rounding.dither_vectors
Distinct = tuple[jax.Array, jax.Array]  # a microbatch's tokens [M], each once, then V; where in them each token is


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


def as_operands(config: Config, params: Params) -> Params:
    """The parameters as the products of all microbatches of a step read them: what would be the same in each is done here."""
    table, c = weights.table(config.model), config.compute
    (head,) = (name for name, weight in table.items() if weight.use == "head")
    keep = lambda name, w: linear.held(w) if table[name].use == "layer" and isinstance(w, Quantized) else w
    first = () if c.dx != "int8" else params["blocks"][: c.held]
    blocks = tuple({name: keep(name, w) for name, w in layer.items()} for layer in first)
    blocks += params["blocks"][len(blocks) :]
    return params | {"blocks": blocks, head: cross_entropy.as_operands(c, params[head])}


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
    enter = lambda rows, taps: model.enter(config, rows, None, once, taps)
    leave = lambda taps, x, shared: model.leave(config, once, taps, x, shared)
    x_BTD, shared = enter(rows(config, params, tokens_BT), once_taps)
    x_BTD, shared, saved = _layers_forward(config, params["blocks"], tokens_BT, x_BTD, shared)
    x_BTD, leave_vjp = jax.vjp(leave, once_taps, x_BTD, shared)

    # the loss
    (head,) = (name for name, weight in table.items() if weight.use == "head")
    scale = 1 / config.train.tokens_per_step if weights_BT is None else weights_BT.reshape(-1)
    x_MD, targets_M = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    with jax.named_scope("loss"):
        loss, accum[head], dx = cross_entropy.loss_and_grads(
            config.compute, config.model.softcap, params[head], accum[head], x_MD, targets_M, scale, head_key
        )

    # backward
    distinct = _distinct(tokens_BT, config.model.V)
    d_leave, dx, dshared = leave_vjp(dx.reshape(x_BTD.shape))
    dx, dshared = _layers_backward(
        config, params["blocks"], saved, tokens_BT, distinct, dx, dshared, accum, mix, layer_key
    )
    # Recomputed, behind a barrier: otherwise XLA keeps forward's f32 rows until now (d32: 16 MiB per row of tokens).
    tokens_BT, distinct, dx = lax.optimization_barrier((tokens_BT, distinct, dx))
    _, enter_vjp = jax.vjp(enter, rows(config, params, tokens_BT), once_taps)
    drows, d_enter = enter_vjp((dx, dshared))
    one = Mix(jnp.float32(1), jnp.float32(1))
    keys = iter([embed_key, *more])
    for name, d in drows.items():
        noise = dither_vectors(next(keys), max(tokens_BT.size, d.shape[-1]))
        accum[name] = _add_rows(accum[name], distinct, d, noise)
    for name in once_taps:
        noise = dither_vectors(next(keys), max(table[name].shape))
        accum[name] = add_rounded(accum[name], d_leave[name] + d_enter[name], noise, *mix.get(name, one))
    return loss, accum


def _layers_forward(
    config: Config, blocks: tuple[NamedParams, ...], tokens_BT: jax.Array, x_BTD: jax.Array, shared: Shared
) -> tuple[jax.Array, Shared, list[Saved]]:
    """The last block's output, what `leave` sees, and what each layer keeps: neither its parameters nor its rows."""
    table, model = weights.table(config.model), family.of(config)
    attention = causal(config)
    saved = []
    for i in range(config.model.L):
        layer, x_BTD = lax.optimization_barrier((blocks[i], x_BTD))
        has = weights.layer_weights(table, i)
        layer, rows = _read(config, has, layer, i, tokens_BT)

        def run(
            x: jax.Array, shared: Shared, rows: Rows, taps: Taps, i: int = i, layer: NamedParams = layer
        ) -> tuple[jax.Array, Shared]:
            attend = lambda q, k, v: attention(i, q, k, v)

            def block(layer: Any, taps: Taps, rows: Rows, x: jax.Array, shared: Shared) -> tuple[jax.Array, Shared]:
                return model.block(config, i, layer, taps, rows, x, shared, attend)[:2]

            return rematerialised(config, block)(layer, taps, rows, x, shared)

        with jax.named_scope(f"layer_{i}"):
            (x_BTD, shared), vjp = jax.vjp(run, x_BTD, shared, rows, _taps(has, "layer"))
        saved.append(Saved.without((layer, rows), vjp))
    return x_BTD, shared, saved


def _read(
    config: Config, has: weights.Table, layer: NamedParams, i: int, tokens_BT: jax.Array
) -> tuple[NamedParams, Rows]:
    """(the weights that layer i reads whole, the rows that the tokens select from its embeddings)."""
    whole = {name: stored for name, stored in layer.items() if has[name].use == "layer"}
    return whole, layer_rows(config, layer, i, tokens_BT)


def _layers_backward(
    config: Config,
    blocks: tuple[NamedParams, ...],
    saved: list[Saved],
    tokens_BT: jax.Array,
    distinct: Distinct,
    dx: jax.Array,
    dshared: Shared,
    accum: Arrays,
    mix: dict[str, Mix],
    key: jax.Array,
) -> tuple[jax.Array, Shared]:
    """Gradients of the first block's input and of what the layers share; the layers' accumulators in `accum` are replaced."""
    table = weights.table(config.model)
    names = sorted(name for name, weight in table.items() if weight.layered)
    sums = {name: dict(zip(table[name].layers, accum[name])) for name in names}
    longest = max(max(table[name].shape) for name in names)
    if any(table[name].use == "rows" for name in names):
        longest = max(longest, tokens_BT.size)
    noise = dither_vectors(key, longest)
    one = Mix(jnp.float32(1), jnp.float32(1))
    for i in reversed(range(config.model.L)):
        kept = saved.pop()
        # Behind a barrier with dx. Otherwise XLA transposes every layer's parameters before the microbatches, shares with
        # forward what is recomputed from the residuals, holding it for all layers (d32 in bf16: 1 GiB), and reads the rows
        # of all layers' embeddings' accumulators at once, in f32 (d24 of 2026: 0.1 GiB).
        arrays, dx = lax.optimization_barrier((kept.arrays, dx))
        layer, tokens_BT, distinct, dx = lax.optimization_barrier((blocks[i], tokens_BT, distinct, dx))
        read = _read(config, weights.layer_weights(table, i), layer, i, tokens_BT)
        new = {}
        with jax.named_scope(f"backward_{i}"):
            dx, dshared, drows, dws = kept._replace(arrays=arrays).vjp(read)((dx, dshared))
            draw = lambda name, i=i: shifted(noise, i * len(names) + names.index(name))
            for name, dw in dws.items():
                new[name] = add_rounded(sums[name][i], dw, draw(name), *mix.get(name, one))
            for name, d in drows.items():
                new[name] = _add_rows(sums[name][i], distinct, d, draw(name))
        # A layer is finished before the next begins. Otherwise XLA joins layers' sums and holds their dW until then.
        dx, dshared, new = lax.optimization_barrier((dx, dshared, new))
        for name, total in new.items():
            sums[name][i] = total
    accum |= {name: tuple(sums[name][i] for i in table[name].layers) for name in names}
    return dx, dshared


def _distinct(tokens_BT: jax.Array, V: int) -> Distinct:
    """Every table's rows are those of the same tokens, so they are sorted once per microbatch."""
    tokens = tokens_BT.reshape(-1)
    unique, place = jnp.unique(tokens, return_inverse=True, size=tokens.size, fill_value=V)
    return lax.optimization_barrier((unique, place.reshape(-1)))  # otherwise sorted once, but finished in each consumer


def _add_rows(total_VD: jax.Array, distinct: Distinct, drows_BTD: jax.Array, noise: Noise) -> jax.Array:
    """total plus an embedding's gradient. A token's occurrences are summed in f32 first; each row is then rounded once."""
    (unique, place), drows = distinct, drows_BTD.reshape(-1, drows_BTD.shape[-1])
    sums = jnp.zeros(drows.shape, F32).at[place].add(drows.astype(F32))
    old = total_VD.at[unique].get(mode="clip")
    new = add_rounded(old, sums, noise)
    return total_VD.at[unique].set(new, mode="drop", unique_indices=True)


def _taps(table: weights.Table, use: str) -> dict[str, jax.Array]:
    return {name: jnp.zeros(weight.shape, F32) for name, weight in table.items() if weight.use == use}


def operand_bytes(config: Config) -> int:
    """Bytes that `as_operands` makes of the parameters and holds for a step."""
    params = abstract_state(config).params
    made: Any = jax.eval_shape(lambda params: as_operands(config, params), params)
    arrays = [w.transposed for layer in made["blocks"] for w in layer.values() if isinstance(w, linear.Held)]
    if isinstance(made["head"], cross_entropy.Head):
        rows, columns = made["head"]
        arrays += jax.tree.leaves(columns if isinstance(params["head"], Quantized) else (rows, columns))
    return sum(a.size * a.dtype.itemsize for a in arrays)


def residual_bytes(config: Config) -> int:
    """Bytes that one microbatch's forward keeps for backward."""

    def kept(params: Params, tokens: jax.Array) -> list[jax.Array]:
        once = shared_weights(config, params)
        x, shared = family.of(config).enter(config, rows(config, params, tokens), None, once, None)
        saved = _layers_forward(config, params["blocks"], tokens, x, shared)[2]
        return list({id(leaf): leaf for layer in saved for leaf in layer.arrays.values()}.values())

    tokens = jax.ShapeDtypeStruct((config.train.microbatch, config.row), jnp.int32)
    arrays = jax.eval_shape(kept, abstract_state(config).params, tokens)
    return sum(a.size * a.dtype.itemsize for a in arrays)
