"""Multiple choice: which of a question's own labels the model finds likeliest as its answer.

The prompt goes through the model once, and the head sees its last position only: logits are [B,V]. Questions of similar length
go together, padded to a power of two, so that few shapes are compiled. Padding stands on the right, where no prompt's token
sees it. A prompt may be longer than the model's rows: as in CORE, none is truncated.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import model
from nanojax.config import Config
from nanojax.evaluate import devices

SHORTEST = 64  # tokens; what is shorter takes XLA's CPU compiler 4 s longer


class Question(NamedTuple):
    """Token ids: a prompt, and each label as one token."""

    prompt: Sequence[int]
    labels: Sequence[int]


def choose(config: Config, params: Any, questions: Sequence[Question], tokens: int) -> Iterator[list[tuple[int, int]]]:
    """(number of the question, place of the label chosen), a batch at a time, in any order.

    A batch is about `tokens` tokens of each device. Of labels that tie, the first one is chosen.
    """
    pending: tuple[list[int], jax.Array] | None = None
    rows = lambda T: max(1, tokens // T) * devices.count(params)
    for members in [*_batches([len(q.prompt) for q in questions], rows), []]:
        ahead = (members, _scored(config, params, [questions[i] for i in members], rows)) if members else None
        if pending is not None:  # read one batch late, so that the device never waits
            numbers, scores = pending[0], np.asarray(pending[1])
            yield [(n, int(scores[row, : len(questions[n].labels)].argmax())) for row, n in enumerate(numbers)]
        pending = ahead


def _batches(lengths: Sequence[int], rows: Callable[[int], int]) -> Iterator[list[int]]:
    """Numbers of the prompts that go together: those of one padded length, `rows` of it at most, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        T = _padded(lengths[order[0]])
        same = [i for i in order[: rows(T)] if _padded(lengths[i]) == T]
        yield same
        order = order[len(same) :]


def _padded(length: int) -> int:
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _scored(config: Config, params: Any, questions: Sequence[Question], batch: Callable[[int], int]) -> jax.Array:
    """Logits [B,L] of the questions' labels; rows and labels beyond theirs mean nothing."""
    T = _padded(max(len(q.prompt) for q in questions))
    B, L = batch(T), max(len(q.labels) for q in questions)
    rows, last, labels = np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros((B, L), np.int32)
    for row, question in enumerate(questions):
        rows[row, : len(question.prompt)] = question.prompt
        last[row] = len(question.prompt) - 1
        labels[row, : len(question.labels)] = question.labels
    return jnp.take_along_axis(_last_logits(config, params, rows, last), labels, 1)


@devices.by_rows
def _last_logits(config: Config, params: Any, tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
    x_BTD = model.hidden(config, params, tokens_BT)
    return model.head(config, params, x_BTD[jnp.arange(len(last_B)), last_B])
