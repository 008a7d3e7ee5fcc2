"""The train step: accumulate gradients over microbatches, clip, update. Pure; to be jitted with the state donated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import weights
from nanojax.config import Config
from nanojax.step import optim
from nanojax.step.backward import as_operands, forward_backward
from nanojax.step.share import ALONE, Share
from nanojax.step.state import Arrays, State, accumulators
from nanojax.step.update import apply_all

Metrics = dict[str, jax.Array]  # f32 scalars


class Batch(NamedTuple):
    """All that one step reads: A microbatches of B rows.

    Attributes:
      tokens: int32 [A,B,T+1]; each token but a row's first is a target.
      weights: f32 [A,B,T], each target's weight in the loss sum(weights*nll), normalised by whoever makes the batch;
        negative where a token shall become less likely. None (pretraining): the loss is the mean over all targets.
    """

    tokens: jax.Array
    weights: jax.Array | None = None


def train_step(
    config: Config, state: State, batch: Batch, key: jax.Array | None = None, share: Share = ALONE
) -> tuple[State, Metrics]:
    """One update. Read next: backward.py (how gradients arise) and update.py (how they are applied).

    Args:
      batch: of several devices, this one's microbatches.
      key: for stochastic rounding. None: fold_in(key(seed + 1), step), so that a resumed run rounds as an uninterrupted one.
      share: this device's, if it is one of several (devices.py).

    Returns:
      The new state, and loss (nats per token, or sum(weights*nll)), lr (factor), momentum and grad_norm (before clipping;
      absent where gradients are summed into the momentum, which never holds them alone).
    """
    if key is None:
        key = jax.random.fold_in(jax.random.key(config.train.seed + 1), state.step)
    rate, momentum = optim.schedules(config)
    A = batch.tokens.shape[0]
    accum, mix = accumulators(config, state)
    params = as_operands(config, state.params)

    def microbatch(
        carry: tuple[Arrays, jax.Array], part: tuple[jax.Array, Batch]
    ) -> tuple[tuple[Arrays, jax.Array], None]:
        accum, loss = carry
        i, (tokens, weights_BT) = part
        draw = jax.random.fold_in(key, share.number(i, A))
        more, accum = forward_backward(config, params, accum, tokens, weights_BT, mix(i), draw)
        return (accum, loss + more), None

    (totals, loss), _ = lax.scan(microbatch, (accum, jnp.float32(0)), (jnp.arange(A), batch))
    totals, loss = share.met(weights.table(config.model), totals), share.summed(loss)
    if batch.weights is None:
        loss = loss / config.train.tokens_per_step
    metrics = {"loss": loss, "lr": jnp.asarray(rate(state.step)), "momentum": jnp.asarray(momentum(state.step))}

    scale = jnp.float32(1)
    if not any(optim.summed_into_momentum(config, weight) for weight in weights.table(config.model).values()):
        norm = jnp.sqrt(_squares(config, totals, share))
        metrics["grad_norm"] = norm
        if config.optim.clip:
            scale = jnp.minimum(1.0, config.optim.clip / (norm + 1e-6))

    params, opt, accum = apply_all(config, state, totals, scale, jax.random.fold_in(key, share.devices * A), share)
    return State(state.step + 1, params, opt, accum if state.accum else {}), metrics


def abstract_batch(config: Config) -> Batch:
    """Shapes and dtypes of the config's batch: with weights where not all tokens count alike."""
    A, B, T1 = config.batch_shape
    tokens: Any = jax.ShapeDtypeStruct((A, B, T1), jnp.int32)
    weights_ABT: Any = jax.ShapeDtypeStruct((A, B, T1 - 1), jnp.float32)
    return Batch(tokens, weights_ABT if config.data.kind != "text" else None)


def _squares(config: Config, totals: Arrays, share: Share) -> jax.Array:
    """Sum of squares of all gradients, f32."""
    layered = [(name, a) for name in sorted(totals) if isinstance(totals[name], tuple) for a in totals[name]]
    arrays = [*layered, *((name, a) for name, a in totals.items() if not isinstance(a, tuple))]
    total = lambda some: sum((jnp.sum(jnp.square(a.astype(jnp.float32))) for _, a in some), jnp.float32(0))
    if not share.several:
        return total(arrays)
    table = weights.table(config.model)
    divided = [(name, a) for name, a in arrays if share.divides(table[name])]
    return share.summed(total(divided)) + total([(name, a) for name, a in arrays if not share.divides(table[name])])
