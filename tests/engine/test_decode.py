"""The decoder against the whole forward pass: stops, tools, caches, neighbours, draws."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import model, weights
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.engine import decode
from nanojax.engine.choose import Choice, _bound, _order, choose
from nanojax.engine.generate import Calculator, Decoder, rows_of
from nanojax.quant import encode
from nanojax.tokenizer import Tokenizer

Make = Callable[..., Config]
FAMILIES = {
    "gpt": dict(vocab=280, seq=96),
    "2026": dict(family="2026", depth=4, width=64, window=20, seq=96, vocab=280, qk_scale=1.2),
}
INT8 = dict(forward="int8", dx="int8", dw="int8", loss_chunk=16)
TRAIN = dict(tokens_per_step=192, microbatch=2)
TOKENIZER = Tokenizer([*(bytes([b]) for b in range(256)), b"12", b"34", b"the"])


def made(tiny: Make, family: str, int8: bool = False) -> tuple[Config, Any]:
    """A model with random parameters, none of them zero; int8: block matrices stored as int8 and multiplied so."""
    extra: Any = dict(compute=INT8, stored=dict(blocks="int8")) if int8 else {}
    config = tiny(model=FAMILIES[family], train=TRAIN, **extra)
    shapes = jax.eval_shape(lambda: model.init_params(tiny(model=FAMILIES[family], train=TRAIN), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes)
    table = weights.table(config.model)
    stored = lambda tree: {name: encode(w, config.stored_as(table[name])) for name, w in tree.items()}
    once = {name: w for name, w in params.items() if name != "blocks"}
    return config, {**stored(once), "blocks": tuple(stored(block) for block in params["blocks"])}


def prompts_of(count: int, V: int) -> list[list[int]]:
    """Prompts of different lengths, one of a single token among them, some longer than a chunk's rounding."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, V - 9, 1 + (i * 13) % 70).tolist() for i in range(count)]


def lines(written: Any, rows: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Tokens, and which are forced, of each row."""
    tokens = np.concatenate([w.tokens for w in written]) if written else np.zeros((0, rows), int)
    forced = np.concatenate([w.forced for w in written]) if written else np.zeros((0, rows), bool)
    kept = [tokens[:, row] >= 0 for row in range(rows)]
    return (
        [tokens[k, row].tolist() for row, k in enumerate(kept)],
        [forced[k, row].tolist() for row, k in enumerate(kept)],
    )


def decoded(
    config: Config,
    params: Any,
    prompts: Sequence[list[int]],
    new: Sequence[int],
    choice: Choice = Choice(),
    **options: Any,
) -> tuple[list[list[int]], list[list[bool]]]:
    """What rows write. Options: seed, samples, ends, calculator, live, int8_cache."""
    first = {name: options.pop(name) for name in ("seed", "samples", "int8_cache") if name in options}
    live = options.pop("live", False)
    decoder = Decoder(config, params, rows_of(config, params, prompts, new, **first), choice, **options)
    return lines(list(decoder.blocks(live)), len(prompts) * first.get("samples", 1))


def hold(config: Config, params: Any, prompts: Any, new: Any, ends: Any, texts: Any, forced: Any, answers: Any) -> None:
    """Each row: every token that was not forced is the full forward's argmax, every forced one the answer's, in its place;
    and it goes on to its end, and no further.

    In int8 the last bit of a float moves a code where it lies between two, and with it logits by 0.02 (their spread is 2.3).
    """
    forward = jax.jit(model.forward, static_argnums=0)
    near = 0.05 if config.compute.forward == "int8" else 0.0
    for prompt, count, text, were_forced, answer in zip(prompts, new, texts, forced, answers, strict=True):
        row = np.zeros((1, config.model.T), np.int32)
        row[0, : len(prompt) + len(text)] = prompt + text
        logits = np.asarray(forward(config, params, row))[0, len(prompt) - 1 :][: len(text)]
        behind = logits.max(-1) - logits[np.arange(len(text)), text]
        assert (behind[~np.array(were_forced, bool)] <= near).all()
        assert [t for t, f in zip(text, were_forced) if f] == answer(text)
        assert len(text) == count or text[-1] in ends
        assert not any(t in ends for t in text[:-1])


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_are_the_full_forwards_argmax(tiny: Make, family: str, int8: bool, rows: int) -> None:
    """With stops and calls of the calculator, rows of different prompts and lengths: every token, in both forms of a model."""
    config, params = made(tiny, family, int8)
    prompts, new = prompts_of(rows, config.model.V), [24 - i % 5 for i in range(rows)]
    texts, _ = decoded(config, params, prompts, new)
    hold(config, params, prompts, new, (), texts, [[False] * len(t) for t in texts], [lambda text: []] * rows)
    calculator = Calculator(TOKENIZER, rows, lambda expression: "12+é34")
    opens, closes = calculator.opens, calculator.closes = texts[0][2], texts[0][6]
    ends = (texts[-1][15],)
    answer = [calculator.around[0], *TOKENIZER.encode("12+é34"), calculator.around[1]]
    texts, forced = decoded(config, params, prompts, new, ends=ends, calculator=calculator)
    assert any(map(any, forced)) or opens == closes or ends[0] in texts[0]

    def answers(were_forced: list[bool]) -> Callable[[list[int]], list[int]]:
        def expected(text: list[int]) -> list[int]:
            out, is_open, i = [], False, 0
            while i < len(text):
                if text[i] == opens:
                    is_open = True
                elif text[i] == closes and is_open:
                    is_open = False
                    part = answer[: len(text) - i - 1] if text[i] not in ends else []
                    assert were_forced[i + 1 : i + 1 + len(part)] == [True] * len(part)
                    out, i = out + part, i + len(part)
                i += 1
            return out

        return expected

    hold(config, params, prompts, new, ends, texts, forced, [answers(f) for f in forced])


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_neighbours(tiny: Make, family: str) -> None:
    """Drawn text of a row, with other prompts, ends and calls beside it, streamed or not, is the same to the token."""
    config, params = made(tiny, family)
    prompts, choice = prompts_of(4, config.model.V), Choice(0.9, 40, 0.95)
    texts, _ = decoded(config, params, prompts, [20] * 4, choice, seed=3)
    others = [prompts[3], prompts[1], [5] * 60, [9, 8]]
    calculator = Calculator(TOKENIZER, 4, lambda expression: "1")
    rest, _ = decoded(config, params, others, [3, 20, 30, 20], choice, seed=3, live=True, calculator=calculator)
    assert rest[1] == texts[1] and rest[0] != texts[0]
    again, _ = decoded(config, params, prompts, [20] * 4, choice, seed=4)
    assert all(a != b for a, b in zip(again, texts))


@pytest.mark.long
def test_samples_of_a_prompt_differ(tiny: Make) -> None:
    """The prompt is read once, and its rows draw their first tokens apart; at temperature 0 they are alike."""
    config, params = made(tiny, "2026")
    texts, _ = decoded(config, params, [[1, 2, 3]], [12], Choice(2.0), samples=8)
    assert len({tuple(text) for text in texts}) == 8 and len({text[0] for text in texts}) > 3
    texts, _ = decoded(config, params, [[1, 2, 3]], [12], samples=3)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_cache_is_close(tiny: Make, family: str) -> None:
    """Logits after 90 tokens over an int8 cache: within 5 % of the largest, and half the bytes of bf16."""
    config, params = made(tiny, family)
    tokens = np.random.default_rng(1).integers(0, 270, 90).tolist()
    found = []
    for int8 in (False, True):
        cache = decode.prefill(config, params, decode.empty_cache(config, 91, int8), tokens[:-1])
        found.append(
            model.forward_cached(
                config, params, jnp.array([tokens[-1:]]), cache, jnp.int32(89), jnp.array(tokens[-2:-1])
            )[0]
        )
    exact, close = map(np.asarray, found)
    assert 0 < np.abs(exact - close).max() < 0.05 * np.abs(exact).max()


def test_top_k_and_top_p_keep_what_they_should() -> None:
    """4,000 draws a row: none outside the k likeliest, or outside the fewest that reach p, and all of those are drawn."""
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = jnp.log(jnp.asarray(np.tile(np.append(p, [1e-30] * 3), (4000, 1)), jnp.float32))
    keys = jax.vmap(jax.random.key)(jnp.arange(4000))
    draw = jax.jit(choose, static_argnums=0)
    cases = {(0, 1.0): 5, (2, 1.0): 2, (0, 0.69): 2, (0, 0.71): 3, (0, 1e-9): 1, (4, 0.9): 4, (1, 1.0): 1, (9, 1.0): 5}
    for (k, q), count in cases.items():
        drawn = np.asarray(draw(8, logits, keys, Choice(np.float32(1), np.int32(k), np.float32(q))))
        assert sorted(set(drawn.tolist())) == list(range(count)), (k, q)
        shares = np.bincount(drawn, minlength=count) / 4000
        assert np.abs(shares - p[:count] / p[:count].sum()).max() < 0.04  # five standard deviations
    assert (np.asarray(draw(1, logits, keys, Choice(np.float32(5), np.int32(0), np.float32(1)))) == 0).all()


def test_bounds_are_the_same_in_digits_of_one_and_of_four_bits() -> None:
    """A CPU's and a GPU's search find the k-th largest value, with ties, infinities and both zeros among the values."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.append(rng.normal(size=200).round(1), [np.inf, -np.inf, 0.0, -0.0]), jnp.float32)[None]
    for k in (1, 7, 100, 203):
        enough = lambda kept, k=k: jnp.sum(kept, -1) >= k
        found = [_bound(bits, enough, _order(x))[0] for bits in (1, 4)]
        assert found[0] == found[1] == jnp.sort(_order(x)[0])[-k]


def test_an_expression_that_is_none_is_not_answered() -> None:
    """Nothing is forced after it; nor after an end without a begin; the result of another row's is its own."""
    calculator = Calculator(TOKENIZER, 2)
    feed = lambda row, tokens: [calculator.read(row, t) for t in tokens]
    assert feed(0, [calculator.closes, 65]) == [None, None]
    feed(0, [calculator.opens, *TOKENIZER.encode("2*")])
    feed(1, [calculator.opens, *TOKENIZER.encode("x")])
    answer = [calculator.around[0], *TOKENIZER.encode("12"), calculator.around[1]]
    assert feed(0, [*TOKENIZER.encode("6"), calculator.closes])[-1] == answer
    assert feed(1, [calculator.closes])[-1] is None


def test_mistakes(tiny: Make) -> None:
    """A row that would leave the model's sequence is refused before anything is read."""
    config, params = made(tiny, "gpt")
    with pytest.raises(UserError, match="90 tokens and 7 new ones exceed the model's sequence of 96"):
        rows_of(config, params, [[1], [1] * 90], [9, 7])
