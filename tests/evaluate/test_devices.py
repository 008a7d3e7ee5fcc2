"""Evaluation shared by two devices gives what one device gives."""

import argparse
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from oracles import numpy_gpt

from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.evaluate import answers, bpb, choices, devices, likelihood
from nanojax.evaluate.choices import Question
from nanojax.evaluate.likelihood import Request
from nanojax.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
RNG = np.random.default_rng(0)
DRAWN = [RNG.integers(0, 256, n).tolist() for n in (9, 40, 70, 1, 95, 33, 12)]  # an odd number of them


@pytest.fixture
def model(tiny: Callable[..., Config]) -> tuple[Config, Any]:
    config = tiny(model={"depth": 1, "vocab": 320, "seq": 96}, train={"tokens_per_step": 192})
    return config, jax.tree.map(jax.numpy.asarray, numpy_gpt.random_params(0, config))


def _bpb(config: Config, params: Any) -> Any:
    """Five rows, of which one is half empty, in batches of two a device."""
    texts = [("a", "the law of peace " * 20), ("b", "ünïté " * 10)]
    sources = bpb.of_texts(config, params, TOKENIZER, texts, 2)
    return {name: total.scores() for name, total in sources.items()}


def _likelihood(config: Config, params: Any) -> Any:
    """Contexts with one branch and with several, in batches that three rows do not fill."""
    requests = [Request(tuple(d), (tuple(d[:5]), tuple(d[2:9]))) for d in DRAWN]
    requests += [Request(tuple(d), (tuple(d[:3]),)) for d in DRAWN]
    found = likelihood.scorer(config, params, 256)(requests)
    return [a for each in found for a in (*(a.nll for a in each), *(a.hits for a in each))]


def _choices(config: Config, params: Any) -> Any:
    asked = [Question(prompt, [3, 50 + i, 90]) for i, prompt in enumerate(DRAWN)]
    return sorted(pair for batch in choices.choose(config, params, asked, 128) for pair in batch)


def _answers(config: Config, params: Any) -> Any:
    return [a for batch in answers.write(config, params, TOKENIZER, DRAWN, 6, 2) for a in batch]


@pytest.mark.parametrize(
    "measured", [_bpb, *(pytest.param(f, marks=pytest.mark.slow) for f in (_likelihood, _choices, _answers))]
)
def test_two_devices_find_what_one_does(model: tuple[Config, Any], measured: Callable[..., Any]) -> None:
    """Bits per byte and log-likelihoods to 1e-6; choices and the tokens of answers exactly."""
    config, params = model
    on_two = devices.spread(params, devices.chosen("all"))
    assert devices.count(on_two) == 2 and devices.count(params) == 1
    one, two = measured(config, params), measured(config, on_two)
    if measured in (_choices, _answers):
        assert one == two
    else:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, two)


def test_rows_are_divided_and_results_are_whole(model: tuple[Config, Any]) -> None:
    """Each device computes its half of the rows, and has the results of all."""
    config, params = model
    seen = []
    double = devices.by_rows(lambda config, params, rows: (seen.append(rows.shape), rows * 2)[1])
    rows = np.arange(12).reshape(4, 3)
    found = double(config, devices.spread(params, devices.chosen("2")), rows)
    assert found.is_fully_replicated and len(found.devices()) == 2 and seen == [(2, 3)]
    np.testing.assert_array_equal(found, rows * 2)
    np.testing.assert_array_equal(double(config, params, rows), rows * 2)


def test_turns(model: tuple[Config, Any]) -> None:
    """Two pieces at a time, each on its own device, results in order; an error ends it, and what had not begun is left."""
    on_two, both = devices.spread(model[1], devices.chosen("2")), threading.Barrier(2, timeout=20)

    def work(params: Any, piece: int) -> tuple[int, Any]:
        both.wait()
        (device,) = params["head"].devices()
        assert jax.numpy.zeros(1).devices() == {device}
        return piece, device

    found = list(devices.by_turns(work, range(6), on_two))
    assert [piece for piece, _ in found] == list(range(6)) and len({device for _, device in found}) == 2
    begun = []
    fail = lambda params, piece: begun.append(piece) or 1 // piece
    with pytest.raises(ZeroDivisionError):
        list(devices.by_turns(fail, range(1000), on_two))
    assert len(begun) < 1000


def test_numbers_that_cannot_be() -> None:
    """More devices than there are, none, or no number: one line."""
    with pytest.raises(UserError, match=r"^--devices=3: jax sees 2 here; XLA_FLAGS="):
        devices.chosen("3")
    for text in ("0", "two", "-1", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number of devices from 1, or all"):
            devices.number(text)
