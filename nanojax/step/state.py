"""What a step turns into the next: parameters, optimizer state and accumulators, all of it donated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanojax import weights
from nanojax.config import Config, Format
from nanojax.model import Params, init_params
from nanojax.quant import BLOCK, zeros
from nanojax.quant.packed import LEVELS
from nanojax.step import optim

Arrays = dict[str, Any]  # by the weight's name: one array, or a tuple of one per layer
Opt = dict[str, dict[str, Any]]  # by the weight's name: the optimizer's arrays by kind, as stored


class State(NamedTuple):
    """The state of training.

    Attributes:
      step: updates so far, int32.
      params: as stored (model.params).
      opt: {weight: {"momentum"}, {"momentum", "second"} or {"mu", "nu"}, and "remainder" below 8 bits}, as stored. Arrays of
        a layer's weight are stacked over its layers. Of a momentum that gradients are summed into, and of a layer's
        embedding, there is one array per layer.
      accum: {weight: where its gradients are summed}, one array per layer for a layer's weight; zeros between steps. A weight
        whose gradients are summed into its momentum has none. Empty with rollouts and on several devices: there
        they exist within a step only, and between two steps their memory is free for the answers' cache or for checkpoints.
    """

    step: jax.Array
    params: Params
    opt: Opt
    accum: Arrays


class Mix(NamedTuple):
    """An accumulator becomes decay*old + weight*gradient: 1 and 1, or, where it is the momentum m, m (at a step's first
    microbatch) and 1-m."""

    decay: jax.Array
    weight: jax.Array


def init_state(config: Config) -> State:
    """Fresh state from config.train.seed. Call it under jit: eagerly it would hold f32 copies."""
    table = weights.table(config.model)
    opt: Opt = {}
    for name, weight in table.items():
        group = optim.group_of(config, name, weight)
        opt[name] = {m: _moment(weight, *kept) for m, kept in optim.moments(config, group, weight).items()}
        if optim.summed_into_momentum(config, weight):
            opt[name]["momentum"] = _sums(weight, config.stored.momentum)
        if remainder_bits(config, weight):
            *rows, columns = (len(weight.layers), *weight.shape)
            opt[name]["remainder"] = jnp.zeros((*rows, columns * config.stored.remainder // 8), jnp.uint8)
    accum = {} if config.data.kind == "rollouts" or config.several else _empty(config)
    return State(jnp.int32(0), init_params(config, jax.random.key(config.train.seed)), opt, accum)


def abstract_state(config: Config) -> State:
    """Shapes and dtypes of the state, nothing allocated."""
    return jax.eval_shape(lambda: init_state(config))


def accumulators(config: Config, state: State) -> tuple[Arrays, Callable[[jax.Array], dict[str, Mix]]]:
    """Where the step's gradients are summed, and how microbatch i is added: {weight: Mix}, none for a plain sum.

    The momentum becomes m*momentum + (1-m)*gradient, so that the first microbatch decays it and the others only add.
    """
    into_momentum = [
        n for n, weight in weights.table(config.model).items() if optim.summed_into_momentum(config, weight)
    ]
    accum = state.accum or _empty(config)
    m = jnp.asarray(optim.schedules(config)[1](state.step))
    mix = lambda i: {name: Mix(jnp.where(i == 0, m, 1.0), 1 - m) for name in into_momentum}
    return accum | {name: state.opt[name]["momentum"] for name in into_momentum}, mix


def remainder_bits(config: Config, weight: weights.Weight) -> int:
    """Bits per value of the weight's remainder (quant/packed.py); 0 at 8 bits and above."""
    return config.stored.remainder if config.stored_as(weight) in LEVELS else 0


def block_bits(config: Config) -> tuple[float, float]:
    """Bits per weight of the layers' matrices, scales and padding included: in params, and in remainders."""
    state, table = abstract_state(config), weights.table(config.model)
    matrices = [name for name, weight in table.items() if weight.stored == "blocks"]
    count = sum(table[name].parameters for name in matrices)
    params = [layer.get(name) for layer in state.params["blocks"] for name in matrices]
    remainders = [state.opt[name].get("remainder") for name in matrices]
    stored, rest = (
        8 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) / count for tree in (params, remainders)
    )
    return stored, rest


def accumulator_bytes(config: Config) -> int:
    """Bytes of the accumulators of a config whose state has none."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda: _empty(config)))
    return sum(a.size * a.dtype.itemsize for a in arrays)


def _moment(weight: weights.Weight, shape: tuple[int, ...], form: Format) -> Any:
    """Zeros of one of the optimizer's arrays, whose shape for one weight is `shape`."""
    if weight.use == "layer":
        return zeros((len(weight.layers), *shape), form, BLOCK)
    return tuple(zeros(shape, form, BLOCK) for _ in weight.layers) if weight.layered else zeros(shape, form, BLOCK)


def _empty(config: Config) -> Arrays:
    """Accumulators of zeros."""
    table = weights.table(config.model)
    own = {name: weight for name, weight in table.items() if not optim.summed_into_momentum(config, weight)}
    return {name: _sums(weight, config.summed_as(weight)) for name, weight in own.items()}


def _sums(weight: weights.Weight, form: str) -> Any:
    """Zeros that the weight's gradients are added to."""
    empty = lambda: jnp.zeros(weight.shape, {"f32": jnp.float32, "bf16": jnp.bfloat16}[form])
    return tuple(empty() for _ in weight.layers) if weight.layered else empty()
