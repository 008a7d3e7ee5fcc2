"""Log-likelihood of continuations given contexts: batched, bucketed by length, shared contexts computed once.

A Request is one context and the branches that may follow it. The four choices of a 10-shot question share 1,000 tokens
and differ in 20: the context goes through the model once, and every layer lets the branches' tokens attend to it and to
their own branch. Only the scored positions reach the head, 256 at a time, so that logits [B,T,V] never exist.
Requests are sorted by length and padded to a few lengths (`bucket`), so that the number of compilations is bounded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nanojax import attention as attn
from nanojax import model
from nanojax.config import Config

F32 = jnp.float32
HEAD_CHUNK = 256  # positions whose logits exist at one time: 64 MiB at V = 65,536


class Request(NamedTuple):
    """Token ids: a context that is not scored (not empty) and branches that are, each by itself after the context."""

    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """For each token of one branch: nats [n] f32, and whether it was the model's argmax [n] bool."""

    nll: np.ndarray
    hits: np.ndarray


class _Row(NamedTuple):
    """A request as the model eats it: trunk tokens, then tail tokens with their branch and position."""

    trunk: Sequence[int]
    tail: Sequence[int]
    branch: Sequence[int]
    position: Sequence[int]
    scored_at: Sequence[int]  # index into trunk (>= 0) or ~index into tail, one per scored token
    targets: Sequence[int]


def _row(request: Request) -> _Row:
    context, branches = request
    if sum(len(b) > 1 for b in branches) <= 1:  # no two branches have inner tokens: plain causal, no tail
        longest = max(branches, key=len, default=())
        trunk = [*context, *longest[:-1]]
        at = [len(context) - 1 + j for b in branches for j in range(len(b))]
        return _Row(trunk, (), (), (), at, [t for b in branches for t in b])
    tail, branch, position, at = [], [], [], []
    for i, b in enumerate(branches):
        at += [len(context) - 1] * bool(b) + [~(len(tail) + j) for j in range(len(b) - 1)]
        tail += b[:-1]
        branch += [i] * (len(b) - 1)
        position += [len(context) + j for j in range(len(b) - 1)]
    return _Row(context, tail, branch, position, at, [t for b in branches for t in b])


def _tail_attention(q, k, v, k_trunk, v_trunk, length_B, branch_BS):
    """Attention [B,S,N,H] of tail queries over their row's trunk (`length_B` tokens) and their own branch."""
    S, T = q.shape[1], k_trunk.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])
    to_trunk = jnp.einsum("bqnh,bknh->bnqk", q, k_trunk, preferred_element_type=F32) * scale
    to_tail = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=F32) * scale
    in_trunk = (jnp.arange(T)[None, :] < length_B[:, None])[:, None, None, :]
    own = (branch_BS[:, :, None] == branch_BS[:, None, :]) & (jnp.arange(S)[:, None] >= jnp.arange(S)[None, :])
    scores = jnp.concatenate([jnp.where(in_trunk, to_trunk, -jnp.inf), jnp.where(own[:, None], to_tail, -jnp.inf)], -1)
    p = jax.nn.softmax(scores, -1).astype(v.dtype)
    out = jnp.einsum("bnqk,bknh->bqnh", p[..., :T], v_trunk, preferred_element_type=F32)
    return (out + jnp.einsum("bnqk,bknh->bqnh", p[..., T:], v, preferred_element_type=F32)).astype(q.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: Config, params: Any, trunk_BT, tail_BS, branch_BS, position_BS, length_B):
    """Last block's output [B,T+S,D] of trunk and tail together; S may be 0."""
    S = tail_BS.shape[1]
    if not S:
        return model.hidden(config, params, trunk_BT)
    implementation = attn.default_implementation(config.compute.attention)
    apply: Any = model.Block(config, implementation).apply
    offset_BS = position_BS - jnp.arange(S)[None, :]

    def layer(x, p):
        trunk, tail = x
        q, k, v, trunk = apply({"params": p}, trunk, method="qkv")
        out = attn.attention(q, k, v, implementation)
        # The position of a tail token depends on its row, and qkv takes one list of positions: hence row by row.
        one = lambda row, offset: apply({"params": p}, row[None], offset, method="qkv")
        q_t, k_t, v_t, tail = (a[:, 0] for a in jax.vmap(one)(tail, offset_BS))
        out_t = _tail_attention(q_t, k_t, v_t, k, v, length_B, branch_BS)
        trunk, tail = (apply({"params": p}, a, o, method="rest") for a, o in ((trunk, out), (tail, out_t)))
        return (trunk, tail), None

    embed: Any = model.Embed(config).apply
    start = tuple(embed({"params": params}, tokens) for tokens in (trunk_BT, tail_BS))
    return jnp.concatenate(lax.scan(layer, start, params["blocks"])[0], 1)


@functools.partial(jax.jit, static_argnums=0)
def _head(config: Config, params: Any, x_MD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """nats [M] f32 and argmax hits [M] bool of `targets_M` after the last block's outputs `x_MD`."""

    def chunk(inputs):
        x_CD, target_C = inputs
        logits = model.Head(config).apply({"params": params}, x_CD[None])[0]
        picked = jnp.take_along_axis(logits, target_C[:, None], -1)[:, 0]
        return jax.nn.logsumexp(logits, -1) - picked, jnp.argmax(logits, -1).astype(jnp.int32) == target_C

    C = min(HEAD_CHUNK, len(targets_M))
    nll, hits = lax.map(chunk, (x_MD.reshape(-1, C, x_MD.shape[-1]), targets_M.reshape(-1, C)))
    return nll.reshape(-1), hits.reshape(-1)


def _score(config: Config, params: Any, arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, jax.Array]:
    """nats [M] and hits [M] of one batch; returns before the device is done.

    Three compiled pieces, since the number of scored positions M varies freely with the shape of the trunk, which is
    the one slow to compile.
    """
    *inputs, at_M, targets_M = arrays
    return _head(config, {"head": params["head"]}, _gather(_hidden(config, params, *inputs), at_M), targets_M)


@jax.jit
def _gather(x_BTD: jax.Array, at_M: jax.Array) -> jax.Array:
    return x_BTD.reshape(-1, x_BTD.shape[-1])[at_M]


def bucket(length: int, least: int = 32) -> int:
    """The padded length: a multiple of `least`, and of an eighth of the power of two below it."""
    step = max(least, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class _Batch(NamedTuple):
    members: list[int]
    arrays: tuple[np.ndarray, ...]


def _batch(rows: Sequence[_Row], members: Sequence[int], B: int, T: int, S: int) -> _Batch:
    trunk, tail = np.zeros((B, T), np.int32), np.zeros((B, S), np.int32)
    branch, position = np.full((B, S), -1, np.int32), np.zeros((B, S), np.int32)
    length, at, targets = np.ones(B, np.int32), [], []
    for b, member in enumerate(members):
        row = rows[member]
        trunk[b, : len(row.trunk)], length[b] = row.trunk, len(row.trunk)
        tail[b, : len(row.tail)] = row.tail
        branch[b, : len(row.tail)], position[b, : len(row.tail)] = row.branch, row.position
        at += [b * (T + S) + (i if i >= 0 else T + ~i) for i in row.scored_at]
        targets += row.targets
    M = 1 << max(4, (len(at) - 1).bit_length())
    padding = [0] * (M - len(at))
    flat = np.array([at + padding, targets + padding], np.int32)
    return _Batch(list(members), (trunk, tail, branch, position, length, flat[0], flat[1]))


def batches(rows: Sequence[_Row], tokens: int) -> Iterator[_Batch]:
    """Rows sorted into batches of equal padded shape, each of about `tokens` tokens (at least one row)."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((bucket(len(row.tail), 16), bucket(len(row.trunk))), []).append(i)
    # Every shape is a compilation: a group, or what would leave its last batch half empty, moves to the next longer
    # shape where that costs less than a quarter of a batch.
    for S, T in sorted(groups):
        members, spare = groups[S, T], len(groups[S, T]) % max(1, tokens // (T + S))
        longer = [g for g in groups if g != (S, T) and g[0] >= S and g[1] >= T and bool(g[0]) == bool(S)]
        if longer:
            to = min(longer, key=sum)
            moved = next((n for n in (len(members), spare) if 4 * n * (sum(to) - S - T) <= tokens), 0)
            groups[to] += members[len(members) - moved :]
            del members[len(members) - moved :]
    for (S, T), members in sorted(groups.items(), key=lambda g: -sum(g[0])):  # lack of memory shows at once
        B = max(1, tokens // (T + S))
        for start in range(0, len(members), B):
            part = members[start : start + B]
            yield _batch(rows, part, min(B, 1 << (len(part) - 1).bit_length()), T, S)


def scorer(config: Config, params: Any, tokens: int = 8192) -> Callable[[Sequence[Request]], list[list[Answer]]]:
    """The function requests -> one Answer per branch, in order, on these parameters; about `tokens` tokens a batch.

    Equal branches of a request are scored once, so that they tie exactly.
    """

    def score(requests: Sequence[Request]) -> list[list[Answer]]:
        unique = [Request(r.context, tuple(dict.fromkeys(r.branches))) for r in requests]
        rows = [_row(r) for r in unique]
        answers: list[list[Answer]] = [[] for _ in requests]

        def collect(batch: _Batch, result: Any) -> None:
            nll, hits = (np.asarray(a) for a in result)
            start = 0
            for member in batch.members:
                found = {}
                for branch in unique[member].branches:
                    end = start + len(branch)
                    found[branch] = Answer(nll[start:end], hits[start:end])
                    start = end
                answers[member] = [found[branch] for branch in requests[member].branches]

        pending = None
        for batch in batches(rows, tokens):
            result = _score(config, params, batch.arrays)
            if pending is not None:
                collect(*pending)
            pending = (batch, result)
        if pending is not None:
            collect(*pending)
        return answers

    return score
