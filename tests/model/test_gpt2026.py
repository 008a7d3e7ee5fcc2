"""The model of 2026 against independent numpy: logits, every gradient, windows, cached decoding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracle_2026 import joined
from oracles import numpy_gpt2026 as oracle

from nanojax import model, sample, step, weights
from nanojax.config import Config
from nanojax.evaluate import likelihood

Make = Callable[..., Config]
KEY = jax.random.key(0)
T, WINDOW = 24, 7


def made(tiny: Make, depth: int, **sections: dict[str, Any]) -> Config:
    """A small model of this family whose windows are shorter than its rows; its own heads of 32."""
    sizes = dict(family="2026", depth=depth, width=64, window=WINDOW, seq=T, rope_base=1e5, qk_scale=1.2)
    train = dict(tokens_per_step=4 * T, microbatch=2)
    return tiny(model=sizes, train=train, **{"compute": {"loss_chunk": T}} | sections)


def drawn(config: Config, seed: int = 2) -> tuple[Any, Any]:
    """(the oracle's random parameters, the same as ours in f32). With seed 1 the sum for backout nearly cancels."""
    m = config.model
    theirs = oracle.random_params(np.random.default_rng(seed), m.L, m.V, m.H, m.D)
    return theirs, joined(theirs)


def sized(config: Config) -> oracle.Model:
    return oracle.Model(config.model.H, config.model.window, config.model.rope_base)


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest magnitude."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("depth", [3, pytest.param(4, marks=pytest.mark.long)])
def test_logits_equal_numpy(tiny: Make, depth: int) -> None:
    """Of f32 parameters without zeros, to 1e-5 relative, at odd and even depth."""
    config = made(tiny, depth)
    theirs, ours = drawn(config)
    tokens = np.random.default_rng(2).integers(0, config.model.V, (2, T))
    got = jax.jit(model.forward, static_argnums=0)(config, ours, tokens)
    assert relative(got, oracle.logits(theirs, tokens, sized(config))) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("depth", "residuals"),
    [
        (3, "all"),
        (4, "cheap"),
        pytest.param(3, "inputs", marks=pytest.mark.slow),
        pytest.param(4, "all", marks=pytest.mark.slow),
    ],
)
def test_the_steps_gradients_equal_numpy(tiny: Make, depth: int, residuals: str) -> None:
    """Every weight's sum over two microbatches, and the loss, to 1e-5 relative in f32 (backout 3e-5), whatever forward keeps."""
    config = made(tiny, depth, compute={"residuals": residuals, "loss_chunk": T})
    theirs, ours = drawn(config)
    tokens = np.random.default_rng(3).integers(0, config.model.V, config.batch_shape)
    flat = tokens.reshape(-1, T + 1)
    want_loss, grads = oracle.loss_and_grads(theirs, flat[:, :-1], flat[:, 1:], sized(config))
    accum, loss = step.init_state(config).accum, 0.0
    run = jax.jit(lambda accum, rows: step.forward_backward(config, ours, accum, rows, None, {}, KEY))
    for part in tokens:
        more, accum = run(accum, part)
        loss += float(more) / config.train.tokens_per_step
    assert loss == pytest.approx(want_loss, rel=1e-6)
    want = joined(grads)
    for name, weight in weights.table(config.model).items():
        for place, i in enumerate(weight.layers) if weight.layered else [(0, None)]:
            got, expected = (accum[name], want[name]) if i is None else (accum[name][place], want["blocks"][i][name])
            # backout's gradient is one number, whose terms cancel to a 537th of their sum at depth 3; an f32 has 6e-8 of that
            assert relative(got, expected) < (3e-5 if name == "backout" else 1e-5), (name, i)


def test_a_window_and_causality_by_gradient(tiny: Make) -> None:
    """At depth 1 with a window, an output reads its own token, those that the window reaches, and the one smeared into those.

    The gradient is exactly 0 at all others, later ones included, and nowhere 0 at these.
    """
    config = made(tiny, 4)
    _, params = drawn(config)
    tokens = jnp.arange(T)[None]  # every position reads a row of its own
    causal = model.causal(config)

    def first_layer(embed: jax.Array) -> jax.Array:
        only = {**params, "embed": embed, "blocks": params["blocks"][:1], "backout": jnp.zeros(1)}
        return model.walk(config, only, tokens, causal)[0][0]

    influence = jax.jit(jax.jacrev(first_layer))(params["embed"])[:, :, :T]  # [T, D, T, D]
    reads = np.abs(np.asarray(influence)).max((1, 3)) > 0
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    assert (reads == ((distance >= 0) & (distance <= WINDOW + 1))).all()


@pytest.mark.long
def test_cached_decoding_equals_the_whole_pass(tiny: Make) -> None:
    """A prompt of 9 tokens with 3 of padding behind, then one at a time: logits to 1e-4, and windowed layers keep less."""
    config = made(tiny, 4)
    _, params = drawn(config)
    tokens = np.random.default_rng(5).integers(0, config.model.V, (2, T))
    want = model.forward(config, params, jnp.asarray(tokens))
    cache = model.empty_cache(config, 2, T, padding=3)
    assert [layer[0].shape[2] for layer in cache] == [WINDOW + 4, WINDOW + 4, WINDOW + 4, T]
    padded = np.concatenate([tokens[:, :9], np.zeros((2, 3), int)], 1)
    run = jax.jit(model.forward_cached, static_argnums=0)
    got, cache = run(config, params, padded, cache, jnp.int32(0), None)
    parts = [got[:, :9]]
    for t in range(9, T):
        got, cache = run(config, params, tokens[:, t : t + 1], cache, jnp.int32(t), tokens[:, t - 1])
        parts.append(got)
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=1e-4)


@pytest.mark.long
def test_shared_contexts_score_as_whole_rows(tiny: Make) -> None:
    """Branches after one context, packed into one row, have the losses that each has by itself: windows and smear reach back."""
    config = made(tiny, 4)
    theirs, params = drawn(config)
    rng = np.random.default_rng(6)
    draw = lambda n: tuple(int(i) for i in rng.integers(0, config.model.V, n))
    requests = [likelihood.Request(draw(n), (draw(4), draw(1), draw(6))) for n in (1, 5, 14)]
    requests.append(likelihood.Request(draw(4), (draw(9),)))
    for request, answers in zip(requests, likelihood.scorer(config, params, 256)(requests)):
        for branch, answer in zip(request.branches, answers, strict=True):
            row = np.array([[*request.context, *branch]])
            want = oracle.losses(theirs, row[:, :-1], row[:, 1:], sized(config))[0][len(request.context) - 1 :]
            np.testing.assert_allclose(answer.nll, want, atol=1e-5)


@pytest.mark.long
def test_sampled_text_is_the_whole_passes_argmax(tiny: Make) -> None:
    """Greedy text after prompts around the chunk of a prompt equals repeated argmax of the whole pass."""
    config = tiny(
        model=dict(family="2026", depth=4, width=64, window=20, seq=320, qk_scale=1.2), train=dict(tokens_per_step=640)
    )
    _, params = drawn(config)
    whole = jax.jit(model.forward, static_argnums=0)
    for length in (1, 63, 64, 65, 257):
        prompt = np.random.default_rng(length).integers(0, config.model.V, length).tolist()
        new = sample.generate(config, params, prompt, 30)[0].tolist()
        row = np.zeros((1, 320), np.int32)
        row[0, : length + 30] = prompt + new
        logits = np.asarray(whole(config, params, row))[0]
        assert new == logits[length - 1 : length + 29].argmax(-1).tolist(), length
