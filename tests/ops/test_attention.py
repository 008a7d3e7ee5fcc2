"""Chunked causal attention against the plain formula in f32, gradients too."""

import chex
import jax
import jax.numpy as jnp
import pytest

from nanojax.ops import attention


def plain(q, k, v):
    """softmax(q k^T / sqrt(H)) v with the whole T x T matrix."""
    T, H = q.shape[1], q.shape[-1]
    s = jnp.einsum("bqnh,bknh->bnqk", q, k) / jnp.sqrt(jnp.float32(H))
    s = jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(s, -1), v)


@pytest.mark.parametrize("T", [7, *(pytest.param(T, marks=pytest.mark.long) for T in (1, 256, 600))])
def test_chunked_equals_plain(T):
    """The output and the three gradients are within 2e-5 of the plain formula, at lengths below, at and above one chunk."""
    q, k, v, do = (jax.random.normal(jax.random.key(i), (2, T, 3, 16)) for i in range(4))
    out, vjp = jax.vjp(plain, q, k, v)
    ours, ours_vjp = jax.vjp(attention.chunked, q, k, v)
    chex.assert_trees_all_close(ours, out, atol=2e-5)
    chex.assert_trees_all_close(ours_vjp(do), vjp(do), atol=2e-5, rtol=2e-5)


def test_no_square_matrix():
    """At T=2048 no intermediate of forward or backward is as large as half of B*N*T*T."""
    B, T, N, H = 2, 2048, 2, 32
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    both = lambda q, k, v: jax.vjp(attention.chunked, q, k, v)[1](q)
    jaxpr = jax.make_jaxpr(both)(x, x, x)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) <= B * N * T * attention.QUERIES < B * N * T * T / 2


def test_cached_equals_plain():
    """New queries over a cache with empty places after them attend to exactly their past."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 20, 3, 16)) for i in range(3))
    pad = lambda a: jnp.pad(a, ((0, 0), (0, 12), (0, 0), (0, 0)), constant_values=9.0)
    got = attention.cached(q[:, 13:17], pad(k), pad(v), jnp.int32(13))
    chex.assert_trees_all_close(got, plain(q, k, v)[:, 13:17], atol=2e-5)
