"""Muon, AdamW and the schedules: equal to optax where it has them, to the published formulas in numpy where not."""

from collections.abc import Callable
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanojax import config_rules, quant, weights
from nanojax.config import Config
from nanojax.step import optim, update

KEY = jax.random.key(7)


def layer(seed: int, config: Config) -> dict[str, jax.Array]:
    """Random gradients of one layer's matrices."""
    shapes = {name: w.shape for name, w in weights.layer_weights(weights.table(config.model), 0).items()}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items())}


def muon(config: Config, parts: int = 1) -> Any:
    """Muon as the config has it."""
    return optim.muon(config, optim.groups(config)["matrix"], parts)


def numpy_newton_schulz(g, steps=5):
    """Keller Jordan's quintic iteration in float64."""
    x = g / (np.linalg.norm(g) + 1e-7)
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if flip else x


def numpy_muon(grads, steps, nesterov=True):
    """nanochat's Muon as published, one matrix [rows, columns], its rates and its momentum warm-up: the summed update."""
    buf, total = np.zeros_like(grads[0]), 0.0
    for step, g in enumerate(grads):
        frac = min(step / 300, 1)
        m = (1 - frac) * 0.85 + frac * 0.95
        buf = buf + (g - buf) * (1 - m)
        u = g + (buf - g) * m if nesterov else buf
        left = min(1.0, (steps - step) / round(0.2 * steps))
        total -= 0.02 * left * max(1, g.shape[0] / g.shape[1]) ** 0.5 * numpy_newton_schulz(u)
    return total


@pytest.mark.long
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_the_formula(tiny: Callable[..., Config], nesterov: bool) -> None:
    """20 steps of f32 Muon equal float64 numpy to 2e-4 of the largest entry; q, k and v are three matrices."""
    config = tiny(optim={"nesterov": nesterov})
    for name, weight in weights.layer_weights(weights.table(config.model), 0).items():
        tx = muon(config, weight.parts)
        grads = [layer(i, config)[name] for i in range(20)]
        state, total = tx.init(grads[0]), jnp.zeros_like(grads[0])
        run = jax.jit(tx.update)
        for g in grads:
            updates, state = run(g, state, key=KEY)
            total += cast(jax.Array, updates)
        assert int(state.step) == 20
        parts = [np.split(np.asarray(g, np.float64), weight.parts) for g in grads]
        want = np.concatenate([numpy_muon([p[i] for p in parts], 20, nesterov) for i in range(weight.parts)])
        np.testing.assert_allclose(total, want, atol=2e-4 * np.abs(want).max())


def test_orthogonalised_momentum_is_muon(tiny: Callable[..., Config]) -> None:
    """Muon of finished momenta, where gradients are summed into them, gives heavy-ball Muon's updates bit for bit."""
    config = tiny(optim={"nesterov": False, "clip": 0.0})
    ours, group = muon(config), optim.groups(config)["matrix"]
    g = layer(0, config)["up"]
    want, state = ours.update(g, ours.init(g), key=KEY)
    tx: Any = optim.orthogonalise(config, group)
    got, after = tx.update(state.moments["momentum"], tx.init(g))
    chex.assert_trees_all_equal(got, want)
    assert int(after.step) == 1 and after.moments == {}


def test_muon_equals_optax_where_they_agree(tiny: Callable[..., Config]) -> None:
    """Heavy ball at constant momentum: optax.contrib.muon gives the same 5 updates (it has no q/k/v split; rtol 1e-3)."""
    config = tiny(optim={"nesterov": False, "momentum_start": 0.95, "warmdown": 0.0})
    theirs = optax.contrib.muon(
        0.02, beta=0.95, nesterov=False, muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 0)
    )
    ours = muon(config)
    for name in ("o", "up", "down"):
        grads = [layer(i, config)[name] for i in range(5)]
        params = jnp.zeros_like(grads[0])
        a, b = ours.init(params), theirs.init(params)
        mine, optaxs = jax.jit(ours.update), jax.jit(theirs.update)
        for g in grads:
            u, a = mine(g, a, key=KEY)
            with jax.numpy_dtype_promotion("standard"):  # optax promotes
                v, b = optaxs(g, b, params)
            chex.assert_trees_all_close(u, v, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_optax(tiny: Callable[..., Config], weight_decay: float) -> None:
    """20 steps of f32 AdamW with the rate's schedule equal optax.adamw to 1e-6."""
    config = tiny(optim={"weight_decay": weight_decay})
    rate, _ = optim.schedules(config)
    lr = 0.2 * (64 / 768) ** -0.5
    theirs = optax.adamw(lambda t: lr * rate(t), b1=0.8, b2=0.95, eps=1e-10, weight_decay=weight_decay)
    ours: Any = optim.adamw(config, optim.groups(config)["embed"])  # its rate is 0.2 here
    p = q = jax.random.normal(KEY, (8, 64))
    a, b = ours.init(p), theirs.init(q)
    for i in range(20):
        g = jax.random.normal(jax.random.key(i), p.shape)
        u, a = ours.update(g, a, p, key=KEY)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            v, b = theirs.update(g, b, q)
        p, q = p + cast(jax.Array, u), q + cast(jax.Array, v)
    chex.assert_trees_all_close(p, q, rtol=1e-5, atol=1e-6)


def test_schedules_are_nanochats():
    """Learning-rate factor: 1, then linear over the last 20% to 0; momentum 0.85 to 0.95 over 300 steps."""
    from nanojax import config as c

    config = config_rules.resolve(c.Config(train=c.Train(steps=1000), optim=c.Optim(warmup=0.1, final_lr=0.1)))
    rate, momentum = optim.schedules(config)
    for step in (0, 50, 99, 100, 500, 800, 801, 900, 999):
        left = (1000 - step) / 200
        want = (step + 1) / 100 if step < 100 else 1.0 if step <= 800 else left + (1 - left) * 0.1
        np.testing.assert_allclose(rate(step), want, rtol=1e-6)
        np.testing.assert_allclose(momentum(step), 0.85 + 0.1 * min(step / 300, 1), rtol=1e-6)


def test_newton_schulz_flattens_singular_values():
    """Singular values of tall, wide and batched Gaussians land in [0.6, 1.3] after five iterations."""
    for shape in ((64, 64), (96, 32), (3, 32, 96)):
        s = jnp.linalg.svd(optim.newton_schulz(jax.random.normal(KEY, shape), 5, jnp.float32), compute_uv=False)
        assert float(jnp.min(s[..., : int(0.9 * s.shape[-1])])) > 0.6 and float(jnp.max(s)) < 1.3


def test_newton_schulz_by_gram_matrices():
    """Of tall, wide and batched 4:1 matrices whose singular values fall as 1/k: iterating Gram matrices in f32 is the plain f32
    iteration within 1e-4 (norm of the difference over the norm), and bf16, which takes that form from 2:1 on, within 0.1.

    In f32 6e-6 was seen. In bf16 it was 0.04 to 0.06, and 0.05 with the plain iteration; without a new start it is 20.
    """
    error = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    for shape in ((256, 64), (2, 64, 256)):
        u, _, v = jnp.linalg.svd(jax.random.normal(KEY, shape), full_matrices=False)
        g = (u / jnp.arange(1.0, 65.0).reshape((1,) * (u.ndim - 1) + (64,))) @ v
        g /= jnp.linalg.norm(g, axis=(-2, -1), keepdims=True)
        plain = optim.newton_schulz(g, 5, jnp.float32)
        assert error(optim.newton_schulz_by_gram(g, 5), plain) < 1e-4
        assert error(optim.newton_schulz(g, 5, jnp.bfloat16), plain) < 0.1


@pytest.mark.long
def test_int8_momentum_follows_f32(tiny: Callable[..., Config]) -> None:
    """Over 100 steps of noisy gradients with a drift, int8 momentum stays within 4% of its f32 twin (relative norm).

    Theory: a rounding adds at most (1/6)^0.5 steps of amax/127, a sum of them with m=0.95 is 10^0.5 times one, and the amax
    of 64 normals is about 2.4 of their rms: 2.4*(10/6)^0.5/127 = 2.4%.
    """
    config8, config32 = tiny(stored={"momentum": "int8"}), tiny()
    a, b = muon(config8), muon(config32)
    step8, step32 = jax.jit(a.update), jax.jit(b.update)
    for name in ("qkv", "down"):
        g0 = layer(0, config32)[name]
        sa, sb = a.init(g0), b.init(g0)
        for i in range(100):
            g = 0.3 * g0 + layer(i + 1, config32)[name]
            _, sa = step8(g, sa, key=jax.random.fold_in(KEY, i))
            _, sb = step32(g, sb, key=KEY)
        got, want = quant.decode(sa.moments["momentum"]), sb.moments["momentum"]
        assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.04


@pytest.mark.long
def test_int8_adam_does_not_diverge(tiny: Callable[..., Config]) -> None:
    """Gradients that are zero in most steps and span 10^6 within a block: no int8 update exceeds 3 times the f32 maximum."""
    config8, config32 = tiny(stored={"adam": "int8"}, optim={"warmdown": 0.0}), tiny(optim={"warmdown": 0.0})
    a, b = (cast(Any, optim.adamw(c, optim.groups(c)["embed"])) for c in (config8, config32))
    p = jnp.zeros((16, 256))
    scale = jnp.exp(jnp.linspace(-7, 7, 256))
    sa, sb = a.init(p), b.init(p)
    step8, step32 = jax.jit(a.update), jax.jit(b.update)
    worst8 = worst32 = 0.0
    for i in range(300):
        g = scale[None] * jax.random.normal(jax.random.key(i), p.shape) * float(i % 5 == 0)
        u, sa = step8(g, sa, p, key=jax.random.fold_in(KEY, i))
        v, sb = step32(g, sb, p, key=KEY)
        worst8, worst32 = max(worst8, float(jnp.max(jnp.abs(u)))), max(worst32, float(jnp.max(jnp.abs(v))))
    assert np.isfinite(worst8) and worst8 < 3 * worst32, (worst8, worst32)


@pytest.mark.parametrize("form", ["f32", "bf16", "int8"])
def test_apply_moves_the_mean(form: Any) -> None:
    """decode(apply_rounded(p, u)) averages to decode(p)+u over 500 keys: 5 sigma for each value (sigma of 5 events at least), and
    for all of them together; f32 is exact."""
    p = quant.encode(jax.random.normal(KEY, (4, 64)), form)
    u = 1e-3 * jax.random.normal(jax.random.key(1), (4, 64))
    many = jax.jit(jax.vmap(lambda k: quant.decode(update.apply_rounded(p, u, form, k))))(jax.random.split(KEY, 500))
    many, want = np.asarray(many, np.float64), np.asarray(quant.decode(p) + u, np.float64)
    grid = np.ptp(many, 0).max(initial=1e-12)
    floor = grid * np.sqrt(5) / 500 if form != "f32" else 1e-6
    assert np.all(np.abs(many.mean(0) - want) <= 5 * np.maximum(many.std(0) / np.sqrt(500), floor))
    assert abs((many.mean(0) - want).mean()) <= 5 * np.sqrt((many.var(0) / 500).mean() / want.size) + 1e-7
