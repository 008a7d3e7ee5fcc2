"""The chunked loss and its gradients equal jax.grad of the whole-logits formula."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import model
from nanojax.config import Config
from nanojax.ops import cross_entropy


def whole(config: Config, head: jax.Array, x: jax.Array, targets: jax.Array, weights: jax.Array | float) -> jax.Array:
    """sum(weights * cross entropy) from all logits at once."""
    logits = model.head(config, {"head": head}, x)
    logp = jax.nn.log_softmax(logits, -1)
    return -jnp.sum(weights * jnp.take_along_axis(logp, targets[:, None], 1)[:, 0])


def loss_and_grads(config: Config, head: Any, total: Any, x: Any, targets: Any, weights: Any) -> Any:
    """cross_entropy.loss_and_grads with what it needs of the config."""
    key = jax.random.key(3)
    return cross_entropy.loss_and_grads(config.compute, config.model.softcap, head, total, x, targets, weights, key)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [64, *(pytest.param(n, marks=pytest.mark.long) for n in (8, 1000))])
def test_loss_and_grads_exact(tiny: Callable[..., Config], chunk: int, weighted: bool) -> None:
    """Loss, dx and the head's gradient within 1e-6 relative of jax.grad, whatever the chunk, with one weight for all tokens or
    one for each (some of them 0 or negative); the accumulator is added to."""
    config = tiny(compute={"loss_chunk": chunk, "residuals": "all"}, model={"seq": 32})
    keys = jax.random.split(jax.random.key(0), 5)
    head = 0.3 * jax.random.normal(keys[0], (128, 64))
    x, total = jax.random.normal(keys[1], (64, 64)), jax.random.normal(keys[3], (128, 64))
    targets = jax.random.randint(keys[2], (64,), 0, 128)
    each = 0.01 * jax.random.normal(keys[4], (64,)) * (jnp.arange(64) % 3 > 0).astype(jnp.float32)
    weights = each if weighted else 0.01
    want, (dhead, dx) = jax.value_and_grad(whole, (1, 2))(config, head, x, targets, weights)
    got, dhead_got, dx_got = loss_and_grads(config, head, 0 * total, x, targets, weights)
    np.testing.assert_allclose(got * (1.0 if weighted else 0.01), want, rtol=1e-5 if weighted else 1e-6)
    for a, b in ((dhead_got, dhead), (dx_got, dx)):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-6
    added = loss_and_grads(config, head, total, x, targets, weights)[1]
    chex.assert_trees_all_close(added, total + dhead, atol=2e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_int8_head_is_right_in_the_mean(tiny: Callable[..., Config], weighted: bool) -> None:
    """With an int8 head: the loss within 1e-3 relative of f32's. Of one draw, dx and the head's gradient are within 0.15 of
    jax.grad's in f32 (norm of the difference over the norm); the mean of 64 draws within 0.03.

    What one draw adds is about 1/127 of the variance that the draw of the targets gives the gradient: 0.09 of its size. In the
    mean of 64 that is 0.011; the rounding of h and of the head, the same in each draw, leaves 0.01 to 0.02. Rounded to nearest,
    the gradient would be off by 0.5: all probabilities below 1/254 would be lost, here most.
    """
    config = tiny(compute={"loss_chunk": 64, "head": "int8"}, model={"seq": 64, "vocab": 1024})
    exact = tiny(compute={"loss_chunk": 64}, model={"seq": 64, "vocab": 1024})
    keys = jax.random.split(jax.random.key(0), 5)
    head, x = 0.1 * jax.random.normal(keys[0], (1024, 64)), jax.random.normal(keys[1], (64, 64))
    targets = jax.random.randint(keys[2], (64,), 0, 1024)
    weights = jax.random.uniform(keys[4], (64,)) if weighted else 0.01
    want, grads = jax.value_and_grad(whole, (1, 2))(exact, head, x, targets, weights)

    def draw(key: jax.Array) -> Any:
        c, cap = config.compute, config.model.softcap
        return cross_entropy.loss_and_grads(c, cap, head, jnp.zeros_like(head), x, targets, weights, key)

    losses, *draws = jax.vmap(jax.jit(draw))(jax.random.split(keys[3], 64))
    np.testing.assert_allclose(losses[0] * (1.0 if weighted else 0.01), want, rtol=1e-3)
    for got, exactly in zip(draws, grads):
        error = lambda a, b=exactly: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        assert error(got[0]) < 0.15, error(got[0])
        assert error(jnp.mean(got, 0)) < 0.03, error(jnp.mean(got, 0))


@pytest.mark.long
def test_token_losses_match_logits(tiny: Callable[..., Config]) -> None:
    """token_losses equals log-softmax of model.forward at every position, 1e-5."""
    config = tiny()
    params = model.init_params(config, jax.random.key(0))
    params["head"] = 0.2 * jax.random.normal(jax.random.key(1), params["head"].shape)
    tokens = jax.random.randint(jax.random.key(2), (2, 33), 0, 128)
    logp = jax.nn.log_softmax(model.forward(config, params, tokens[:, :-1]), -1)
    want = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
    chex.assert_trees_all_close(model.token_losses(config, params, tokens), want, atol=1e-5)


def test_logits_exist_for_one_chunk_only(tiny: Callable[..., Config]) -> None:
    """At V=4096 and 2,048 tokens no array of the compiled loss is larger than one chunk's f32 logits."""
    config = tiny(model={"vocab": 4096, "seq": 1024}, compute={"loss_chunk": 128}, train={"tokens_per_step": 2048})
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = lambda head, total, x, t: loss_and_grads(config, head, total, x, t, 1.0)
    args = (spec(4096, 64), spec(4096, 64), spec(2048, 64), jax.ShapeDtypeStruct((2048,), jnp.int32))
    memory: Any = jax.jit(run, donate_argnums=1).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * 128 * 4096 * 4 < 2048 * 4096 * 4
