"""The one walk through the layers, and what stands on it: logits, token losses, cached decoding. Training has its own walk,
step/backward.py, because it needs each layer's gradient by itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.model import family
from nanojax.model.gpt import POLICIES, RESIDUALS, Head
from nanojax.model.params import Params, rows, shared_weights
from nanojax.model.seam import Start
from nanojax.ops import attention, cross_entropy
from nanojax.ops.linear import float_dtype

LayerAttend = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # Attend of layer i
Cache = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values [B,T,N,H] of each layer


def walk(
    config: Config, params: Params, tokens_BT: jax.Array, attend: LayerAttend, start: Start = 0
) -> tuple[jax.Array, list[Any]]:
    """The last block's output [B,T,D], in the compute dtype and not normed, and what `attend` kept of each layer.

    Args:
      attend: (i, q, k, v) -> (output [B,T,N,H], what to keep); what attention means here: full, cached, packed.
      start: the position of a row's first token, or an array [T] added to 0, 1, ... to give positions.
    """
    model = family.of(config)
    shared_params = shared_weights(config, params)
    x_BTD, shared = model.enter(config, rows(config, params, tokens_BT), shared_params, None)
    kept = []
    for i, layer in enumerate(params["blocks"]):
        x_BTD, k = model.block(config, i, layer, None, x_BTD, shared, functools.partial(attend, i), start)
        kept.append(k)
    return model.leave(config, shared_params, None, x_BTD, shared), kept


def causal(config: Config) -> LayerAttend:
    """Attention over all positions up to one's own, as `walk` takes it."""
    implementation = attention.default_implementation(config.compute.attention)
    return lambda i, q, k, v: (attention.attention(q, k, v, implementation), None)


def hidden(config: Config, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The last block's output [B,T,D], not normed, in the compute dtype."""
    return walk(config, params, tokens_BT, causal(config))[0]


def head(config: Config, params: Params, x: jax.Array) -> jax.Array:
    """f32 logits [...,V] of the last block's output x [...,D]."""
    flat: Any = Head(config).apply({"params": {"head": params["head"]}}, x.reshape(-1, x.shape[-1]))
    return flat.reshape(*x.shape[:-1], -1)


def forward(config: Config, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """f32 logits [B,T,V]. Differentiable in float params. Holds all logits: for tests, sampling and small evaluations."""
    return head(config, params, hidden(config, params, tokens_BT))


def token_losses(config: Config, params: Params, tokens_BT1: jax.Array) -> jax.Array:
    """-log p(next token) in nats, f32 [B,T], of rows of T+1 tokens. Logits exist for one chunk of tokens at a time."""
    x_BTD, targets_BT = hidden(config, params, tokens_BT1[:, :-1]), tokens_BT1[:, 1:]
    chunks = cross_entropy.chunks(config.compute, x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1))
    cap = config.model.softcap
    losses = lax.map(lambda chunk: cross_entropy.nll(cap, head(config, params, chunk[0]), chunk[1])[0], chunks)
    return losses.reshape(targets_BT.shape)


def empty_cache(config: Config, B: int, T: int) -> Cache:
    """Zeros in the compute dtype for T positions."""
    shape = (B, T, config.model.N, config.model.H)
    zeros = lambda: jnp.zeros(shape, float_dtype(config.compute))
    return tuple((zeros(), zeros()) for _ in range(config.model.L))


def forward_cached(
    config: Config, params: Params, tokens_BS: jax.Array, cache: Cache, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """f32 logits [B,S,V] of S new tokens at positions start.., and the cache with them in it."""

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        k_BTNH, v_BTNH = (
            lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1) for old, new in zip(cache[i], (k, v))
        )
        return attention.cached(q, k_BTNH, v_BTNH, start), (k_BTNH, v_BTNH)

    x_BSD, kept = walk(config, params, tokens_BS, attend, start)
    return head(config, params, x_BSD), tuple(kept)


def residual_names(config: Config) -> tuple[str, ...]:
    """The names that `compute.residuals` keeps. UserError if it is none of inputs, cheap, all or names joined by +."""
    choice = config.compute.residuals
    names = POLICIES.get(choice, tuple(choice.split("+")))
    for name in names:
        if name not in RESIDUALS:
            raise UserError(
                f"--compute.residuals={choice}: choose {', '.join(POLICIES)}, or join names by +: {', '.join(RESIDUALS)}"
            )
    return names


def rematerialised(config: Config, block: Callable[..., Any]) -> Callable[..., Any]:
    """`block` under jax.checkpoint: differentiated, it keeps what compute.residuals names and recomputes the rest."""
    names = residual_names(config)
    if set(names) == set(RESIDUALS):
        return block

    def keep(primitive: Any, *_: Any, **parameters: Any) -> bool:
        if primitive.name == "name":
            return parameters["name"] in names
        return "attn" in names and "dot_product_attention_fwd" in primitive.name  # cuDNN's output and log-sum-exp

    return jax.checkpoint(block, policy=keep, prevent_cse=False)
