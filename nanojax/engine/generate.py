"""Rows of text on the host: blocks of the compiled loop, and between them the calculator's answers."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.conversation import PARTS
from nanojax.engine import decode
from nanojax.engine.calculator import calculate
from nanojax.engine.choose import Choice
from nanojax.engine.decode import BLOCK, ENDS, FORCED, Rows, Stops
from nanojax.tokenizer import Tokenizer

PATIENCE = 0.05  # seconds that a reader waits for the next tokens


class Written(NamedTuple):
    """What one call of the loop wrote: tokens int32 [K,B], -1 = none, and bool [K,B], which of them were forced."""

    tokens: np.ndarray
    forced: np.ndarray


class Calculator:
    """Reads what rows write. A row that closes an expression gets the tokens of its result, to write next.

    The result is encoded by itself, between its two special tokens, as in the training data. An expression that is none gets
    nothing, and the model goes on.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, evaluate: Callable[[str], str | None] = calculate):
        opens, closes, _ = PARTS["python"]
        before, after, _ = PARTS["python_output"]
        self.tokenizer, self.evaluate = tokenizer, evaluate
        self.opens, self.closes = tokenizer.special(opens), tokenizer.special(closes)
        self.around = tokenizer.special(before), tokenizer.special(after)
        self.open: list[list[int] | None] = [None] * rows

    def read(self, row: int, token: int) -> list[int] | None:
        """One chosen token of a row; the tokens that answer it, if it closes an expression that has a result."""
        expression = self.open[row]
        if token == self.opens:
            self.open[row] = []
        elif token == self.closes and expression is not None:
            self.open[row] = None
            return self._answer(expression)
        elif expression is not None:
            expression.append(token)
        return None

    def _answer(self, expression: list[int]) -> list[int] | None:
        result = self.evaluate(self.tokenizer.decode(expression))
        if result is None:
            return None
        answer = [self.around[0], *self.tokenizer.encode(result), self.around[1]]
        return answer if len(answer) <= FORCED else None


class Decoder:
    """Rows that are being written. `rows` is the state on the device, whole between two blocks."""

    def __init__(
        self,
        config: Config,
        params: Any,
        rows: Rows,
        choice: Choice,
        ends: Sequence[int] = (),
        vocab: int | None = None,
        calculator: Calculator | None = None,
    ):
        self.config, self.params, self.rows, self.calculator = config, params, rows, calculator
        self.vocab = min(vocab or config.model.V, config.model.V)
        as_array = lambda value, dtype: np.asarray(value, dtype)
        self.choice = Choice(*map(as_array, choice, (np.float32, np.int32, np.float32)))
        padded = [*ends, *[-2] * (ENDS - len(ends))]
        self.stops = Stops(
            as_array(padded, np.int32), as_array(-2 if calculator is None else calculator.closes, np.int32)
        )

    def blocks(self, live: bool = False) -> Iterator[Written]:
        """Until every row has ended. live: as many tokens at a time as PATIENCE allows, the first one alone."""
        limit = 1 if live else BLOCK
        while True:
            begin = time.monotonic()
            self.rows, *written = decode.block(
                self.config, self.vocab, self.params, self.rows, self.choice, self.stops, np.int32(limit)
            )
            tokens, forced = map(np.asarray, written)
            count = int(np.sum((tokens >= 0).any(1)))
            written = Written(tokens[:count], forced[:count])
            if live and count:
                each = (time.monotonic() - begin) / count
                limit = max(1, min(BLOCK, 2 * limit, int(PATIENCE / each)))
            self._answer_calls(written)
            if count:
                yield written
            if bool(np.all(np.asarray(self.rows.ended))):
                return

    def _answer_calls(self, written: Written) -> None:
        if self.calculator is None:
            return
        for tokens, forced in zip(written.tokens, written.forced):
            for row in np.flatnonzero((tokens >= 0) & ~forced):
                answer = self.calculator.read(int(row), int(tokens[row]))
                if answer is not None:
                    self.rows = decode.force(self.rows, int(row), answer)


def rows_of(
    config: Config,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new: Sequence[int],
    samples: int = 1,
    seed: int = 0,
    int8_cache: bool = False,
    length: int = 0,
) -> Rows:
    """`samples` rows of each prompt, whose first token is still to be chosen. Each prompt is read once.

    Args:
      new: per prompt, the most tokens that each of its rows may write.
      length: tokens that the caches hold at least, so that calls with shorter prompts need no other program.
    Raises UserError when a prompt and its new tokens exceed the model's sequence, or an id its vocabulary.
    """
    for prompt, count in zip(prompts, new, strict=True):
        check(config, prompt, count)
    length = max(length, *(len(prompt) + count for prompt, count in zip(prompts, new)))
    empty = lambda: decode.empty_cache(config, length, int8_cache)
    caches = (decode.prefill(config, params, empty(), prompt[:-1]) for prompt in prompts)
    return decode.begin(caches, prompts, samples, new, seed)


def check(config: Config, prompt: Sequence[int] | np.ndarray, new: int) -> None:
    """UserError where a prompt cannot be continued by `new` tokens."""
    S, T = len(prompt), config.model.T
    if not S:
        raise UserError("empty prompt: give at least the begin token")
    if S >= T:
        raise UserError(f"the prompt's {S} tokens leave no room in the model's sequence of {T}; shorten it")
    if S + new > T:
        raise UserError(
            f"the prompt's {S} tokens and {new} new ones exceed the model's sequence of {T}; ask for at most {T - S}"
        )
    if min(prompt) < 0 or max(prompt) >= config.model.V:
        raise UserError(f"the prompt holds ids outside the model's vocabulary of {config.model.V}")
