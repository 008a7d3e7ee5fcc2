"""Causality by gradient: no loss depends on a later token, and every loss depends on each earlier one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import model
from nanojax.config import Config
from nanojax.ops import attention

Make = Callable[..., Config]
T = attention.QUERIES + 8  # two chunks of queries
POSITIONS = np.array([0, 1, 7, attention.QUERIES - 1, attention.QUERIES, T - 2])  # whose losses are differentiated


def influence(config: Config) -> np.ndarray:
    """|d loss at POSITIONS / d embedding of the token at each position|, summed over the embedding: [positions, T] f32.

    Every position has a token of its own, so the gradient of the embedding table's rows is that of the positions.
    """
    tokens = np.random.default_rng(0).permutation(config.model.V)[: T + 1].astype(np.int32)
    params = model.init_params(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)  # some weights start at zero, which would hide what they pass on
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [a + 0.1 * jax.random.normal(key, a.shape, a.dtype) for a, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, noise)

    def losses(embed: jax.Array) -> jax.Array:
        logits = model.forward(config, {**params, "embed": embed}, jnp.asarray(tokens[None, :-1]))[0]
        nll = -jax.nn.log_softmax(logits, -1)[jnp.arange(T), tokens[1:]]
        return nll[POSITIONS]

    gradient = jax.jit(jax.jacrev(losses))(params["embed"])  # [positions, V, D]
    return np.abs(np.asarray(gradient)).sum(-1)[:, tokens[:-1]]


@pytest.fixture
def config(tiny: Make) -> Config:
    return tiny(model=dict(vocab=2 * T, seq=T), compute=dict(loss_chunk=T, attention="chunked"),
                train=dict(tokens_per_step=T, microbatch=1))  # fmt: skip


def test_no_loss_depends_on_a_later_token(config: Config) -> None:
    """The gradient is exactly 0 at every later position, and nowhere 0 at the earlier ones."""
    later = np.arange(T) > POSITIONS[:, None]
    found = influence(config)
    assert (found[later] == 0).all()
    assert (found[~later] > 0).all()


def test_a_model_that_looks_ahead_is_seen(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over all positions passes gradient to the later ones."""
    monkeypatch.setattr(attention, "chunked", lambda window, scale, q, k, v: jax.nn.dot_product_attention(q, k, v))
    assert (influence(config)[:-1, -1] > 0).all()
