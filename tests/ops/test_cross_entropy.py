"""The chunked loss and its gradients equal jax.grad of the whole-logits formula."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import model
from nanojax.ops import cross_entropy


def whole(config, head, x, targets, scale):
    """scale * summed cross entropy from all logits at once."""
    logits = model.Head(config).apply({"params": {"head": head}}, x)
    logp = jax.nn.log_softmax(logits, -1)
    return -scale * jnp.sum(jnp.take_along_axis(logp, targets[:, None], 1))


@pytest.mark.parametrize("chunk", [8, 64, 1000])
def test_loss_and_grads_exact(tiny, chunk):
    """Loss, dx and the head's gradient within 1e-6 relative of jax.grad, whatever the chunk; the accumulator is added to."""
    config = tiny(compute={"loss_chunk": chunk, "residuals": "all"}, model={"seq": 32})
    keys = jax.random.split(jax.random.key(0), 4)
    head = 0.3 * jax.random.normal(keys[0], (128, 64))
    x, total = jax.random.normal(keys[1], (64, 64)), jax.random.normal(keys[3], (128, 64))
    targets = jax.random.randint(keys[2], (64,), 0, 128)
    want, (dhead, dx) = jax.value_and_grad(whole, (1, 2))(config, head, x, targets, 0.01)
    got, dhead_got, dx_got = cross_entropy.loss_and_grads(config, head, 0 * total, x, targets, 0.01, keys[3])
    np.testing.assert_allclose(got * 0.01, want, rtol=1e-6)
    for a, b in ((dhead_got, dhead), (dx_got, dx)):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-6
    added = cross_entropy.loss_and_grads(config, head, total, x, targets, 0.01, keys[3])[1]
    chex.assert_trees_all_close(added, total + dhead, atol=2e-6)


def test_token_losses_match_logits(tiny):
    """token_losses equals log-softmax of model.forward at every position, 1e-5."""
    config = tiny()
    params = model.init_params(config, jax.random.key(0))
    params["head"] = 0.2 * jax.random.normal(jax.random.key(1), params["head"].shape)
    tokens = jax.random.randint(jax.random.key(2), (2, 33), 0, 128)
    logp = jax.nn.log_softmax(model.forward(config, params, tokens[:, :-1]), -1)
    want = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
    chex.assert_trees_all_close(model.token_losses(config, params, tokens), want, atol=1e-5)


def test_logits_exist_for_one_chunk_only(tiny):
    """At V=4096 and 2,048 tokens no array of the compiled loss is larger than one chunk's f32 logits."""
    config = tiny(model={"vocab": 4096, "seq": 1024}, compute={"loss_chunk": 128}, train={"tokens_per_step": 2048})
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = lambda head, total, x, t: cross_entropy.loss_and_grads(config, head, total, x, t, 1.0, jax.random.key(0))
    args = (spec(4096, 64), spec(4096, 64), spec(2048, 64), jax.ShapeDtypeStruct((2048,), jnp.int32))
    memory = jax.jit(run, donate_argnums=1).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * 128 * 4096 * 4 < 2048 * 4096 * 4
