"""Slots against the decoder: what a text becomes depends on no other text, on no chunk, and on nothing that was there before."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import model, sample
from nanojax.config import Config
from nanojax.engine.choose import Choice
from nanojax.engine.slots import Slots

Make = Callable[..., Config]
FAMILIES = {
    "gpt": dict(vocab=280, seq=192),
    "2026": dict(family="2026", depth=4, width=64, window=20, seq=192, vocab=280, qk_scale=1.2),
}


def made(tiny: Make, family: str) -> tuple[Config, Any]:
    """A model with random parameters."""
    config = tiny(model=FAMILIES[family], train=dict(tokens_per_step=384, microbatch=2))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    return config, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes)


def opened(config: Config, params: Any, slots: int = 3, int8: bool = False) -> Slots:
    return Slots(config, params, slots, config.model.T, 280, (), -2, int8)


def read(slots: Slots, slot: int, prompt: list[int], between: Callable[[], Any] = lambda: None) -> int:
    """Reads a prompt to its end, with `between` after each chunk; how much of it was there already."""
    done = there = slots.common(slot, prompt)
    while done < len(prompt) - 1:
        done, _ = slots.read(slot, prompt, done)
        between()
    return there


def text(slots: Slots, slot: int, count: int) -> list[int]:
    """The next tokens of a row, some at a time."""
    found: list[int] = []
    while len(found) < count:
        found += [t for t in slots.step(3).tokens[:, slot].tolist() if t >= 0]
    return found


@pytest.mark.long
@pytest.mark.parametrize("family", ["2026", pytest.param("gpt", marks=pytest.mark.slow)])
def test_texts_join_and_leave(tiny: Make, family: str) -> None:
    """Three texts begun at different steps, each with a choice of its own, one stopped midway: the two others are to the token
    what `sample` writes alone. A second turn reads only what is new; one that goes back, what it must; and a slot that
    another text takes has nothing of the first."""
    config, params = made(tiny, family)
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(0, 270, n).tolist() for n in (3, 100, 67))
    choices = (Choice(0.0), Choice(0.9, 40, 0.95), Choice(1.5))
    alone = lambda prompt, count, choice, seed: sample.generate(
        config, params, prompt, count, temperature=choice[0], top_k=choice[1], top_p=choice[2], seed=seed
    )[0].tolist()
    slots = opened(config, params)
    read(slots, 0, a)
    slots.begin(0, a, 40, choices[0], 0)
    first = text(slots, 0, 4)
    read(slots, 2, c)
    slots.begin(2, c, 30, choices[2], 2)
    read(slots, 1, b, lambda: first.extend(t for t in slots.step(1).tokens[:, 0].tolist() if t >= 0))
    slots.begin(1, b, 20, choices[1], 1)
    second: list[int] = []
    while len(second) < 20:
        tokens = slots.step(4).tokens
        first += [t for t in tokens[:, 0].tolist() if t >= 0]
        second += [t for t in tokens[:, 1].tolist() if t >= 0]
        slots.end(2)
    first += text(slots, 0, 40 - len(first))
    assert first == alone(a, 40, choices[0], 0) and second == alone(b, 20, choices[1], 1)

    back = [*b, *second[:10], 3]
    assert read(slots, 1, back) == len(b) + 10
    slots.begin(1, back, 9, choices[0], 0)
    third = text(slots, 1, 9)
    assert third == alone(back, 9, choices[0], 0)
    turn = [*back, *third, 7, 8, 9]
    assert read(slots, 1, turn) == len(back) + 8  # the last token's keys are written with the next one
    slots.begin(1, turn, 9, choices[0], 0)
    assert text(slots, 1, 9) == alone(turn, 9, choices[0], 0)
    early = [*b[:40], 5, 6]
    assert read(slots, 1, early) == (40 if family == "gpt" else 0)  # a window's ring has lost what it would need
    slots.begin(1, early, 9, choices[0], 0)
    assert text(slots, 1, 9) == alone(early, 9, choices[0], 0)
    assert read(slots, 0, c) == 0
    slots.begin(0, c, 9, choices[1], 5)
    assert text(slots, 0, 9) == alone(c, 9, choices[1], 5)


@pytest.mark.long
def test_scores(tiny: Make) -> None:
    """Log-probabilities of a prompt's tokens, also where its last chunk is moved back from the cache's end, and of written
    ones are those of the whole forward pass, the likeliest among them; within 1e-4. Drawn text has the same ones to the last
    bit alone and beside others."""
    config, params = made(tiny, "2026")
    prompt = np.random.default_rng(2).integers(0, 270, 190).tolist()
    slots, done, own, top = opened(config, params), 0, [], []
    while done < len(prompt) - 1:
        done, scores = slots.read(1, prompt, done, scored=True)
        assert scores is not None
        own += scores.own.tolist()
        top += scores.top[:, 0].tolist()
    slots.begin(1, prompt, 2, Choice(), 0, scored=True)
    written = slots.step()
    tokens = [t for t in written.tokens[:, 1].tolist() if t >= 0]
    own += written.scores.own[:2, 1].tolist()
    logits = jax.nn.log_softmax(model.forward(config, params, jnp.array([[*prompt, *tokens]]))[0, :-1])
    want = np.asarray(logits)[np.arange(191), [*prompt[1:], *tokens]]
    assert np.abs(np.array(own) - want).max() < 1e-4
    assert np.abs(np.array(top) - np.asarray(logits).max(-1)[:189]).max() < 1e-4
    slots.end(1)
    beside = []
    for slot in (0, 1, 2):  # alone, and with one and two more rows for which attention is computed
        read(slots, slot, prompt[:70])
        slots.begin(slot, prompt[:70], 8, Choice(1.0), 3, scored=True)
        beside.append(slots.step().scores.own[:, slot])
    assert all((scores == beside[0]).all() for scores in beside)
    assert written.scores.ids[0, 1, 0] == tokens[0] and written.scores.own[0, 1] == written.scores.top[0, 1, 0]
