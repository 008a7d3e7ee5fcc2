"""Chunked causal attention against the plain formula in f32, gradients too."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops import attention


def plain(q, k, v, window=10_000):
    """softmax(q k^T / sqrt(H)) v with the whole T x T matrix; a query sees its own position and `window` before it."""
    T, H = q.shape[1], q.shape[-1]
    s = jnp.einsum("bqnh,bknh->bnqk", q, k) / jnp.sqrt(jnp.float32(H))
    seen = jnp.tril(jnp.ones((T, T), bool)) & jnp.triu(jnp.ones((T, T), bool), -window)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1), v)


MORE = [(300, 20), (1, 1), (256, 256), (600, 600), (600, 256), (600, 300), (7, 0)]


@pytest.mark.parametrize(("T", "window"), [(7, 7), *(pytest.param(*p, marks=pytest.mark.long) for p in MORE)])
def test_chunked_equals_plain(T, window):
    """The output and the three gradients are within 2e-5 of the plain formula, at lengths and windows around one chunk."""
    q, k, v, do = (jax.random.normal(jax.random.key(i), (2, T, 3, 16)) for i in range(4))
    out, vjp = jax.vjp(lambda q, k, v: plain(q, k, v, window), q, k, v)
    ours, ours_vjp = jax.vjp(functools.partial(attention.chunked, window, 0.25), q, k, v)
    chex.assert_trees_all_close(ours, out, atol=2e-5)
    chex.assert_trees_all_close(ours_vjp(do), vjp(do), atol=2e-5, rtol=2e-5)


def test_no_square_matrix():
    """At T=2048 no intermediate of forward or backward is as large as half of B*N*T*T."""
    B, T, N, H = 2, 2048, 2, 32
    assert max(sizes(B, T, N, H, T)) <= B * N * T * attention.QUERIES < B * N * T * T / 2


def sizes(B, T, N, H, window):
    """The size of every intermediate of forward and backward."""
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    both = lambda q, k, v: jax.vjp(functools.partial(attention.chunked, window, 0.2), q, k, v)[1](q)
    return [v.aval.size for eqn in jax.make_jaxpr(both)(x, x, x).eqns for v in eqn.outvars]


def test_a_window_costs_what_it_reaches():
    """With a window of a quarter of T, no scores are larger than a chunk of queries by the window and the chunk itself."""
    B, T, N, H = 1, 2048, 2, 8
    chunk = attention.QUERIES
    assert max(sizes(B, T, N, H, 512)) == N * chunk * (512 + chunk)


@pytest.mark.parametrize(
    ("window", "slots"), [(6, 7), *(pytest.param(*p, marks=pytest.mark.long) for p in [(64, 32), (6, 32), (6, 11)])]
)
def test_cached_equals_plain(window, slots):
    """Pieces of 5, 1, 1, 9 and 4 tokens over a cache, whole or with as many places as the window reaches and more.

    Empty places hold 9s, so that one that is read shows.
    """
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 20, 3, 16)) for i in range(3))
    want = plain(q, k, v, window)
    keys, values = (jnp.full((2, 3, slots, 16), 9.0) for _ in range(2))
    start = 0
    for size in (5, 1, 1, 9, 4):
        new, starts = slice(start, start + size), jnp.full(2, start)
        seen = attention.seen(starts, size, slots, window)
        got, keys, values = attention.cached(q[:, new], k[:, new], v[:, new], keys, values, starts, seen, window, 0.25)
        chex.assert_trees_all_close(got, want[:, new], atol=2e-5)
        start += size


@pytest.mark.parametrize(("window", "slots"), [pytest.param(64, 32, marks=pytest.mark.long), (6, 7)])
@pytest.mark.parametrize("int8", [False, True])
def test_cached_rows_have_positions_of_their_own(window, slots, int8):
    """A row that is 7 tokens ahead of another: each attends as if alone. int8 codes cost at most 2 % of the largest value."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 20, 3, 16)) for i in range(3))
    want, ahead = plain(q, k, v, window), np.array([0, 7])
    cache = [attention.empty(2, 3, slots, 16, jnp.int8 if int8 else jnp.float32) for _ in range(2)]
    cache = _ahead(cache, q, k, v, ahead, window)
    for first, size in ((0, 6), (6, 1), (7, 1)):
        at = ahead[:, None] + first + np.arange(size)
        take = lambda a, at=at: a[np.arange(2)[:, None], at]
        starts = jnp.asarray(at[:, 0])
        seen = attention.seen(starts, size, slots, window)
        got, *cache = attention.cached(take(q), take(k), take(v), cache[0], cache[1], starts, seen, window, 0.25)
        chex.assert_trees_all_close(got, take(want), atol=0.02 * float(jnp.abs(v).max()) if int8 else 2e-5)


def _ahead(cache, q, k, v, ahead, window):
    """The cache after each row's first tokens, of which row 1 has more."""
    for row, n in enumerate(ahead):
        for t in range(n):
            q1, k1, v1 = (a[row : row + 1, t : t + 1] for a in (q, k, v))
            own = jax.tree.map(lambda a, row=row: a[row : row + 1], cache)
            seen = attention.seen(jnp.array([t]), 1, own[0].shape[2], window)
            _, *own = attention.cached(q1, k1, v1, own[0], own[1], jnp.array([t]), seen, window, 0.25)
            cache = jax.tree.map(lambda a, b, row=row: a.at[row].set(b[0]), cache, own)
    return cache
