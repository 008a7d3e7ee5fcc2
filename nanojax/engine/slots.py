"""Slots: a fixed number of rows that texts join and leave while the others are written. What a server decodes with.

A text joins in two steps. Its prompt is read in chunks into the cache of its slot, between the steps of the other rows; then
its row is set going. Nothing compiles while texts are written. The sums of a row do not depend on which other rows are going: a
product always has all rows, and attention, where each row is by itself, is computed of the first ones only: of one, a quarter or
all, as many as reach to the last that is going. The cache of a text that ended stays until another one takes its slot, so that
the next turn of a conversation reads only what is new.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nanojax import model, weights
from nanojax.config import Config
from nanojax.engine import decode
from nanojax.engine.choose import Choice
from nanojax.engine.decode import ENDS, FORCED, ROUND, Rows, Stops

CHUNKS = (256, ROUND)  # tokens that are read at one time: the first that is filled, else the last one, padded
STEPS = 8  # tokens of a row that one call may write
TOP = 20  # likeliest tokens whose log-probabilities are given


class Scores(NamedTuple):
    """Log-probabilities in nats: of tokens f32 [N], of the TOP likeliest in their places f32 [N,TOP], and their ids."""

    own: Any
    top: Any
    ids: Any


class Written(NamedTuple):
    """What one call wrote: tokens int32 [K,B], -1 = none; bool [K,B], which were forced; scores [K,B], where wanted."""

    tokens: np.ndarray
    forced: np.ndarray
    scores: Scores


class _State(NamedTuple):
    rows: Rows
    choice: Choice  # of each row [B]
    scored: jax.Array  # bool [B]: whether scores are wanted


class Slots:
    """`count` slots of `context` tokens each.

    Args:
      vocab: ids at and beyond it are never chosen.
      ends: tokens that end a row. call: one that makes all rows wait for the host, so that it may force what comes next.
    """

    def __init__(
        self, config: Config, params: Any, count: int, context: int, vocab: int, ends: Sequence[int], call: int,
        int8_cache: bool = False,
    ):  # fmt: skip
        self.config, self.params, self.count, self.context = config, params, count, context
        self.vocab, self.top = min(vocab, config.model.V), min(TOP, vocab)
        self.stops = Stops(np.array([*ends, *[-2] * (ENDS - len(ends))], np.int32), np.asarray(call, np.int32))
        self.length = math.ceil(context / ROUND) * ROUND
        cache = model.empty_cache(config, count, self.length, ROUND, int8_cache)
        self.state = _empty(cache, count)
        self.going: set[int] = set()
        self.sizes = sorted({1, math.ceil(count / 4), count})  # first rows that a step may attend for
        rings = {(k.shape[2], window) for (k, _), window in zip(cache, weights.windows(config.model), strict=True)}
        # How far a ring may be taken back: what it has lost by then lies outside the window.
        self.slack = min((U - window for U, window in rings if self.length > U), default=self.length)
        self.tokens: list[list[int]] = [[] for _ in range(count)]  # in the cache of each slot
        self.last = [0] * count  # the token behind these
        self.reached = [0] * count  # positions that were written to, padding included

    def common(self, slot: int, prompt: Sequence[int]) -> int:
        """How many tokens of the prompt need not be read again if it takes this slot."""
        there = self.tokens[slot]
        pairs = zip(there, prompt[:-1])
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(there), len(prompt) - 1))
        return same if self.slack >= self.length or self.reached[slot] - same <= self.slack else 0

    def read(self, slot: int, prompt: Sequence[int], done: int, scored: bool = False) -> tuple[int, Scores | None]:
        """One chunk of the prompt, of whose tokens `done` are in the slot's cache: how many are now, all but the last one
        at the end; and the scores of the tokens behind those that were read, if wanted."""
        left = len(prompt) - 1 - done
        size = next((size for size in CHUNKS if size <= left), CHUNKS[-1])
        start = min(done, self.length - size)  # padding must not run over the cache's end
        count = min(size, len(prompt) - 1 - start)
        pad = lambda tokens: np.pad(np.asarray(tokens, np.int32), (0, size - len(tokens)))
        tokens, targets = pad(prompt[start : start + count]), pad(prompt[start + 1 : start + 1 + count])
        before = prompt[start - 1] if start else -1
        place = np.array([slot, start, count, before], np.int32)
        self.state, scores = _read(
            self.config, (self.vocab, self.top), self.params, self.state, place, tokens, targets, np.bool_(scored)
        )
        self.tokens[slot] = list(prompt[: start + count])
        self.reached[slot] = max(self.reached[slot] if done else 0, start + size)
        new = slice(done - start, count)
        return start + count, Scores(*(np.asarray(a)[new] for a in scores)) if scored else None

    def begin(
        self,
        slot: int,
        prompt: Sequence[int],
        new: int,
        choice: Choice,
        seed: int,
        sample: int = 0,
        scored: bool = False,
    ) -> None:
        """Sets a row going whose prompt was read: up to `new` tokens, drawn as sample number `sample` of the seed."""
        assert len(self.tokens[slot]) >= len(prompt) - 1
        del self.tokens[slot][len(prompt) - 1 :]
        self.last[slot] = prompt[-1]
        before = prompt[-2] if len(prompt) > 1 else -1
        place = np.array([slot, prompt[-1], before, len(prompt) - 1, len(prompt) - 1 + new, sample], np.int32)
        drawn = Choice(*(np.asarray(value, kind) for value, kind in zip(choice, (np.float32, np.int32, np.float32))))
        self.state = _begin(self.state, place, drawn, np.uint32(seed), np.bool_(scored))
        self.going.add(slot)

    def force(self, slot: int, tokens: Sequence[int]) -> None:
        """The row will write these tokens next; at most FORCED."""
        queue = np.full(FORCED, -1, np.int32)
        queue[: len(tokens)] = tokens
        self.state = _force(self.state, np.int32(slot), queue)

    def end(self, slot: int) -> None:
        """Stops a row. One that came to its end needs this too, so that the others' steps need not compute it."""
        self.going.discard(slot)
        self.state = _end(self.state, np.int32(slot))

    def step(self, limit: int = STEPS) -> Written:
        """Up to `limit` more tokens of each row that is going."""
        first = next(size for size in self.sizes if size > max(self.going, default=0))
        self.state, *written = _step(
            self.config, (self.vocab, self.top), first, self.params, self.state, self.stops, np.int32(limit)
        )
        tokens, forced, scores = jax.tree.map(np.asarray, written)
        for slot in range(self.count):
            for token in tokens[:, slot].tolist():
                if token >= 0:
                    self.tokens[slot].append(self.last[slot])
                    self.last[slot] = token
            self.reached[slot] = max(self.reached[slot], len(self.tokens[slot]) + 1)
        return Written(tokens, forced, scores)

    def compile(self) -> None:
        """Runs every program once, so that the first text does not wait for them."""
        for size in CHUNKS:
            if size < self.context:
                self.read(0, [0] * (size + 1), 0)
        for size in self.sizes:
            self.tokens[size - 1] = []
            self.begin(size - 1, [0], 1, Choice(), 0)
            self.step()
            self.force(size - 1, [])
            self.end(size - 1)
            self.tokens[size - 1], self.reached[size - 1] = [], 0
        self.tokens[0], self.reached[0] = [], 0


def _empty(cache: Any, B: int) -> _State:
    zeros = lambda: jnp.zeros(B, jnp.int32)
    rows = Rows(
        cache=cache,
        token=zeros(),
        before=zeros(),
        position=zeros(),
        end=zeros(),
        ended=jnp.ones(B, bool),
        key=jax.vmap(jax.random.key)(jnp.zeros(B, jnp.uint32)),
        forced=jnp.full((B, FORCED), -1),
    )
    return _State(rows, Choice(jnp.zeros(B), zeros(), jnp.ones(B)), jnp.zeros(B, bool))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _read(
    config: Config, sizes: tuple[int, int], params: Any, state: _State, place: jax.Array, tokens_S: jax.Array,
    targets_S: jax.Array, scored: jax.Array,
) -> tuple[_State, Scores]:  # fmt: skip
    slot, start, count, before = place
    own = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, slot, 1), state.rows.cache)
    x_1SD, own = model.hidden_cached(config, params, tokens_S[None], own, start, before[None])
    put = lambda all, one: lax.dynamic_update_slice_in_dim(all, one, slot, 0)
    # Until the row goes on, each step of the others writes a token of this one here, where the next chunk begins.
    position = state.rows.position.at[slot].set(start + count)
    rows = state.rows._replace(cache=jax.tree.map(put, state.rows.cache, own), position=position)
    wanted = lambda: _scores(sizes, model.head(config, params, x_1SD[0]), targets_S)
    return state._replace(rows=rows), lax.cond(scored, wanted, lambda: _no_scores(sizes, len(tokens_S)))


@functools.partial(jax.jit, donate_argnums=0)
def _begin(state: _State, place: jax.Array, choice: Choice, seed: jax.Array, scored: jax.Array) -> _State:
    slot, token, before, position, end, sample = place
    put = lambda array, value: array.at[slot].set(value)
    r = state.rows
    rows = r._replace(
        token=put(r.token, token),
        before=put(r.before, before),
        position=put(r.position, position),
        end=put(r.end, end),
        ended=put(r.ended, end <= position),
        key=put(r.key, jax.random.fold_in(jax.random.key(seed), sample)),
        forced=put(r.forced, -1),
    )
    return _State(rows, jax.tree.map(put, state.choice, choice), put(state.scored, scored))


@functools.partial(jax.jit, donate_argnums=0)
def _force(state: _State, slot: jax.Array, queue: jax.Array) -> _State:
    return state._replace(rows=state.rows._replace(forced=state.rows.forced.at[slot].set(queue)))


@functools.partial(jax.jit, donate_argnums=0)
def _end(state: _State, slot: jax.Array) -> _State:
    return state._replace(rows=state.rows._replace(ended=state.rows.ended.at[slot].set(True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _step(
    config: Config, sizes: tuple[int, int], first: int, params: Any, state: _State, stops: Stops, limit: jax.Array
) -> tuple[_State, jax.Array, jax.Array, Scores]:
    B, cache = state.scored.shape[0], state.rows.cache

    def going(carry: Any) -> jax.Array:
        i, rows, _, called = carry
        return (i < limit) & ~jnp.all(rows.ended) & ~called

    def step(carry: Any) -> Any:
        i, rows, out, _ = carry
        later, tokens, forced, logits = decode.advance(config, sizes[0], params, rows, state.choice, stops)
        wanted = lambda: _scores(sizes, logits, jnp.maximum(tokens, 0))
        scores = lax.cond(jnp.any(state.scored & ~rows.ended), wanted, lambda: _no_scores(sizes, B))
        called = jnp.any((tokens == stops.call) & ~forced & ~later.ended)
        return i + 1, later, jax.tree.map(lambda all, new: all.at[i].set(new), out, (tokens, forced, scores)), called

    scores = jax.tree.map(lambda a: jnp.zeros((STEPS, *a.shape), a.dtype), _no_scores(sizes, B))
    out = (jnp.full((STEPS, B), -1), jnp.zeros((STEPS, B), bool), scores)
    some = cache if first == B else jax.tree.map(lambda a: a[:first], cache)
    carry = (jnp.int32(0), state.rows._replace(cache=some), out, jnp.bool_(False))
    _, rows, out, _ = lax.while_loop(going, step, carry)
    if first < B:
        put = lambda all, one: lax.dynamic_update_slice_in_dim(all, one, 0, 0)
        rows = rows._replace(cache=jax.tree.map(put, cache, rows.cache))
    return state._replace(rows=rows), *out


def _scores(sizes: tuple[int, int], logits_NV: jax.Array, tokens_N: jax.Array) -> Scores:
    vocab, count = sizes
    total_N1 = jax.nn.logsumexp(logits_NV, -1, keepdims=True)
    own = jnp.take_along_axis(logits_NV, tokens_N[:, None], -1) - total_N1
    top, ids = lax.top_k(logits_NV[:, :vocab], count)
    return Scores(own[:, 0], top - total_N1, ids)


def _no_scores(sizes: tuple[int, int], N: int) -> Scores:
    return Scores(jnp.zeros(N), jnp.zeros((N, sizes[1])), jnp.zeros((N, sizes[1]), jnp.int32))
