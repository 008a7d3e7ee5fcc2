"""The numpy oracle of the 2026 model is itself proven: gradients by finite differences, and each part by what it alone does."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from oracles import numpy_gpt2026 as oracle

MODEL = oracle.Model(head_dim=8, short_window=3, rope_base=100.0)
VOCAB, WIDTH, T = 11, 32, 9


def _params(depth: int, seed: int = 0) -> oracle.Params:
    return oracle.random_params(np.random.default_rng(seed), depth, VOCAB, MODEL.head_dim, WIDTH)


def _tokens(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def _leaves(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], np.ndarray]]:
    """Every array of the nested dicts and tuples, with its keys and indices."""
    if isinstance(tree, np.ndarray):
        yield path, tree
    else:
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(part, (*path, key))


def _without_blocks(depth: int) -> oracle.Params:
    """Parameters with which no block adds anything: x stays the smeared embedding."""
    params = _params(depth)
    for w in params["blocks"]:
        w["o"][:] = w["down"][:] = 0
    params["residual"][:], params["first"][:], params["backout"][:] = 1, 0, 0
    return params


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_gradient_equals_central_differences(depth: int) -> None:
    """Each array along a random direction and at 4 random entries, to 1e-7 of its largest gradient entry and 1e-9 of the loss's
    rounding over the step. Windows cut short layers, and targets are weighted. eps is large because at depths 1 and 2 b is the
    last x: without eps the final norm would cancel beta.
    """
    model, rng = MODEL._replace(eps=0.01), np.random.default_rng(depth)
    params, tokens, targets = _params(depth), _tokens(2, T), _tokens(2, T, seed=2)
    weights = rng.uniform(0, 2, (2, T))
    weights[0, 3] = 0
    loss, grads = oracle.loss_and_grads(params, tokens, targets, model, weights)
    gradients = dict(_leaves(grads))
    assert gradients.keys() == dict(_leaves(params)).keys()

    def mean() -> float:
        return float((weights * oracle.losses(params, tokens, targets, model)).sum() / weights.sum())

    assert loss == pytest.approx(mean(), rel=1e-13)
    for path, leaf in _leaves(params):
        grad, before = gradients[path], leaf.copy()
        assert grad.shape == leaf.shape and np.abs(grad).max() > 1e-6, path
        entries = [np.unravel_index(flat, leaf.shape) for flat in rng.integers(0, leaf.size, 4)]
        directions = [rng.standard_normal(leaf.shape)]
        for at in entries:
            directions.append(np.zeros(leaf.shape))
            directions[-1][at] = 1
        for direction in directions:
            step = 1e-5 / np.linalg.norm(direction)
            leaf[:] = before + step * direction
            up = mean()
            leaf[:] = before - step * direction
            down = mean()
            leaf[:] = before
            bound = (1e-7 * np.abs(grad).max() + 1e-9) * np.linalg.norm(direction)
            assert (up - down) / (2 * step) == pytest.approx((grad * direction).sum(), abs=bound), path


def test_unweighted_loss_is_the_mean() -> None:
    """Without weights every target counts once, and weights of any scale are shares."""
    params, tokens, targets = _params(3), _tokens(2, T), _tokens(2, T, seed=2)
    nll = oracle.losses(params, tokens, targets, MODEL)
    assert oracle.loss_and_grads(params, tokens, targets, MODEL)[0] == pytest.approx(nll.mean(), rel=1e-13)
    first_row = np.array([7.0, 0.0])[:, None] * np.ones((2, T))
    assert oracle.loss_and_grads(params, tokens, targets, MODEL, first_row)[0] == pytest.approx(
        nll[0].mean(), rel=1e-13
    )


def test_causal_bit_for_bit() -> None:
    """Changing token 5 leaves the logits before it bit-equal and changes it and its successor: attention and smear."""
    params, tokens = _params(4), _tokens(1, T)
    other = tokens.copy()
    other[0, 5] = (other[0, 5] + 1) % VOCAB
    a, b = (oracle.logits(params, x, MODEL)[0] for x in (tokens, other))
    assert np.array_equal(a[:5], b[:5])
    assert not np.allclose(a[5], b[5]) and not np.allclose(a[6], b[6])


def test_window_is_the_query_and_so_many_to_its_left() -> None:
    """Two layers without smear, the last without output: token 0 reaches queries 0 to 3 through a window of 3 and no further.
    With the full window, which the last layer has, it reaches all.
    """
    for silent, reached in ((1, 4), (0, T)):
        params, tokens = _params(2), _tokens(1, T)
        params["smear"][:] = 0
        params["blocks"][silent]["o"][:] = 0
        other = tokens.copy()
        other[0, 0] = (other[0, 0] + 1) % VOCAB
        a, b = (oracle.logits(params, x, MODEL)[0] for x in (tokens, other))
        assert (np.abs(a - b).max(-1) > 1e-9).tolist() == [t < reached for t in range(T)]


def test_windows_and_their_keys_per_query_equal_the_published() -> None:
    """SSSL by number, the last layer full; at 2,048 tokens 512 to the left: 513 keys, 448.9 in the mean against 1,024.5."""
    assert oracle.short_window(2048) == 512
    assert oracle.windows(26, 2048, 512) == [2048 if i in (3, 7, 11, 15, 19, 23, 25) else 512 for i in range(26)]
    assert [i for i, w in enumerate(oracle.windows(32, 2048, 512)) if w == 2048] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert oracle.windows(1, 2048, 512) == [2048]
    short, full = (oracle.visible(2048, w).sum(1) for w in (512, 2048))
    assert short[:3].tolist() == [1, 2, 3] and short.max() == short[512] == 513 and short[511] == 512
    assert short.mean() == pytest.approx(448.9, abs=0.05) and full.mean() == 1024.5
    assert (3 * short.mean() + full.mean()) / 4 / full.mean() == pytest.approx(0.58, abs=0.005)


def test_smear_adds_the_unsmeared_token_before() -> None:
    """Without blocks the logits are 15 tanh(rms(x) Whead^T / 15) of x_t = e_t + s sigmoid(w . e_t[:24]) e_(t-1), by hand."""
    params = _without_blocks(2)
    e = [row / np.sqrt((row @ row) / WIDTH + 2.0**-23) for row in params["embed"][[4, 7, 2]]]
    gates = [1 / (1 + np.exp(-(params["smear_gate"][0] @ row[:24]))) for row in e]
    x = [e[0], e[1] + 0.7 * gates[1] * e[0], e[2] + 0.7 * gates[2] * e[1]]
    z = np.array([row / np.sqrt((row @ row) / WIDTH + 2.0**-23) for row in x])
    expected = 15 * np.tanh(z @ params["head"].T / 15)
    assert np.allclose(oracle.logits(params, np.array([[4, 7, 2]]), MODEL)[0], expected, rtol=0, atol=1e-12)


def test_one_layer_by_hand() -> None:
    """All of a single layer for one token, query by key by head in Python's loops: to 1e-12."""
    params, tokens = _params(1), _tokens(1, 5)
    params["smear"][:] = 0
    w, t = params["blocks"][0], 4

    def normed(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 2.0**-23)

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for j in range(4):
            turn = position * 100.0 ** (-j / 4)
            out[j] = x[j] * np.cos(turn) + x[j + 4] * np.sin(turn)
            out[j + 4] = x[j + 4] * np.cos(turn) - x[j] * np.sin(turn)
        return out

    x = [(params["residual"][0] + params["first"][0]) * normed(params["embed"][token]) for token in tokens[0]]
    y = np.zeros(WIDTH)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        weights, values = [], []
        for s in range(5):
            u = normed(x[s])
            q = 1.2 * normed(turned((w["q"] @ normed(x[t]))[part], t))
            k = 1.2 * normed(turned((w["k"] @ u)[part], s))
            weights.append(np.exp(q @ k / np.sqrt(8)))
            gate = 3 / (1 + np.exp(-(w["gate"][head] @ u[:12])))
            values.append((w["v"] @ u)[part] + gate * w["value"][tokens[0, s]][part])
        y[part] = sum(p * v for p, v in zip(weights, values)) / sum(weights)
    out = x[t] + w["o"] @ y
    out = out + w["down"] @ np.maximum(w["up"] @ normed(out), 0) ** 2
    expected = 15 * np.tanh(params["head"] @ normed((1 - 0.2) * out) / 15)  # b is the only layer's output
    assert np.allclose(oracle.logits(params, tokens, MODEL)[0, t], expected, rtol=0, atol=1e-12)


def test_first_is_added_before_each_layer() -> None:
    """x0 alone passes where r is 0: the last layer's a cancels in the norm, so the logits are those without layers."""
    params = _without_blocks(3)
    expected = oracle.logits(params, _tokens(1, T), MODEL)
    params["residual"][2], params["first"][2] = 0, 0.5
    assert np.allclose(
        oracle.logits(params, _tokens(1, T), MODEL), expected, rtol=0, atol=1e-5
    )  # eps against a smaller x
    params["first"][2] = 0
    assert np.array_equal(oracle.logits(params, _tokens(1, T), MODEL), np.zeros((1, T, VOCAB)))


@pytest.mark.parametrize("depth, middle", [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_backout_takes_the_output_of_layer_half_depth(depth: int, middle: int) -> None:
    """With beta 1 the logits are 0 exactly while no layer after L//2 writes, and no longer when layer L//2 + 1 does."""
    params = _params(depth)
    params["residual"][:], params["first"][:], params["backout"][:] = 1, 0, 1
    for w in params["blocks"][middle + 1 :]:
        w["o"][:] = w["down"][:] = 0
    assert not oracle.logits(params, _tokens(1, T), MODEL).any()
    if middle + 1 < depth:
        params["blocks"][middle + 1]["down"][:] = 0.1
        assert oracle.logits(params, _tokens(1, T), MODEL).any()


def test_value_embeddings_stand_at_alternate_layers_and_in_the_last() -> None:
    """Layers counted back from the last; each head's gate is 3 sigmoid of 12 channels: 1.5 where the gate's weights are 0."""
    layers = [[i for i, w in enumerate(_params(depth)["blocks"]) if "value" in w] for depth in (1, 2, 3, 4)]
    assert layers == [[0], [1], [0, 2], [1, 3]]
    # One token sees only itself: attention gives its v. A value of u (v - u) / 1.5 instead of v is the same.
    params = _without_blocks(1)
    w = params["blocks"][0]
    w["o"][:], w["gate"][:] = np.eye(WIDTH), 0
    tokens = np.array([[3]])
    e = params["embed"][3] / np.sqrt((params["embed"][3] ** 2).mean() + 2.0**-23)
    u = e / np.sqrt((e @ e) / WIDTH + 2.0**-23)
    w["value"][3] = -(u @ w["v"].T) / 1.5
    params["head"] = np.eye(WIDTH)[:VOCAB]
    assert np.allclose(oracle.logits(params, tokens, MODEL)[0, 0], 15 * np.tanh(u[:VOCAB] / 15), rtol=0, atol=1e-6)


def test_rotation_is_relative_and_by_minus_the_angle() -> None:
    """(1, 0) at position 1 turns to (cos 1, -sin 1); equal vectors' products depend on the distance only (1e-12)."""
    pair = np.ones((1, 2, 1, 1)) * np.array([1.0, 0.0])
    assert np.allclose(oracle.rope(pair, 1e5)[0, 1, 0], [np.cos(1), -np.sin(1)], rtol=0, atol=1e-15)
    q, k = np.ones((1, T, 1, 1)) * np.random.default_rng(3).standard_normal((2, 1, 1, 1, 8))
    dots = np.einsum("btnh,bsnh->ts", oracle.rope(q, 100.0), oracle.rope(k, 100.0))
    assert np.allclose(dots[1:, 1:], dots[:-1, :-1], rtol=0, atol=1e-12)


def test_eps_stands_in_every_norm() -> None:
    """With a huge eps each norm divides by sqrt(eps), and the logits of blocks without output are e/eps Whead^T."""
    params = _without_blocks(2)
    params["smear"][:] = 0
    tokens = _tokens(1, T)
    logits = oracle.logits(params, tokens, MODEL._replace(eps=1e8))
    assert np.allclose(logits * 1e8, params["embed"][tokens] @ params["head"].T, rtol=0, atol=1e-6)
