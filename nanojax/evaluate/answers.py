"""Answers that a model writes greedily, many rows at a time in fixed shapes, with the calculator."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from nanojax.config import Config
from nanojax.engine.choose import Choice
from nanojax.engine.generate import Calculator, Decoder, rows_of
from nanojax.evaluate import devices
from nanojax.tokenizer import Tokenizer

ROUND = 256  # a cache's length is a multiple of it, so that most tasks share a program


class Answer(NamedTuple):
    """The tokens of an answer without its end, and how it ended: "end", "cut" at the limit, "no_room" for any token."""

    tokens: list[int]
    ended: Literal["end", "cut", "no_room"]


def write(
    config: Config, params: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], tokens: int, rows: int
) -> Iterator[list[Answer]]:
    """The answers in the prompts' order, up to `rows` at a time on each device.

    An answer has at most `tokens` tokens, and as many as the model's sequence leaves. A prompt as long as that has no room.
    """
    T = config.model.T
    rows = min(rows, len(prompts))
    fit = [len(prompt) for prompt in prompts if len(prompt) < T]
    length = min(T, -(-(max(fit, default=1) + tokens) // ROUND) * ROUND)  # of every batch's cache

    def some(params: Any, start: int) -> list[Answer]:
        group = prompts[start : start + rows]
        padded = [*group, *[()] * (rows - len(group))]
        room = [min(tokens, T - len(prompt)) if 0 < len(prompt) < T else 0 for prompt in padded]
        asked = [prompt if new else [tokenizer.bos] for prompt, new in zip(padded, room)]
        written = _written(config, params, tokenizer, asked, room, length)
        return [a if new else Answer([], "no_room") for a, new in zip(written[: len(group)], room)]

    yield from devices.by_turns(some, range(0, len(prompts), rows), params)


def _written(
    config: Config, params: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], room: list[int], length: int
) -> list[Answer]:
    ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
    state = rows_of(config, params, prompts, room, length=length)
    calculator = Calculator(tokenizer, len(prompts))
    decoder = Decoder(config, params, state, Choice(), ends, tokenizer.vocab_size, calculator)
    columns = [np.zeros((0, len(prompts)), np.int32), *(block.tokens for block in decoder.blocks())]
    found = []
    for row in np.concatenate(columns).T:
        tokens = row[row >= 0].tolist()
        ended = bool(tokens) and tokens[-1] in ends
        found.append(Answer(tokens[:-1] if ended else tokens, "end" if ended else "cut"))
    return found
