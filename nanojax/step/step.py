"""The train step: accumulate gradients over microbatches, clip, update. Pure; to be jitted with the state donated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import weights
from nanojax.config import Config
from nanojax.step import optim
from nanojax.step.backward import Mix, forward_backward
from nanojax.step.state import Arrays, State, abstract_state
from nanojax.step.update import apply_all

Metrics = dict[str, jax.Array]  # f32 scalars


class Batch(NamedTuple):
    """All that one step reads: A microbatches of B rows.

    Attributes:
      tokens: int32 [A,B,T+1]; each token but a row's first is a target.
      weights: f32 [A,B,T], each target's weight in the loss sum(weights*nll), normalised by whoever makes the batch. None
        (pretraining): the loss is the mean over all targets.
    """

    tokens: jax.Array
    weights: jax.Array | None = None


def train_step(config: Config) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step as the loop calls it: jit with donate_argnums=0.

    Its key is fold_in(key(seed + 1), step), so a resumed run rounds as the uninterrupted one does.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed + 1), state.step)
        return keyed_step(config, state, batch, key)

    return step


def keyed_step(config: Config, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
    """One update. `key` only feeds stochastic rounding. Read next: backward.py, update.py.

    Metrics: loss (nats per token, or sum(weights*nll)), grad_norm (before clipping; absent where gradients are summed into
    the momentum, which is never seen apart from them), lr (factor), momentum.
    """
    rate, momentum = optim.schedules(config)
    A = batch.tokens.shape[0]
    totals, loss = accumulate(config, state, batch, key)
    metrics = {"loss": loss, "lr": rate(state.step), "momentum": momentum(state.step)}
    scale = jnp.float32(1)
    if len(totals) == len(state.accum):
        norm = jnp.sqrt(_squares(totals))
        metrics["grad_norm"] = norm
        if config.optim.clip:
            scale = jnp.minimum(1.0, config.optim.clip / (norm + 1e-6))
    params, opt, accum = apply_all(config, state, totals, scale, jax.random.fold_in(key, A))
    return State(state.step + 1, params, opt, accum), metrics


def accumulate(config: Config, state: State, batch: Batch, key: jax.Array) -> tuple[Arrays, jax.Array]:
    """Gradients of the step's loss summed over its microbatches, by weight, and the loss."""
    table = weights.table(config.model)
    folded = [name for name, weight in table.items() if optim.summed_into_momentum(config, weight)]
    m = jnp.asarray(optim.schedules(config)[1](state.step))

    def microbatch(
        carry: tuple[Arrays, jax.Array], inputs: tuple[jax.Array, Batch]
    ) -> tuple[tuple[Arrays, jax.Array], None]:
        accum, loss = carry
        i, part = inputs
        mix = {name: Mix(jnp.where(i == 0, m, 1.0), 1 - m) for name in folded}
        part_key = jax.random.fold_in(key, i)
        more, accum = forward_backward(config, state.params, accum, part.tokens, part.weights, mix, part_key)
        return (accum, loss + more), None

    start = state.accum | {name: state.opt[name]["momentum"] for name in folded}
    (totals, loss), _ = lax.scan(microbatch, (start, jnp.float32(0)), (jnp.arange(batch.tokens.shape[0]), batch))
    return totals, loss if batch.weights is not None else loss / config.train.tokens_per_step


def _squares(totals: Arrays) -> jax.Array:
    """Sum of squares of all gradients, f32."""
    layered = [a for name in sorted(totals) if isinstance(totals[name], tuple) for a in totals[name]]
    once = [a for a in totals.values() if not isinstance(a, tuple)]
    return sum((jnp.sum(jnp.square(a.astype(jnp.float32))) for a in (*layered, *once)), jnp.float32(0))


def abstract_batch(config: Config) -> Batch:
    """Shape and dtype of a pretraining batch."""
    return Batch(jax.ShapeDtypeStruct(config.batch_shape, jnp.int32))  # pyright: ignore[reportArgumentType]


def compiled(config: Config) -> Any:
    """`train_step` compiled for jax's default device before any state exists: a GPU's autotuning wants scratch memory."""
    lowered = jax.jit(train_step(config), donate_argnums=0).lower(abstract_state(config), abstract_batch(config))
    return compiled_for_gpu(lowered) if jax.default_backend() == "gpu" else lowered.compile()


# Scales, residual adds and accumulators become epilogues of the products that make them. Modelled, d32 on an RTX 4070: 7.5k
# tokens/s instead of 5.8k (experimental in XLA, but in jax 0.10 to 0.12).
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_experimental_gemm_fusion_v2": True}


def compiled_for_gpu(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """`lowered` compiled with GPU_OPTIONS, or, where XLA fails with them (it does on matrices of width 256 or 512), without."""
    try:
        return lowered.compile(compiler_options={**GPU_OPTIONS, **(options or {})})
    except (jax.errors.JaxRuntimeError, IndexError):  # what else is wrong is wrong without them, too
        return lowered.compile(compiler_options=options)
