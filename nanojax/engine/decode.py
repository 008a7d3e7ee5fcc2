"""The decoder: prompts into a cache, then rows of tokens in one compiled loop on the device.

Every row has a position, an end, a random key and a queue of forced tokens of its own. The loop returns to the host when all
rows ended, when one of them wrote the token that asks for the calculator, or after `limit` tokens. A row that ended is
computed on, and nothing of it is read.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from nanojax import model
from nanojax.config import Config
from nanojax.engine.choose import Choice, choose

CHUNK = 256  # prompt tokens at one time
ROUND = 64  # cache lengths and chunks are multiples of it, so that few shapes are ever compiled
BLOCK = 64  # tokens of a row that one call of the loop may write
ENDS = 4  # tokens that may end a row
FORCED = 64  # tokens that may wait in a row's queue


class Rows(NamedTuple):
    """The decoder's state of B rows, on the device."""

    cache: Any  # of the tokens before `token`
    token: jax.Array  # int32 [B], the last one known: of the prompt, or written
    before: jax.Array  # int32 [B], the token before it, -1 = none
    position: jax.Array  # int32 [B], of `token`
    end: jax.Array  # int32 [B]: a row ends when it has written its token of this position
    ended: jax.Array  # bool [B]
    key: jax.Array  # [B]
    forced: jax.Array  # int32 [B,FORCED], tokens to write before any is chosen; -1 = none


class Stops(NamedTuple):
    """Tokens with a meaning for the loop. `ends` [ENDS]: a row that wrote one ends. `call`: all wait. -2 = none."""

    ends: jax.Array | np.ndarray
    call: jax.Array | np.ndarray


def empty_cache(config: Config, length: int, int8: bool = False) -> Any:
    """A cache of one row for `length` tokens. int8: a byte and 1/32 per value instead of the compute dtype."""
    return model.empty_cache(config, 1, math.ceil(length / ROUND) * ROUND, ROUND, int8)


def prefill(config: Config, params: Any, cache: Any, tokens: Sequence[int], start: int = 0, before: int = -1) -> Any:
    """The cache (donated) of one row with `tokens` at positions start.. in it; `before` is the token before them."""
    for first in range(0, len(tokens), CHUNK):
        # Padding on the right is harmless: no earlier position sees it, and later tokens overwrite it.
        chunk = np.asarray(tokens[first : first + CHUNK], np.int32)[None]
        padded = np.pad(chunk, ((0, 0), (0, -chunk.shape[1] % ROUND)))
        cache = _prefill(config, params, padded, cache, np.int32(start + first), np.full(1, before, np.int32))
        before = int(chunk[0, -1])
    return cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(
    config: Config, params: Any, tokens_1S: jax.Array, cache: Any, start: jax.Array, before_1: jax.Array
) -> Any:
    return model.hidden_cached(config, params, tokens_1S, cache, start, before_1)[1]


def begin(caches: Iterable[Any], prompts: Sequence[Sequence[int]], samples: int, new: Sequence[int], seed: int) -> Rows:
    """`samples` rows of each prompt, those of one prompt behind each other.

    Args:
      caches: of each prompt without its last token, as `prefill` makes them. Each is read when those before it lie in their
        rows: made one by one, only one of them exists beside the rows.
      new: per prompt, the most tokens that each of its rows may write.
    """
    each = lambda values: np.repeat(np.asarray(values, np.int32), samples)
    position = each([len(prompt) - 1 for prompt in prompts])
    B = len(position)
    return Rows(
        cache=_side_by_side(iter(caches), samples, B),
        token=jnp.asarray(each([prompt[-1] for prompt in prompts])),
        before=jnp.asarray(each([prompt[-2] if len(prompt) > 1 else -1 for prompt in prompts])),
        position=jnp.asarray(position),
        end=jnp.asarray(position + each(new)),
        ended=jnp.asarray(each(new) < 1),
        key=_keys(np.uint32(seed), B),
        forced=jnp.full((B, FORCED), -1),
    )


def _side_by_side(caches: Iterator[Any], samples: int, B: int) -> Any:
    cache = next(caches)
    if B == 1:
        return cache
    rows = jax.tree.map(lambda a: jnp.zeros((B, *a.shape[1:]), a.dtype), cache)
    rows = _placed(rows, cache, np.int32(0), samples)
    del cache
    for row in range(samples, B, samples):
        rows = _placed(rows, next(caches), np.int32(row), samples)
    return rows


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _placed(rows: Any, cache: Any, row: jax.Array, samples: int) -> Any:
    """The rows (donated) with `samples` copies of one row's cache from `row` on."""
    place = lambda all, one: lax.dynamic_update_slice_in_dim(all, jnp.repeat(one, samples, 0), row, 0)
    return jax.tree.map(place, rows, cache)


@functools.partial(jax.jit, static_argnums=1)
def _keys(seed: jax.Array, B: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(B))


def force(rows: Rows, row: int, tokens: Sequence[int]) -> Rows:
    """The rows, of which one will write `tokens` next; at most FORCED."""
    queue = np.full(FORCED, -1, np.int32)
    queue[: len(tokens)] = tokens
    return rows._replace(forced=rows.forced.at[row].set(queue))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def block(
    config: Config, vocab: int, params: Any, rows: Rows, choice: Choice, stops: Stops, limit: jax.Array
) -> tuple[Rows, jax.Array, jax.Array]:
    """Up to `limit` more tokens of each row: the rows, tokens int32 [BLOCK,B], -1 = none, and bool [BLOCK,B], which are forced.

    Args:
      vocab: ids at and beyond it are never chosen (a model may be wider than its tokenizer).
      limit: at most BLOCK.
    """
    B = len(rows.token)
    none = jnp.full((BLOCK, B), -1)

    def going(carry: Any) -> jax.Array:
        i, rows, _, _, called = carry
        return (i < limit) & ~jnp.all(rows.ended) & ~called

    def step(carry: Any) -> Any:
        i, rows, tokens, were_forced, _ = carry
        rows, written, is_forced, _ = advance(config, vocab, params, rows, choice, stops)
        called = jnp.any((written == stops.call) & ~is_forced & ~rows.ended)
        return i + 1, rows, tokens.at[i].set(written), were_forced.at[i].set(is_forced), called

    start = (jnp.int32(0), rows, none, jnp.zeros((BLOCK, B), bool), jnp.bool_(False))
    _, rows, tokens, were_forced, _ = lax.while_loop(going, step, start)
    return rows, tokens, were_forced


def advance(
    config: Config, vocab: int, params: Any, rows: Rows, choice: Choice, stops: Stops
) -> tuple[Rows, jax.Array, jax.Array, jax.Array]:
    """One more token of each row that has not ended; -1 of one that has. Which are forced; the logits [B,V] they came from.

    A row that has ended stays where it is: its token is written to the cache at its position again.
    """
    x_B1D, cache = model.hidden_cached(config, params, rows.token[:, None], rows.cache, rows.position, rows.before)
    # On a GPU XLA would keep keys in another order inside the loop, and so transpose the whole cache before and after it.
    cache = jax.tree.map(lambda a: with_layout_constraint(a, Layout((0, 1, 2, 3))), cache)
    logits_BV = model.head(config, params, x_B1D[:, 0])
    key_B = jax.vmap(jax.random.fold_in)(rows.key, rows.position)
    forced_B = rows.forced[:, 0]
    next_B = jnp.where(forced_B >= 0, forced_B, choose(vocab, logits_BV, key_B, choice))
    going_B = ~rows.ended
    position_B = rows.position + going_B.astype(jnp.int32)
    stopped_B = jnp.any(next_B[:, None] == stops.ends[None], -1) | (position_B >= rows.end)
    later = rows._replace(
        cache=cache,
        token=jnp.where(going_B, next_B, rows.token),
        before=jnp.where(going_B, rows.token, rows.before),
        position=position_B,
        ended=rows.ended | stopped_B,
        forced=jnp.where(going_B[:, None], jnp.roll(rows.forced, -1, 1).at[:, -1].set(-1), rows.forced),
    )
    return later, jnp.where(going_B, next_B, -1), going_B & (forced_B >= 0), logits_BV
