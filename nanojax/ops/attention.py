"""Causal attention: cuDNN's flash kernels on an NVIDIA GPU, chunks of queries elsewhere, and a cached form for decoding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nanojax.ops.rows import F32

QUERIES = 256  # per chunk: B*N*256*T scores exist at one time instead of B*N*T*T


def attention(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, implementation: str, window: int, scale: float
) -> jax.Array:
    """softmax(scale * q k^T) v [B,T,N,H], each query over its own position and up to `window` before it.

    Args:
      implementation: "cudnn" (bf16 on an NVIDIA GPU) or "chunked".
    """
    if implementation == "cudnn":
        narrow: Any = {"local_window_size": (window, 0)} if window < q_BTNH.shape[1] else {}
        out = jax.nn.dot_product_attention(
            q_BTNH, k_BTNH, v_BTNH, scale=scale, is_causal=True, implementation="cudnn", **narrow
        )
        return checkpoint_name(out, "attn")
    return chunked(window, scale, q_BTNH, k_BTNH, v_BTNH)


def _bounds(T: int, window: int) -> list[tuple[int, int, int]]:
    """(first key, first query, end of both) of each chunk of queries."""
    return [(max(0, start - window), start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def _scores(q: jax.Array, k: jax.Array, ahead: int, window: int, scale: float) -> jax.Array:
    """Scaled, masked f32 scores [B,N,C,S] of C queries against S keys, the first of which is `ahead` positions earlier."""
    s = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=F32) * scale
    distance = ahead + jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None, :]
    return jnp.where((distance >= 0) & (distance <= window), s, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(window: int, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention one chunk of queries at a time. Keys that none of them sees are never read; backward recomputes the scores."""
    return _chunked_fwd(window, scale, q, k, v)[0]


def _chunked_fwd(window, scale, q, k, v):
    outs, lses = [], []
    for first, start, end in _bounds(q.shape[1], window):
        s = _scores(q[:, start:end], k[:, first:end], start - first, window, scale)
        lse = jax.nn.logsumexp(s, -1, keepdims=True)
        p = jnp.exp(s - lse).astype(v.dtype)
        outs.append(jnp.einsum("bnqk,bknh->bqnh", p, v[:, first:end], preferred_element_type=F32).astype(q.dtype))
        lses.append(lse)
    out = checkpoint_name(jnp.concatenate(outs, 1), "attn")
    lse = checkpoint_name(jnp.concatenate(lses, 2), "attn")
    return out, (q, k, v, out, lse)


def _chunked_bwd(window, scale, residuals, do):
    """FlashAttention-2's backward (arXiv 2307.08691, algorithm 2): ds = p*(dp - rowsum(do*o))."""
    q, k, v, out, lse = residuals
    delta = jnp.einsum("bqnh,bqnh->bnq", do.astype(F32), out.astype(F32))[..., None]
    dqs, dk, dv = [], jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32)
    for first, start, end in _bounds(q.shape[1], window):
        qc, kc, vc, doc = q[:, start:end], k[:, first:end], v[:, first:end], do[:, start:end]
        p = jnp.exp(_scores(qc, kc, start - first, window, scale) - lse[:, :, start:end])
        dp = jnp.einsum("bqnh,bknh->bnqk", doc, vc, preferred_element_type=F32)
        ds = (p * (dp - delta[:, :, start:end]) * scale).astype(q.dtype)
        dqs.append(jnp.einsum("bnqk,bknh->bqnh", ds, kc, preferred_element_type=F32).astype(q.dtype))
        dk = dk.at[:, first:end].add(jnp.einsum("bnqk,bqnh->bknh", ds, qc, preferred_element_type=F32))
        dv = dv.at[:, first:end].add(jnp.einsum("bnqk,bqnh->bknh", p.astype(q.dtype), doc, preferred_element_type=F32))
    return jnp.concatenate(dqs, 1), dk.astype(k.dtype), dv.astype(v.dtype)


chunked.defvjp(_chunked_fwd, _chunked_bwd)


def cached(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    old_k: jax.Array,
    old_v: jax.Array,
    start: jax.Array,
    window: int,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of S new tokens at positions start.. over themselves and a cache, and the cache with them in it.

    Position p has slot p % U of a cache [B,U,N,H], so that one that holds fewer than all positions keeps the last ones. The
    slots of a whole cache are read after the new tokens are written; those of a smaller one before, since new tokens take the
    slots of some that earlier new ones still see.
    """
    S, U = q_BSNH.shape[1], old_k.shape[1]
    new = [(old_k, k_BSNH.astype(old_k.dtype)), (old_v, v_BSNH.astype(old_v.dtype))]
    if S == 1 or window >= U:
        k, v = (lax.dynamic_update_slice_in_dim(old, added, start % U, 1) for old, added in new)
    else:
        last = min(S, U)
        slots = (start + jnp.arange(S - last, S)) % U
        k, v = (old.at[:, slots].set(added[:, S - last :]) for old, added in new)
    query = start + jnp.arange(S)
    if window < U:
        # slot u holds the last position before start that is u modulo U; below 0 it is empty
        position = jnp.concatenate([start - 1 - (start - 1 - jnp.arange(U)) % U, query])
        keys = jnp.concatenate([old_k, k_BSNH.astype(old_k.dtype)], 1)
        values = jnp.concatenate([old_v, v_BSNH.astype(old_v.dtype)], 1)
    else:
        position, keys, values = jnp.arange(U), k, v
    s = jnp.einsum("bqnh,bknh->bnqk", q_BSNH, keys, preferred_element_type=F32) * scale
    distance = query[:, None] - position[None, :]
    allowed = (distance >= 0) & (distance <= window) & (position >= 0)[None]
    p = jax.nn.softmax(jnp.where(allowed, s, -jnp.inf), -1).astype(values.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", p, values, preferred_element_type=F32).astype(q_BSNH.dtype), k, v


@functools.cache
def default_implementation(choice: str) -> str:
    """Resolves "auto": cudnn if jax's default backend is a GPU, otherwise chunked."""
    if choice != "auto":
        return choice
    return "cudnn" if jax.default_backend() == "gpu" else "chunked"
