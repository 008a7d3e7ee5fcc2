"""The JAX model against the independent numpy oracle: logits, loss and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import numpy_gpt

from nanojax import model
from nanojax.config import Compute, Config, Model, Train
from nanojax.config_rules import resolve

SIZES = [  # depth, width, head_dim, vocab, tokens
    (1, 64, 64, 97, 12),
    (2, 128, 128, 257, 33),
    (4, 192, 64, 300, 40),
]


def _config(depth, width, head_dim, vocab, T, **model_keys):
    return resolve(
        Config(
            model=Model(depth=depth, width=width, head_dim=head_dim, vocab=vocab, seq=T, **model_keys),
            compute=Compute(loss_chunk=T),
            train=Train(steps=1, tokens_per_step=T),
        )
    )


def _relative(ours, theirs):
    """Largest difference over the largest magnitude of the array."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("size", [*SIZES[:2], pytest.param(SIZES[2], marks=pytest.mark.long)])
def test_logits_and_every_gradient_equal_numpy(size):
    """Logits, loss and the six gradients of random f32 parameters agree with float64 numpy to 1e-5 relative."""
    config = _config(*size)
    T = size[-1]
    params = numpy_gpt.random_params(size[0], config)
    rows = np.random.default_rng(1).integers(0, config.model.V, (2, T + 1)).astype(np.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:]

    logits = jax.jit(model.forward, static_argnums=0)(config, params, tokens)
    assert logits.dtype == jnp.float32
    assert _relative(logits, numpy_gpt.forward(params, tokens, config)) < 1e-5

    def mean_loss(params: model.Params) -> jax.Array:
        return model.token_losses(config, params, jnp.asarray(rows)).mean()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(jax.tree.map(jnp.asarray, params))
    loss_np, grads_np = numpy_gpt.loss_and_grads(params, tokens, targets, config)
    assert float(loss) == pytest.approx(loss_np, rel=1e-6)
    errors = jax.tree.map(_relative, grads, grads_np)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


@pytest.mark.parametrize("keys", [pytest.param({"softcap": 3.0}, marks=pytest.mark.long), {"rope_base": 100.0}])
def test_the_oracle_reads_the_same_options(keys):
    """softcap and rope_base change both implementations, in the same way (1e-5), and really change the logits."""
    base, changed = _config(2, 64, 32, 64, 24), _config(2, 64, 32, 64, 24, **keys)
    params = numpy_gpt.random_params(3, base)
    params["head"] = params["head"] * 8
    tokens = np.random.default_rng(4).integers(0, 64, (1, 24)).astype(np.int32)
    theirs = numpy_gpt.forward(params, tokens, changed)
    assert _relative(model.forward(changed, params, jnp.asarray(tokens)), theirs) < 1e-5
    assert _relative(model.forward(base, params, jnp.asarray(tokens)), theirs) > 1e-2


def test_cached_forward_equals_numpy():
    """Prompt, then token by token with the KV cache: logits equal the numpy full forward to 1e-4 at every position."""
    config = _config(3, 128, 64, 199, 40)
    params = numpy_gpt.random_params(5, config)
    tokens = np.random.default_rng(6).integers(0, 199, (2, 40)).astype(np.int32)
    theirs = numpy_gpt.forward(params, tokens, config)
    step = jax.jit(model.forward_cached, static_argnums=0)
    cache = model.empty_cache(config, 2, 40)
    logits, cache = step(config, params, tokens[:, :16], cache, jnp.int32(0), None)
    parts = [logits]
    for t in range(16, 40):
        logits, cache = step(config, params, tokens[:, t : t + 1], cache, jnp.int32(t), tokens[:, t - 1])
        parts.append(logits)
    assert np.abs(np.concatenate(parts, 1) - theirs).max() < 1e-4


def test_a_wrong_rotation_would_be_seen(monkeypatch):
    """Rotating by plus the angle, as Llama does, moves the oracle's logits by over 1e-2."""
    config = _config(2, 64, 32, 64, 24)
    params = numpy_gpt.random_params(7, config)
    tokens = np.random.default_rng(8).integers(0, 64, (1, 24))
    right, tables = numpy_gpt.forward(params, tokens, config), numpy_gpt.rope_tables
    monkeypatch.setattr(numpy_gpt, "rope_tables", lambda *a: (tables(*a)[0], -tables(*a)[1]))
    assert _relative(numpy_gpt.forward(params, tokens, config), right) > 1e-2
