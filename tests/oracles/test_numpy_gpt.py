"""The numpy oracle is itself proven: its gradients against finite differences, and causality by construction."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles import numpy_gpt

CFG = SimpleNamespace(depth=2, width=16, head_dim=8, vocab=23, softcap=15.0, rope_base=10000.0)


Path = tuple[str | int, ...]


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, np.ndarray]]:
    """Every array of nested dicts and tuples, with its keys and indices."""
    if isinstance(tree, np.ndarray):
        yield path, tree
    else:
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(part, (*path, key))


def test_every_gradient_equals_central_differences() -> None:
    """Embedding, head and four matrices in two layers, 12 entries each: analytic equals numeric gradient to 1e-6 relative
    (float64, step 1e-5).
    """
    params = numpy_gpt.to_float64(numpy_gpt.random_params(0, CFG))
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, CFG.vocab, (2, 7)), rng.integers(0, CFG.vocab, (2, 7))
    targets[0, 3] = -1
    _, grads = numpy_gpt.loss_and_grads(params, tokens, targets, CFG)
    weights = dict(_leaves(params))
    gradients = dict(_leaves(grads))
    assert len(gradients) == 10 and gradients.keys() == weights.keys()
    for path, grad in gradients.items():
        leaf = weights[path]
        scale = np.abs(grad).max()
        assert scale > 0, path
        for flat in rng.integers(0, leaf.size, 12):
            at = np.unravel_index(flat, leaf.shape)
            keep = leaf[at]
            leaf[at] = keep + 1e-5
            up, _ = numpy_gpt.loss_and_grads(params, tokens, targets, CFG)
            leaf[at] = keep - 1e-5
            down, _ = numpy_gpt.loss_and_grads(params, tokens, targets, CFG)
            leaf[at] = keep
            assert (up - down) / 2e-5 == pytest.approx(grad[at], abs=1e-6 * scale), (path, at)


def test_loss_is_the_mean_of_token_losses() -> None:
    """The training loss is the mean of the per-token losses over the targets that count (1e-12)."""
    params = numpy_gpt.random_params(2, CFG)
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(0, CFG.vocab, (2, 9)), rng.integers(0, CFG.vocab, (2, 9))
    nll = numpy_gpt.token_losses(params, tokens, targets, CFG)
    loss, _ = numpy_gpt.loss_and_grads(params, tokens, targets, CFG)
    assert loss == pytest.approx(nll.mean(), rel=1e-12)
    masked = targets.copy()
    masked[1] = -1
    loss, _ = numpy_gpt.loss_and_grads(params, tokens, masked, CFG)
    assert loss == pytest.approx(nll[0].mean(), rel=1e-12)


def test_causal_and_rotation_is_relative() -> None:
    """Changing token t leaves the logits before t bit-equal; shifting every position leaves q.k unchanged to 1e-12."""
    params = numpy_gpt.random_params(4, CFG)
    tokens = np.random.default_rng(5).integers(0, CFG.vocab, (1, 8))
    other = tokens.copy()
    other[0, 5] = (other[0, 5] + 1) % CFG.vocab
    a, b = numpy_gpt.forward(params, tokens, CFG), numpy_gpt.forward(params, other, CFG)
    assert np.array_equal(a[:, :5], b[:, :5]) and not np.allclose(a[:, 5:], b[:, 5:])
    rng = np.random.default_rng(6)
    q, k = rng.standard_normal((2, 1, 6, 1, 8))
    near = numpy_gpt.rope_tables(6, 8, 1e4)
    far = numpy_gpt.rope_tables(6, 8, 1e4, start=100)
    dots = [np.einsum("btnh,bsnh->ts", numpy_gpt.rope(q, *t), numpy_gpt.rope(k, *t)) for t in (near, far)]
    assert np.allclose(*dots, atol=1e-12)
