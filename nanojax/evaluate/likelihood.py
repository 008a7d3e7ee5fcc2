"""Log-likelihood of continuations given contexts: batched, bucketed by length, shared contexts computed once.

A Request is one context and the branches that may follow it. The four choices of a 10-shot question share 1,000 tokens
and differ in 20: the context goes through the model once, and every layer lets the branches' tokens attend to it and to
their own branch. Only the scored positions reach the head, so that logits [B,T,V] never exist. Positions of several batches
meet in the head, so that little of it is padding.
Requests are sorted by length and padded to a few lengths (`bucket`), so that the number of compilations is bounded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import model, weights
from nanojax.config import Config
from nanojax.evaluate import devices

F32 = jnp.float32
TOKENS, CPU_TOKENS = 8192, 2048  # of a batch; on a CPU, larger ones fall out of its cache
COMPILATION = 16_384  # tokens that go through a d4 on two CPU cores meanwhile: 2 to 4 s
HEAD_CHUNK = 256  # positions whose logits exist at one time on a device: 64 MiB at V = 65,536


class Request(NamedTuple):
    """Token ids: a context (not empty) that is not scored and branches that are, each by itself after the context.

    `scored`: only the last so many tokens of every branch are scored; None = all.
    """

    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    scored: int | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """For each scored token of one branch: nats [n] f32, and whether it was the model's argmax [n] bool."""

    nll: np.ndarray
    hits: np.ndarray


class _Row(NamedTuple):
    """A request as model input: trunk tokens, then tail tokens with their branch and position."""

    trunk: Sequence[int]
    tail: Sequence[int]
    branch: Sequence[int]
    position: Sequence[int]
    before: Sequence[int]  # the token before each of the tail
    needed: Sequence[int]  # places whose output the head sees: index into trunk (>= 0) or ~index into tail
    scored_at: Sequence[int]  # index into `needed`, one per scored token
    targets: Sequence[int]
    counts: Sequence[int]  # scored tokens of each branch

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, T, P): padded lengths of tail, trunk and needed places."""
        T = max(64, bucket(len(self.trunk), 32))  # shorter ones take XLA's CPU compiler 4 s longer
        if self.tail:
            S = bucket(len(self.tail), 16)
            return S, T, S + 1
        return 0, T, 1 << max(3, (len(self.needed) - 1).bit_length())


def _row(request: Request) -> _Row:
    context, branches, scored = request
    alone = sum(len(b) > 1 for b in branches) <= 1  # no two branches have inner tokens: plain causal, no tail
    trunk, tail, branch, position, before, places, targets, counts = [*context], [], [], [], [], [], [], []
    for i, b in enumerate(branches):
        counts.append(len(b) if scored is None else min(scored, len(b)))
        inner = [len(trunk) + j if alone else ~(len(tail) + j) for j in range(len(b) - 1)]
        places += [len(context) - 1, *inner][len(b) - counts[-1] : len(b)]
        targets += b[len(b) - counts[-1] :]
        if alone:
            trunk += b[:-1]
        else:
            tail += b[:-1]
            branch += [i] * len(inner)
            position += range(len(context), len(context) + len(inner))
            before += [context[-1], *b[:-2]][: len(inner)]
    needed = list(dict.fromkeys(places))
    index = {place: i for i, place in enumerate(needed)}
    return _Row(trunk, tail, branch, position, before, needed, [index[place] for place in places], targets, counts)


def _attend(q_BQNH, k_BUNH, v_BUNH, allowed_BQU, scale):
    """Attention [B,Q,N,H] of some queries over trunk and tail laid end to end, U = T+S."""
    scores = jnp.einsum("bqnh,bknh->bnqk", q_BQNH, k_BUNH, preferred_element_type=F32) * scale
    p = jax.nn.softmax(jnp.where(allowed_BQU[:, None], scores, -jnp.inf), -1).astype(v_BUNH.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", p, v_BUNH, preferred_element_type=F32).astype(q_BQNH.dtype)


@devices.by_rows
def _hidden(
    config: Config,
    params: model.Params,
    trunk_BT: jax.Array,
    tail_BS: jax.Array,
    branch_BS: jax.Array,
    position_BS: jax.Array,
    before_BS: jax.Array,
    length_B: jax.Array,
    at_BP: jax.Array,
) -> jax.Array:
    """Last block's output [B,P,D] at places `at_BP` of trunk (`length_B` tokens) and tail laid end to end; S may be 0.

    All trunks and then all tails are one row of the walk, each token with its own position. Attention takes them apart.
    """
    (B, S), T = tail_BS.shape, trunk_BT.shape[1]
    if not S:
        return _pick(model.hidden(config, params, trunk_BT), at_BP)
    causal, windows, scale = model.causal(config), weights.windows(config.model), model.attention_scale(config)
    index_S = jnp.arange(S)
    own_BSS = (branch_BS[:, :, None] == branch_BS[:, None, :]) & (index_S[:, None] >= index_S[None])[None]
    to_trunk = jnp.broadcast_to((jnp.arange(T)[None] < length_B[:, None])[:, None], (B, S, T))
    allowed_BSU = jnp.concatenate([to_trunk, own_BSS], -1)
    places_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    distance_BSU = position_BS[:, :, None] - jnp.concatenate([places_BT, position_BS], 1)[:, None]
    one_row = lambda trunk, tail: jnp.concatenate([a.reshape(1, -1, *a.shape[2:]) for a in (trunk, tail)], 1)

    def apart(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return row[0, : B * T].reshape(B, T, *row.shape[2:]), row[0, B * T :].reshape(B, S, *row.shape[2:])

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        (q_trunk, q_tail), (k_trunk, k_tail), (v_trunk, v_tail) = map(apart, (q, k, v))
        trunk, _ = causal(i, q_trunk, k_trunk, v_trunk)
        keys, values = jnp.concatenate([k_trunk, k_tail], 1), jnp.concatenate([v_trunk, v_tail], 1)
        tail = _attend(q_tail, keys, values, allowed_BSU & (distance_BSU <= windows[i]), scale)
        return one_row(trunk, tail), None

    start = one_row(places_BT, position_BS)[0] - jnp.arange(B * (T + S))
    before = one_row(jnp.pad(trunk_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1], before_BS)
    x, _ = model.walk(config, params, one_row(trunk_BT, tail_BS), attend, start, before)
    return _pick(jnp.concatenate(apart(x), 1), at_BP)


def _pick(x_BU: jax.Array, at_BP: jax.Array) -> jax.Array:
    return x_BU[jnp.arange(len(x_BU))[:, None], at_BP]


@devices.by_rows
def _head(config: Config, head: Any, x_CD: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """nats [C] f32 and argmax hits [C] bool of `targets_C` after the last block's outputs `x_CD`."""
    logits = model.head(config, {"head": head}, x_CD)
    picked = jnp.take_along_axis(logits, targets_C[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits, -1) - picked, jnp.argmax(logits, -1).astype(jnp.int32) == targets_C


def _heads(config: Config, head: Any, places: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """nats and hits of all targets of all `places` (outputs [n,D], targets [n]), in their order."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    pending: tuple[int, Any] | None = None
    share = devices.count(head)
    chunk = share * HEAD_CHUNK

    def flush(x_nD: np.ndarray, targets_n: np.ndarray) -> None:
        nonlocal pending
        n = len(x_nD)
        C = share * min(HEAD_CHUNK, 1 << max(4, (-(-n // share) - 1).bit_length()))
        result = _head(config, head, np.pad(x_nD, ((0, C - n), (0, 0))), np.pad(targets_n, (0, C - n)))
        if pending is not None:  # read one chunk late, so that the device never waits
            found.append(_read(*pending))
        pending = n, result

    xs, targets = np.zeros((0, config.model.D), np.float32), np.zeros(0, np.int32)
    for x_nD, targets_n in places:
        xs = np.concatenate([xs.astype(x_nD.dtype), x_nD])
        targets = np.concatenate([targets, targets_n])
        while len(xs) >= chunk:
            flush(xs[:chunk], targets[:chunk])
            xs, targets = xs[chunk:], targets[chunk:]
    if len(xs):
        flush(xs, targets)
    if pending is not None:
        found.append(_read(*pending))
    nll, hits = zip(*found) if found else ((np.zeros(0, np.float32),), (np.zeros(0, bool),))
    return np.concatenate(nll), np.concatenate(hits)


def _read(n: int, result: Any) -> tuple[np.ndarray, np.ndarray]:
    nll, hits = (np.asarray(a)[:n] for a in result)
    return nll, hits


def bucket(length: int, least: int) -> int:
    """The padded length: a multiple of `least`, and of an eighth of the power of two below it."""
    step = max(least, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class _Shape(NamedTuple):
    """What a batch is padded to: rows of each device, tail, trunk, needed places a row. One compilation each."""

    B: int
    S: int
    T: int
    P: int

    @property
    def tokens(self) -> int:
        return self.B * (self.S + self.T)


class _Batch(NamedTuple):
    members: list[int]
    arrays: tuple[np.ndarray, ...]


def _batch(rows: Sequence[_Row], members: list[int], shape: _Shape, share: int) -> _Batch:
    B, S, T, P = share * shape.B, *shape[1:]
    trunk, tail = np.zeros((B, T), np.int32), np.zeros((B, S), np.int32)
    branch, position, before = np.full((B, S), -1, np.int32), np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
    length, at = np.ones(B, np.int32), np.zeros((B, P), np.int32)
    for b, member in enumerate(members):
        row = rows[member]
        trunk[b, : len(row.trunk)], length[b] = row.trunk, len(row.trunk)
        tail[b, : len(row.tail)] = row.tail
        branch[b, : len(row.tail)], position[b, : len(row.tail)] = row.branch, row.position
        before[b, : len(row.tail)] = row.before
        at[b, : len(row.needed)] = [i if i >= 0 else T + ~i for i in row.needed]
    return _Batch(members, (trunk, tail, branch, position, before, length, at))


def batches(rows: Sequence[_Row], tokens: int, share: int, wasted: dict[_Shape, float]) -> Iterator[_Batch]:
    """Rows sorted by length into padded batches, the longest first: about `tokens` tokens (at least one row) of each device.

    `wasted`, kept from call to call, says which shapes are compiled and how many tokens their lack has cost.
    """
    shapes = [row.shape for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (shapes[i][0] > 0, shapes[i][1], shapes[i]), reverse=True)
    while order:
        n, (S, T, P) = 1, shapes[order[0]]
        for i in order[1:]:
            wider = max(S, shapes[i][0]), max(T, shapes[i][1]), max(P, shapes[i][2])
            if bool(S) != bool(shapes[i][0]) or n >= share * max(1, tokens // sum(wider[:2])):
                break
            n, (S, T, P) = n + 1, wider
        members, order = order[:n], order[n:]
        B = min(max(1, tokens // (S + T)), 1 << (-(-n // share) - 1).bit_length())
        yield _batch(rows, members, _compiled(_Shape(B, S, T, P), wasted), share)


@functools.cache
def _wasted(config: Config, backend: str, share: int) -> dict[_Shape, float]:
    """`batches`' memory, as long-lived as jit's: later scorers of other parameters find the same shapes compiled."""
    return {}


def _compiled(want: _Shape, wasted: dict[_Shape, float]) -> _Shape:
    """`want`, or a larger shape that is compiled, until what that costs in padding has reached a compilation's price."""
    if wasted.get(want) == math.inf:
        return want
    larger = [
        s
        for s, cost in wasted.items()
        if cost == math.inf and all(a >= b for a, b in zip(s, want)) and bool(s.S) == bool(want.S)
    ]
    near = [s for s in larger if s.T <= 2 * want.T]  # beyond, attention makes the padding dearer than its tokens
    if near:
        best = min(near, key=lambda s: s.tokens)
        cost = wasted.get(want, 0) + best.tokens - want.tokens
        if cost <= COMPILATION:
            wasted[want] = cost
            return best
    wasted[want] = math.inf
    return want


def default_tokens() -> int:
    """Tokens of a batch where the user named none."""
    return CPU_TOKENS if jax.default_backend() == "cpu" else TOKENS


def scorer(config: Config, params: Any, tokens: int | None = None) -> Callable[[Sequence[Request]], list[list[Answer]]]:
    """The function requests -> one Answer per branch, in order, on these parameters; about `tokens` tokens a batch and device.

    `tokens` None: `default_tokens`. Equal branches of a request are scored once, so that they tie exactly.
    """
    tokens = tokens or default_tokens()
    share = devices.count(params)
    wasted = _wasted(config, jax.default_backend(), share)

    def places(rows: Sequence[_Row], order: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What the head needs of each batch; `order` receives the rows in the same order."""
        pending: tuple[_Batch, jax.Array] | None = None
        for batch in [*batches(rows, tokens, share, wasted), None]:
            ahead = (batch, _hidden(config, params, *batch.arrays)) if batch else None
            if pending is not None:  # read one batch late, so that the device never waits
                members, x_BPD = pending[0].members, np.asarray(pending[1])
                order += members
                at = [x_BPD[b, rows[m].scored_at] for b, m in enumerate(members)]
                yield np.concatenate(at), np.array([t for m in members for t in rows[m].targets], np.int32)
            pending = ahead

    def score(requests: Sequence[Request]) -> list[list[Answer]]:
        unique = [r._replace(branches=tuple(dict.fromkeys(r.branches))) for r in requests]
        rows, order = [_row(r) for r in unique], []
        nll, hits = _heads(config, params["head"], places(rows, order))
        answers: list[list[Answer]] = [[] for _ in requests]
        start = 0
        for member in order:
            found = {}
            for branch, count in zip(unique[member].branches, rows[member].counts):
                found[branch] = Answer(nll[start : start + count], hits[start : start + count])
                start += count
            answers[member] = [found[branch] for branch in requests[member].branches]
        return answers

    return score
