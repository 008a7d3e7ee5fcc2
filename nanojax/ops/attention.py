"""Causal attention: cuDNN's flash kernels on an NVIDIA GPU, chunks of queries elsewhere, and a cached form for decoding."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanojax.ops.rows import F32

QUERIES = 256  # per chunk: B*N*256*T scores exist at one time instead of B*N*T*T


def attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, implementation: str) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v [B,T,N,H], each query over positions up to its own.

    Args:
      implementation: "cudnn" (bf16 on an NVIDIA GPU) or "chunked".
    """
    if implementation == "cudnn":
        out = jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn")
        return checkpoint_name(out, "attn")
    return chunked(q_BTNH, k_BTNH, v_BTNH)


def _bounds(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def _scores(q: jax.Array, k: jax.Array, start: int) -> jax.Array:
    """Scaled, masked f32 scores [B,N,C,S] of the queries at start..start+C against keys 0..S."""
    s = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=F32) * (1 / math.sqrt(q.shape[-1]))
    allowed = start + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])[None, :]
    return jnp.where(allowed, s, -jnp.inf)


@jax.custom_vjp
def chunked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention one chunk of queries at a time. Keys after the chunk are never read; backward recomputes the scores."""
    return _chunked_fwd(q, k, v)[0]


def _chunked_fwd(q, k, v):
    outs, lses = [], []
    for start, end in _bounds(q.shape[1]):
        s = _scores(q[:, start:end], k[:, :end], start)
        lse = jax.nn.logsumexp(s, -1, keepdims=True)
        p = jnp.exp(s - lse).astype(v.dtype)
        outs.append(jnp.einsum("bnqk,bknh->bqnh", p, v[:, :end], preferred_element_type=F32).astype(q.dtype))
        lses.append(lse)
    out = checkpoint_name(jnp.concatenate(outs, 1), "attn")
    lse = checkpoint_name(jnp.concatenate(lses, 2), "attn")
    return out, (q, k, v, out, lse)


def _chunked_bwd(residuals, do):
    """FlashAttention-2's backward (arXiv 2307.08691, algorithm 2): ds = p*(dp - rowsum(do*o))."""
    q, k, v, out, lse = residuals
    scale = 1 / math.sqrt(q.shape[-1])
    delta = jnp.einsum("bqnh,bqnh->bnq", do.astype(F32), out.astype(F32))[..., None]
    dqs, dk, dv = [], jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32)
    for start, end in _bounds(q.shape[1]):
        qc, doc = q[:, start:end], do[:, start:end]
        p = jnp.exp(_scores(qc, k[:, :end], start) - lse[:, :, start:end])
        dp = jnp.einsum("bqnh,bknh->bnqk", doc, v[:, :end], preferred_element_type=F32)
        ds = (p * (dp - delta[:, :, start:end]) * scale).astype(q.dtype)
        dqs.append(jnp.einsum("bnqk,bknh->bqnh", ds, k[:, :end], preferred_element_type=F32).astype(q.dtype))
        dk = dk.at[:, :end].add(jnp.einsum("bnqk,bqnh->bknh", ds, qc, preferred_element_type=F32))
        dv = dv.at[:, :end].add(jnp.einsum("bnqk,bqnh->bknh", p.astype(q.dtype), doc, preferred_element_type=F32))
    return jnp.concatenate(dqs, 1), dk.astype(k.dtype), dv.astype(v.dtype)


chunked.defvjp(_chunked_fwd, _chunked_bwd)


def cached(q_BSNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, start: jax.Array) -> jax.Array:
    """Attention of S new queries at positions start..start+S over a cache of T positions, filled up to start+S."""
    s = jnp.einsum("bqnh,bknh->bnqk", q_BSNH, k_BTNH, preferred_element_type=F32) * (1 / math.sqrt(q_BSNH.shape[-1]))
    allowed = start + jnp.arange(q_BSNH.shape[1])[:, None] >= jnp.arange(k_BTNH.shape[1])[None, :]
    p = jax.nn.softmax(jnp.where(allowed, s, -jnp.inf), -1).astype(v_BTNH.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", p, v_BTNH, preferred_element_type=F32).astype(q_BSNH.dtype)


@functools.cache
def default_implementation(choice: str) -> str:
    """Resolves "auto": cudnn if jax's default backend is a GPU, otherwise chunked."""
    if choice != "auto":
        return choice
    return "cudnn" if jax.default_backend() == "gpu" else "chunked"
