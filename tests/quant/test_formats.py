"""Formats and stochastic rounding: stored values are right in the mean, and stay right under repetition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax import quant
from nanojax.quant import rounding

FORMS = ("f32", "bf16", "int8")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("block", [0, 256])
def test_rounding_is_unbiased(form, block):
    """The mean over 4,000 independent encodings lies within 4.5 sigma of the value, for each of 512 values (P < 0.4%)."""
    x, n = normal(0, 1, 512), 4000
    decoded = jax.vmap(lambda key: quant.decode(quant.encode(x, form, key, block)))(
        jax.random.split(jax.random.key(1), n)
    )
    decoded = np.asarray(decoded, np.float64)
    sigma = decoded.std(0) / np.sqrt(n) + 1e-9
    worst = np.max(np.abs(decoded.mean(0) - np.asarray(x)) / sigma)
    assert worst < 4.5 + 0.5, worst  # max of 512 normals is above 4.9 in 0.05% of cases; the key is fixed


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_thousandth_of_a_grid_step_survives(form):
    """1,000 updates of 0.001 grid steps move the mean of 100,000 values by one grid step, within 4 sigma (1.3%)."""
    n, grid = 100_000, 1 / 128 if form == "bf16" else 1.0
    x = jnp.full((1, n), 1.25 if form == "bf16" else 20.0).at[0, 0].set(1.9 if form == "bf16" else 127.0)
    q = quant.encode(x, form)
    start = np.asarray(quant.decode(q))[0, 1:].mean()

    def update(q, key):
        return quant.encode(quant.decode(q).at[0, 1:].add(0.001 * grid), form, key), None

    q, _ = jax.lax.scan(update, q, jax.random.split(jax.random.key(0), 1000))
    moved = (np.asarray(quant.decode(q), np.float64)[0, 1:].mean() - start) / grid
    # each rounding adds variance p(1-p) <= 1/4 grid^2, so 1000 of them give at most sqrt(250/n) = 0.05
    assert abs(moved - 1) < 4 * np.sqrt(0.001 * 1000 / n) + 0.002, moved


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [0, 256])
def test_encoding_again_changes_nothing(form, block):
    """100 stochastic re-encodings without update leave codes and scales as they were, bit for bit."""
    q = quant.encode(normal(0, 64, 512) * jnp.exp(3 * normal(1, 64, 1)), form, jax.random.key(2), block)

    def again(q, key):
        return quant.encode(quant.decode(q), form, key, block), None

    last, _ = jax.lax.scan(again, q, jax.random.split(jax.random.key(3), 100))
    first = jax.tree.leaves(q)[0]
    chex.assert_trees_all_equal(jax.tree.leaves(last)[0], first)
    chex.assert_trees_all_close(quant.decode(last), quant.decode(q), rtol=3e-6)


def test_nearest_is_within_half_a_step():
    """Without a key, int8 errs by at most half a step of amax/127 (plus f32 rounding)."""
    x = normal(5, 32, 300) * 7
    error = jnp.abs(quant.decode(quant.encode(x, "int8")) - x)
    assert bool(jnp.all(error <= jnp.max(jnp.abs(x), -1, keepdims=True) / 254 * (1 + 1e-5)))


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_any_finite_row_encodes(values):
    """Zeros, tiny and the largest floats: codes stay within 127, decoding is finite and within one step.

    A row below 127 times the smallest normal float, 1.5e-36, has no scale that XLA keeps, and may be decoded as zeros.
    """
    x = jnp.asarray([values], jnp.float32)
    for key in (None, jax.random.key(0)):
        q = quant.encode(x, "int8", key)
        y = np.asarray(quant.decode(q), np.float64)
        step = np.abs(np.asarray(x, np.float64)).max() / 127
        assert np.abs(np.asarray(q.codes, np.int32)).max() <= 127
        assert np.all(np.isfinite(y)) and np.all(np.abs(y - np.asarray(x, np.float64)) <= step * (1 + 1e-4) + 1.5e-36)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_is_the_encoding_of_zeros(form):
    """`zeros` equals `encode(zeros)` in every leaf: shape, dtype and value."""
    chex.assert_trees_all_equal(quant.zeros((3, 512), form, 256), quant.encode(jnp.zeros((3, 512)), form, None, 256))


def test_noise_is_uniform_and_independent():
    """2^20 16-bit noises: chi-square over 256 bins, neighbours, and two keys, all within 5 sigma of independence."""
    a, b = (np.asarray(rounding.noise_u16(jax.random.key(k), (1024, 1024)), np.float64) for k in (0, 1))
    counts = np.bincount((a.reshape(-1) // 256).astype(int), minlength=256)
    chi = ((counts - 4096) ** 2 / 4096).sum()
    assert abs(chi - 255) < 5 * np.sqrt(2 * 255), chi
    for u, v in ((a[:, :-1], a[:, 1:]), (a[:-1], a[1:]), (a, b)):
        assert abs(np.corrcoef(u.reshape(-1), v.reshape(-1))[0, 1]) < 5 / 1024


def test_bf16_of_nonfinite_stays():
    """The random bits do not change Inf and NaN."""
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    y = np.asarray(rounding.round_bf16(x, jax.random.key(0)), np.float32)
    assert np.isposinf(y[0]) and np.isneginf(y[1]) and np.isnan(y[2])


@pytest.mark.long
def test_dithered_bf16_sums_are_right_in_the_mean():
    """Adds 0.02 to 0.9 of a bf16 step, 4,096 draws: the mean sum is exact within 5 sigma; at a power of two, below which the
    grid is finer, within an eighth of a step. Adding zero changes nothing."""
    old = jnp.exp2(jax.random.uniform(jax.random.key(0), (16, 32), minval=-3, maxval=3)).astype(jnp.bfloat16)
    old = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, old.shape), old, -old).astype(jnp.float32)
    step = jnp.exp2(jnp.floor(jnp.log2(jnp.abs(old)))) * 2.0**-7
    addend = jnp.sign(old) * step * jnp.linspace(0.02, 0.9, 32)[None]
    draw = lambda key: rounding.dithered(old, rounding.dither_vectors(key, 32))
    keys = jax.random.split(jax.random.key(2), 4096)
    sums = jax.vmap(lambda key: (draw(key) + addend).astype(jnp.bfloat16).astype(jnp.float32))(keys)
    error = np.asarray((sums.mean(0) - (old + addend)) / step)
    powers = np.asarray(jnp.abs(old) == step * 2.0**7)
    assert 0 < powers.sum() < 10
    assert np.abs(error[~powers]).max() < 5 * 0.5 / 64
    assert np.abs(error[powers]).max() < 0.125 + 5 * 0.5 / 64
    same = jax.vmap(lambda key: draw(key).astype(jnp.bfloat16).astype(jnp.float32))(keys[:64])
    assert np.array_equal(np.where(powers, old, same), np.broadcast_to(old, same.shape))
