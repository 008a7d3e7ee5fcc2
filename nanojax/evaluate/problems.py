"""The problems of the chat evaluation: which rows a task takes, what is asked, and what is a right answer."""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojax.cli import UserError
from nanojax.evaluate import grade, sandbox
from nanojax.evaluate.grade import Grade, Reply
from nanojax.tasks import generated, hub, mixture, rows
from nanojax.tasks.hub import Messages

SHUFFLE = 42  # nanochat's seed: the first N problems are the same as there


class Choice(NamedTuple):
    """A question with labelled choices, and the place of the right one among the labels."""

    messages: Messages
    labels: tuple[str, ...]
    right: int


class Open(NamedTuple):
    """A question that is answered in the model's own words."""

    messages: Messages
    grade: Callable[[Reply], Grade]


Problem = Choice | Open


def _choice(labels: Sequence[str], messages: Messages) -> Choice:
    answer, labels = messages[-1]["content"], tuple(labels)
    if labels.count(answer) != 1:
        raise UserError(f"its answer {answer!r} is not one of its labels {', '.join(map(str, labels))}")
    return Choice(messages, labels, labels.index(answer))


def _mmlu(row: Any, messages: Messages) -> Choice:
    return _choice("ABCD", messages)


def _arc(row: Any, messages: Messages) -> Choice:
    return _choice(row["choices"]["label"], messages)


def _number(row: Any, messages: Messages) -> Open:
    expected = grade.final_number(tuple(p["text"] for p in messages[-1]["content"] if p["type"] == "text"))
    if expected is None:
        raise UserError("its answer has no number behind ####")
    return Open(messages, functools.partial(grade.number, expected))


def _exact(row: Any, messages: Messages) -> Open:
    return Open(messages, functools.partial(grade.exact, messages[-1]["content"]))


def _program(row: Any, messages: Messages) -> Open:
    parts = row["prompt"], row["test"], row["entry_point"]
    if not all(isinstance(part, str) for part in parts):
        raise UserError("prompt, test and entry_point must be text")
    return Open(messages, functools.partial(grade.program, *parts))


class Task(NamedTuple):
    """baseline: the accuracy of guessing. problem: of a row and the conversation it becomes."""

    baseline: float
    problem: Callable[[Any, Messages], Problem]


TASKS = {
    "arc_easy": Task(0.25, _arc),
    "arc_challenge": Task(0.25, _arc),
    "mmlu": Task(0.25, _mmlu),
    "gsm8k": Task(0.0, _number),
    "humaneval": Task(0.0, _program),
    "counting": Task(0.0, _number),
    "spelling": Task(0.0, _exact),
    "sums": Task(0.0, _number),
}


def check(names: Sequence[str], source: Path) -> None:
    """UserError, at once, where rows of a task are not there."""
    missing = []
    for name in names:
        if name in hub.TASKS and not (source / name).is_dir():
            missing.append(name)
        elif name in hub.TASKS:
            mixture.place(source, name, hub.TASKS[name].test)
    if missing:
        raise UserError(
            f"{source}: has no {', '.join(missing)}; fetch with `python -m nanojax.tasks download {' '.join(missing)} "
            f"--out {source}`, name their folder with --source, or choose others with --tasks"
        )


def load(
    name: str, source: Path, words: Callable[[], Sequence[str]], limit: int = 0, held_out: bool = True
) -> list[Problem]:
    """A task's problems: its test rows in nanochat's shuffled order, or held-out ones of a generated task.

    Args:
      source: the folder with the hub's tasks.
      words: to be spelled; called only if they are needed.
      limit: the first so many; 0 = all. Of a generated task that is not held out, as many as are generated.
      held_out: False: those to train on instead.
    Raises UserError naming the row that is none of this task.
    """
    if name in generated.TASKS:
        return _generated(name, words() if name != "sums" else (), limit, held_out)
    split = hub.TASKS[name].test if held_out else hub.TASKS[name].train
    found = list(rows.read(mixture.place(source, name, split)))
    if not found:
        raise UserError(f"{source / name}: has no {'test' if held_out else 'training'} row; fetch it again")
    order = np.random.default_rng(SHUFFLE).permutation(len(found))
    return [_problem(name, found[i]) for i in order[: limit or None]]


def _problem(name: str, row: rows.Row) -> Problem:
    messages = mixture.checked(row, hub.TASKS[name].messages)
    with rows.named(row):
        return TASKS[name].problem(row.value, messages)


def _generated(name: str, words: Sequence[str], limit: int, held_out: bool) -> list[Problem]:
    """Those that `nanojax.tasks prepare` makes; a question that comes twice is asked once."""
    count = mixture.VALID if held_out else limit
    made = (generated.conversation(name, words, i, held_out) for i in range(count))
    unique = {messages[0]["content"]: messages for messages in made}
    return [TASKS[name].problem(None, messages) for messages in list(unique.values())[: limit or None]]


def sandbox_lacks() -> tuple[str, ...]:
    """The protections that a program of the model will not have on this machine. UserError where none can run."""
    if not sys.platform.startswith("linux"):
        raise UserError("humaneval: runs programs that the model wrote, and their sandbox needs Linux; leave it out")
    found = sandbox.run("pass", seconds=30)
    if found.outcome != "finished":
        raise UserError(f"humaneval: the sandbox cannot run a program on this machine ({found.reason}); leave it out")
    return found.missing
