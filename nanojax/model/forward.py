"""The one walk through the layers, and what stands on it: logits, token losses, cached decoding. Training has its own walk,
step/backward.py, because it needs each layer's gradient by itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import weights
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.model import family
from nanojax.model.gpt import POLICIES, RESIDUALS, Head
from nanojax.model.params import Params, layer_rows, rows, rows_before, shared_weights
from nanojax.model.seam import Start
from nanojax.ops import attention, cross_entropy
from nanojax.ops.linear import float_dtype

LayerAttend = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # Attend of layer i
Cache = tuple[tuple[attention.Kept, attention.Kept], ...]  # keys and values [B,N,U,H] of each layer (ops/attention.py)


def walk(
    config: Config,
    params: Params,
    tokens_BT: jax.Array,
    attend: LayerAttend,
    start: Start = None,
    before_BT: jax.Array | None = None,
) -> tuple[jax.Array, list[Any]]:
    """The last block's output [B,T,D], in the compute dtype and not normed, and what `attend` kept of each layer.

    Args:
      attend: (i, q, k, v) -> (output [B,T,N,H], what to keep); what attention means here: full, cached, packed.
      start: as seam.Start.
      before_BT: the token before each, -1 where there is none. None: the one to its left.
    """
    model = family.of(config)
    shared_params = shared_weights(config, params)
    before = None if before_BT is None else rows_before(config, params, before_BT)
    x_BTD, shared = model.enter(config, rows(config, params, tokens_BT), before, shared_params, None)
    kept = []
    for i, layer in enumerate(params["blocks"]):
        own = layer_rows(config, layer, i, tokens_BT)
        x_BTD, shared, k = model.block(config, i, layer, None, own, x_BTD, shared, functools.partial(attend, i), start)
        kept.append(k)
    return model.leave(config, shared_params, None, x_BTD, shared), kept


def causal(config: Config) -> LayerAttend:
    """Attention over the positions up to one's own that the layer's window reaches, as `walk` takes it."""
    implementation = attention.default_implementation(config.compute.attention)
    windows, scale = weights.windows(config.model), attention_scale(config)
    return lambda i, q, k, v: (attention.attention(q, k, v, implementation, windows[i], scale), None)


def attention_scale(config: Config) -> float:
    """What attention multiplies q k^T with: that q and k are scaled after their norm is part of it."""
    return config.model.qk_scale**2 / math.sqrt(config.model.H)


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


def empty_cache(config: Config, B: int, T: int, padding: int = 0, int8: bool = False) -> Cache:
    """Zeros in the compute dtype, or as int8 codes, for T positions, or for as many as a layer's window reaches.

    Args:
      padding: how many tokens that do not count `forward_cached` may be given behind those that do.
    """
    m, dtype = config.model, jnp.int8 if int8 else float_dtype(config.compute)
    zeros = lambda U: attention.empty(B, m.N, U, m.H, dtype)
    slots = [min(T, window + 1 + padding) for window in weights.windows(m)]
    return tuple((zeros(U), zeros(U)) for U in slots)


def hidden_cached(
    config: Config, params: Params, tokens_BS: jax.Array, cache: Cache, start: jax.Array, before_B: jax.Array | None
) -> tuple[jax.Array, Cache]:
    """The last block's output [B,S,D] for S new tokens at positions start.., and the cache with them in it.

    Args:
      cache: of all rows, or of the first ones: rows behind these attend to nothing, and what is computed of them is not used.
      start: int32, of all rows or of each [B].
      before_B: the token before the first of these, -1 where there is none. None: start is 0.
    """
    windows, scale = weights.windows(config.model), attention_scale(config)
    B, S = tokens_BS.shape
    start_B = jnp.broadcast_to(start, (B,))
    kinds = [(k.shape[2], window) for (k, _), window in zip(cache, windows, strict=True)]
    first_B = start_B[: cache[0][0].shape[0]]
    seen = {kind: attention.seen(first_B, S, *kind) for kind in dict.fromkeys(kinds)}

    def attend(i: int, *qkv: jax.Array) -> tuple[jax.Array, Any]:
        q, k, v = (a.reshape(B, S, *a.shape[2:])[: len(first_B)] for a in qkv)
        out, *kept = attention.cached(q, k, v, *cache[i], first_B, seen[kinds[i]], windows[i], scale)
        out = jnp.pad(out, ((0, B - len(out)), (0, 0), (0, 0), (0, 0)))
        return out.reshape(1, B * S, *out.shape[2:]), tuple(kept)

    first = jnp.full(B, -1) if before_B is None else before_B
    before_BS = jnp.concatenate([first[:, None].astype(tokens_BS.dtype), tokens_BS[:, :-1]], 1)
    # The rows lie behind each other in one, so that each may have a start of its own.
    one_row = lambda a: a.reshape(1, B * S)
    moved = (start_B[:, None] + jnp.arange(S)[None]).reshape(-1) - jnp.arange(B * S)
    x_1MD, kept = walk(config, params, one_row(tokens_BS), attend, moved, one_row(before_BS))
    return x_1MD.reshape(B, S, -1), tuple(kept)


def forward_cached(
    config: Config, params: Params, tokens_BS: jax.Array, cache: Cache, start: jax.Array, before_B: jax.Array | None
) -> tuple[jax.Array, Cache]:
    """f32 logits [B,S,V] of S new tokens, and the cache with them in it. Arguments as `hidden_cached`'s."""
    x_BSD, cache = hidden_cached(config, params, tokens_BS, cache, start, before_B)
    return head(config, params, x_BSD), cache


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
