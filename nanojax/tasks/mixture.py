"""A mixture: a list of tasks, each with how often it comes in one pass, and its conversations for training and validation."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nanojax.cli import UserError
from nanojax.conversation import turns
from nanojax.tasks import generated, hub, rows
from nanojax.tasks.hub import Messages

HELD_OUT = 50  # of a file of conversations, the first and every 50th from there on is held out
MOST = 10_000_000  # conversations of a generated task, or times that a task comes; nanochat's largest is 200,000
VALID = 256  # conversations of a generated task that are held out
_NUMBERED = re.compile(r"(.+):(-?\d{1,99})")


class Entry(NamedTuple):
    """What the command line names: "gsm8k:4" is ("gsm8k", 4)."""

    name: str
    number: int  # times in one pass; of a generated task the conversations


class Conversation(NamedTuple):
    """A conversation, where it stands, and whether it is held out."""

    place: str
    messages: Messages
    valid: bool


def parse(text: str) -> Entry:
    """UserError for what is neither a task nor a file of conversations."""
    matched = _NUMBERED.fullmatch(text)
    name, number = (matched[1], int(matched[2])) if matched else (text, 0 if text in generated.TASKS else 1)
    if name in generated.TASKS and not matched:
        raise UserError(f"{text}: say how many conversations are to be generated, for example {text}:10000")
    if not 1 <= number <= MOST:
        raise UserError(f"{text}: the number behind the colon must be from 1 to {MOST:,}")
    if name == "humaneval":
        raise UserError("humaneval: has no training conversations; it is there for evaluation")
    if name not in (*generated.TASKS, *hub.TASKS) and not os.path.exists(name):
        known = ", ".join([*hub.TASKS, *(f"{task}:N" for task in generated.TASKS)])
        raise UserError(f"{name}: no such file of conversations, nor a task; tasks are {known}")
    return Entry(name, number)


def repeats(entry: Entry) -> int:
    """How often the entry's conversations come in one pass."""
    return 1 if entry.name in generated.TASKS else entry.number


def conversations(entry: Entry, source: Path, words: Callable[[], Sequence[str]]) -> Iterator[Conversation]:
    """All conversations of an entry, once, each checked. UserError names the row that is none.

    Args:
      source: the folder with the hub's tasks, a folder per task.
      words: to be spelled; called only if they are needed.
    """
    if entry.name in generated.TASKS:
        to_spell = words() if entry.name != "sums" else ()
        for held_out, count in ((False, entry.number), (True, VALID)):
            for i in range(count):
                messages = generated.conversation(entry.name, to_spell, i, held_out)
                yield Conversation(f"{entry.name} {i}", messages, held_out)
    elif entry.name in hub.TASKS:
        task = hub.TASKS[entry.name]
        for split, valid in ((task.train, False), (task.test, True)):
            for row in rows.read(place(source, entry.name, split)):
                yield Conversation(row.place, checked(row, task.messages), valid)
    else:
        for i, row in enumerate(rows.read(Path(entry.name))):
            yield Conversation(row.place, checked(row, hub.messages), i % HELD_OUT == 0)


def place(source: Path, task: str, split: str) -> Path:
    """Where a split's rows are: SOURCE/TASK/subset/split/ as downloaded, or one file SOURCE/TASK/train.* or test.*."""
    folder = source / task / split
    if folder.is_dir():
        return folder
    kind = "test" if split == hub.TASKS[task].test else "train"
    own = sorted((source / task).glob(f"{kind}.*"))
    if len(own) != 1:
        raise UserError(
            f"{source / task}: has neither {split}/ nor one file {kind}.*; fetch it with "
            f"`python -m nanojax.tasks download {task} --out {source}`"
        )
    return own[0]


def checked(row: rows.Row, messages: Callable[[object], Messages]) -> Messages:
    """The conversation that `messages` makes of a row. UserError names the row that is none."""
    with rows.named(row):
        found = messages(row.value)
        turns(found)
        json.dumps(found, ensure_ascii=False).encode()
        return found
