"""Causal attention: cuDNN's flash kernels on an NVIDIA GPU, chunks of queries elsewhere, and a cached form for decoding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nanojax.ops.rows import F32
from nanojax.quant.formats import Quantized, quantize_rows

Kept = jax.Array | Quantized  # a layer's keys or values [B,N,U,H] of earlier tokens
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
    s = jnp.einsum("bnqh,bnkh->bnqk", q, k, preferred_element_type=F32) * scale
    distance = ahead + jnp.arange(q.shape[2])[:, None] - jnp.arange(k.shape[2])[None, :]
    return jnp.where((distance >= 0) & (distance <= window), s, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(window: int, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention one chunk of queries at a time. Keys that none of them sees are never read; backward recomputes the scores."""
    return _chunked_fwd(window, scale, q, k, v)[0]


def _chunked_fwd(window, scale, q, k, v):
    outs, lses = [], []
    q_BNTH, k_BNTH, v_BNTH = (a.swapaxes(1, 2) for a in (q, k, v))  # once: the products want a head's tokens together
    for first, start, end in _bounds(q.shape[1], window):
        s = _scores(q_BNTH[:, :, start:end], k_BNTH[:, :, first:end], start - first, window, scale)
        lse = jax.nn.logsumexp(s, -1, keepdims=True)
        p = jnp.exp(s - lse).astype(v.dtype)
        out = jnp.einsum("bnqk,bnkh->bnqh", p, v_BNTH[:, :, first:end], preferred_element_type=F32)
        outs.append(out.astype(q.dtype))
        lses.append(lse)
    out = checkpoint_name(jnp.concatenate(outs, 2).swapaxes(1, 2), "attn")
    lse = checkpoint_name(jnp.concatenate(lses, 2), "attn")
    return out, (q, k, v, out, lse)


def _chunked_bwd(window, scale, residuals, do):
    """FlashAttention-2's backward (arXiv 2307.08691, algorithm 2): ds = p*(dp - rowsum(do*o))."""
    *qkv, out, lse = residuals
    q, k, v, do, out = (a.swapaxes(1, 2) for a in (*qkv, do, out))  # [B,N,T,H]
    delta = jnp.sum(do.astype(F32) * out.astype(F32), -1, keepdims=True)
    # dk and dv as [B,N,H,T]: a CPU transposes the narrow q and do for its products, not ds and p (8% of backward).
    dqs, dk, dv = [], *(jnp.zeros(a.swapaxes(2, 3).shape, F32) for a in (k, v))
    for first, start, end in _bounds(q.shape[2], window):
        qc, kc, vc, doc = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], do[:, :, start:end]
        p = jnp.exp(_scores(qc, kc, start - first, window, scale) - lse[:, :, start:end])
        dp = jnp.einsum("bnqh,bnkh->bnqk", doc, vc, preferred_element_type=F32)
        ds = (p * (dp - delta[:, :, start:end]) * scale).astype(q.dtype)
        dqs.append(jnp.einsum("bnqk,bnkh->bnqh", ds, kc, preferred_element_type=F32).astype(q.dtype))
        dk = dk.at[..., first:end].add(jnp.einsum("bnqh,bnqk->bnhk", qc, ds, preferred_element_type=F32))
        dvc = jnp.einsum("bnqh,bnqk->bnhk", doc, p.astype(q.dtype), preferred_element_type=F32)
        dv = dv.at[..., first:end].add(dvc)
    dk, dv = (d.swapaxes(2, 3).astype(k.dtype) for d in (dk, dv))
    return tuple(d.swapaxes(1, 2) for d in (jnp.concatenate(dqs, 2), dk, dv))


chunked.defvjp(_chunked_fwd, _chunked_bwd)


def cached(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    old_k: Kept,
    old_v: Kept,
    start_B: jax.Array,
    seen_BSK: jax.Array,
    window: int,
    scale: float,
) -> tuple[jax.Array, Kept, Kept]:
    """Attention of S new tokens at positions start.. of each row over themselves and a cache, and the cache with them in it.

    A cache is [B,N,U,H], floats or int8 codes with a scale per token and head; the order lets both products read it as it lies.
    Position p has slot p % U, so that a cache that holds fewer than all positions keeps the last ones. The slots of a whole
    cache are read after the new tokens are written, and what lies beyond its end is dropped; those of a smaller one are read
    before, since new tokens take the slots of some that earlier new ones still see.

    Args:
      seen_BSK: what `seen` says for this window and U.
    """
    S, U = q_BSNH.shape[1], old_k.shape[2]
    query_BS = start_B[:, None] + jnp.arange(S)[None]
    whole = window >= U
    k, v = (_written(old, new, query_BS, whole) for old, new in ((old_k, k_BSNH), (old_v, v_BSNH)))
    if S == 1 or whole:
        keys, values = k, v
    else:
        keys, values = (_joined(old, new) for old, new in ((old_k, k_BSNH), (old_v, v_BSNH)))
    k_floats, k_scale = _parts(keys, q_BSNH.dtype)
    v_floats, v_scale = _parts(values, q_BSNH.dtype)
    s = jnp.einsum("bnqh,bnkh->bnqk", q_BSNH.swapaxes(1, 2), k_floats, preferred_element_type=F32)
    s = s * scale if k_scale is None else s * (scale * k_scale)
    p = jax.nn.softmax(jnp.where(seen_BSK[:, None], s, -jnp.inf), -1)
    p = p if v_scale is None else p * v_scale
    out = jnp.einsum("bnqk,bnkh->bnqh", p.astype(v_floats.dtype), v_floats, preferred_element_type=F32)
    return out.swapaxes(1, 2).astype(q_BSNH.dtype), k, v


def seen(start_B: jax.Array, S: int, U: int, window: int) -> jax.Array:
    """Which keys each of S new tokens sees, bool [B,S,K]: the slots of a cache, and of a smaller one then the new tokens.

    To be computed once for all layers of a window. Fused into each layer's softmax it would be computed for every head, and
    on a GPU for every value of a head.
    """
    query_BS = start_B[:, None] + jnp.arange(S)[None]
    places = jnp.arange(U)[None]
    if S == 1:  # slot u holds the last position that is u modulo U; below 0 it is empty
        position = query_BS - (query_BS - places) % U
    elif window >= U:
        position = jnp.broadcast_to(places, (len(start_B), U))
    else:
        before_B1 = start_B[:, None] - 1
        position = jnp.concatenate([before_B1 - (before_B1 - places) % U, query_BS], 1)
    distance = query_BS[:, :, None] - position[:, None]
    return lax.optimization_barrier((distance >= 0) & (distance <= window) & (position >= 0)[:, None])


def empty(B: int, N: int, U: int, H: int, dtype: Any) -> Kept:
    """A cache [B,N,U,H] of zeros: floats of `dtype`, or codes and scales where that is int8."""
    codes = jnp.zeros((B, N, U, H), dtype)
    return Quantized(codes, jnp.zeros((B, N, U, 1), F32)) if dtype == jnp.int8 else codes


def _written(old: Kept, new_BSNH: jax.Array, position_BS: jax.Array, whole: bool) -> Kept:
    """The cache with the new tokens in it: of a smaller one's, the last U."""
    S, U = position_BS.shape[1], old.shape[2]
    last = S if whole else min(S, U)
    slots = position_BS[:, S - last :]
    slots = slots if whole and S > 1 else slots % U
    # Of one update XLA makes a dynamic-update-slice, writes it twice for its two readers, and copies the cache four times for
    # that on a CPU. Of two equal ones it makes what it makes of many: one write, in place.
    twice = 2 if slots.size == 1 else 1
    rows, slots = jnp.arange(twice * len(slots))[:, None] // twice, jnp.repeat(slots, twice, 0)
    mode = "promise_in_bounds" if S == 1 else "drop"
    put = lambda a, b: a.at[rows, :, slots].set(jnp.repeat(b[:, S - last :], twice, 0).astype(a.dtype), mode=mode)
    return jax.tree.map(put, old, quantize_rows(new_BSNH) if isinstance(old, Quantized) else new_BSNH)


def _joined(old: Kept, new_BSNH: jax.Array) -> Kept:
    """The cache with the new tokens behind it."""
    new = quantize_rows(new_BSNH) if isinstance(old, Quantized) else new_BSNH
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.swapaxes(1, 2).astype(a.dtype)], 2), old, new)


def _parts(kept: Kept, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """What enters the product, and for codes the scale [B,N,1,U] that its sums, or the other operand, are multiplied by."""
    if isinstance(kept, Quantized):
        return kept.codes.astype(dtype), kept.scale.swapaxes(2, 3)
    return kept, None


@functools.cache
def default_implementation(choice: str) -> str:
    """Resolves "auto": cudnn if jax's default backend is a GPU, otherwise chunked."""
    if choice != "auto":
        return choice
    return "cudnn" if jax.default_backend() == "gpu" else "chunked"
