"""The endless stream of packed conversations, pass after pass; any row is found without the rows before it in its pass."""

import bisect
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from nanojax.cli import UserError
from nanojax.data.loader import FOREVER, TrainIterator, pass_seed
from nanojax.tasks import prepared
from nanojax.tasks.packing import Plan, plan_pass
from nanojax.tasks.prepared import Conversations
from nanojax.tokenizer import Tokenizer


class Pass(NamedTuple):
    """Pass `number`, whose first row is row `start` of the stream."""

    number: int
    start: int
    plan: Plan


class ConversationStream:
    """Rows int32 [2,T+1]: tokens, and 1 where one is supervised. Rows are padded with the begin token."""

    def __init__(self, folder: Path, row: int, seed: int):
        self.folder, self.row, self.seed = folder, row, seed
        self.tokenizer, self.conversations = prepared.load(folder, "train")
        self.passes: list[Pass] = []
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """Row `index` of the stream."""
        now = self.at(int(index))
        return read_row(self.conversations, now.plan, int(index) - now.start, self.tokenizer.bos, self.row)

    def at(self, position: int) -> Pass:
        """The pass that row `position` is of."""
        with self.lock:
            if not self.passes:
                self._begin(0, 0)
            while position >= self.passes[-1].start + self.passes[-1].plan.rows:
                last = self.passes[-1]
                self._begin(last.number + 1, last.start + last.plan.rows)
            return self.passes[bisect.bisect_right(self.passes, position, key=lambda p: p.start) - 1]

    def _begin(self, number: int, start: int) -> None:
        plan = plan_pass(self.conversations, self.row, pass_seed(self.seed, number))
        if not plan.rows:
            raise UserError(
                f"{self.folder}: no conversation has an answer within {self.row} tokens; choose a longer --model.seq"
            )
        self.passes.append(Pass(number, start, plan))

    def identity(self) -> dict[str, Any]:
        """What must be the same wherever a state of this stream is restored."""
        of = {"tokenizer": self.tokenizer.fingerprint, "conversations": self.conversations.sha256}
        return {"row": self.row, "seed": self.seed, **of}

    def state(self, position: int) -> dict[str, Any]:
        """JSON: the pass of row `position`."""
        now = self.at(position)
        return {"pass": now.number, "start": now.start}

    def restored(self, state: dict[str, Any]) -> "ConversationStream":
        """A new stream at `state`, its files opened anew."""
        new = ConversationStream(self.folder, self.row, self.seed)
        new._begin(state["pass"], state["start"])
        return new


def train_iterator(
    folder: str, rows: int, seq: int, seed: int, vocab: int
) -> tuple[Tokenizer, TrainIterator[ConversationStream]]:
    """The tokenizer, and endless batches int32 [rows, 2, seq+1]. UserError names what is missing, damaged or too large."""
    stream = ConversationStream(Path(folder), seq + 1, seed)
    if stream.tokenizer.vocab_size > vocab:
        raise UserError(f"{folder}: its tokenizer has {stream.tokenizer.vocab_size} ids, the model only {vocab}")
    stream.at(0)
    return stream.tokenizer, TrainIterator(stream, rows)


def valid_rows(folder: str | os.PathLike, seq: int) -> Iterator[np.ndarray]:
    """The rows of one pass over what is held out, int32 [2, seq+1]. UserError, at once, if there are none."""
    tokenizer, of = prepared.load(folder, "valid", verify=False)
    plan = plan_pass(of, seq + 1, 0) if len(of) else None
    if plan is None or not plan.rows:
        raise UserError(
            f"{folder}: no held-out conversation has an answer within {seq + 1} tokens; prepare more of them"
        )
    return (read_row(of, plan, i, tokenizer.bos, seq + 1) for i in range(plan.rows))


def read_row(of: Conversations, plan: Plan, index: int, bos: int, row: int) -> np.ndarray:
    """int32 [2, row]: tokens and mask of one row of the plan."""
    out = np.zeros((2, row), np.int32)
    out[0] = bos
    used = 0
    for number in plan.numbers[plan.first[index] : plan.first[index + 1]].tolist():
        ids, mask = of[number]
        size = min(len(ids), row - used)  # only the first of a row can be longer than its room
        out[0, used : used + size] = ids[:size]
        out[1, used : used + size] = mask[:size]
        used += size
    return out
