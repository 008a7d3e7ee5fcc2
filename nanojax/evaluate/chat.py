"""The chat evaluation: ChatCORE's tasks and generated ones, asked and scored.

Multiple choice is scored by the row's own labels (choices.py), other tasks by what the model writes greedily (answers.py,
grade.py), both as in nanochat. figures.py has the figures.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from nanojax import cli, conversation
from nanojax.cli import UserError
from nanojax.evaluate import answers, choices, figures, grade, problems
from nanojax.evaluate.figures import Score
from nanojax.evaluate.problems import Choice, Open, Problem
from nanojax.evaluate.subject import Subject
from nanojax.tasks import words

DEFAULT = figures.MEANS["ChatCORE+counting"]
SHOWN = 5  # answers of each task that are kept to be read


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked, and how.

    Attributes:
      words: text with the words to spell; None = those that the tokenizer learnt.
      limit: problems of each task, the first N; 0 = all.
      tokens: of an answer at most.
      rows: answers that are written together on each device.
      batch_tokens: of multiple choice, tokens that go through the model together on each device.
    """

    source: Path
    words: str | None
    limit: int
    tokens: int
    rows: int
    batch_tokens: int


class _Asked(NamedTuple):
    """A problem and the tokens of its prompt."""

    problem: Problem
    prompt: list[int]


class _Outcome(NamedTuple):
    """Whether a problem was answered rightly; of a written answer also what a reader wants to see."""

    right: bool
    prompt: str = ""
    answer: str = ""
    ended: str = ""
    remark: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this evaluation alone."""
    add = parser.add_argument
    known, asked = ", ".join(problems.TASKS), ",".join(DEFAULT)
    add("--tasks", help=f"chat: which, joined by commas; there are {known} ({asked})")
    add("--source", type=cli.path, default="texts/chat", metavar="DIR",
        help="chat: folder with the tasks, from `python -m nanojax.tasks download` (%(default)s)")  # fmt: skip
    add("--words", type=cli.path, metavar="FILE",
        help="chat: text with the words to spell and count, as in `tasks prepare`; default: the tokenizer's")  # fmt: skip
    add("--rows", type=int, default=16, help="chat: answers that are written together on a device (%(default)s)")


def names_of(text: str | None) -> tuple[str, ...]:
    """The tasks that --tasks names, in the table's order. UserError for one that is none."""
    given = DEFAULT if text is None else [name for name in text.split(",") if name]
    for name in given:
        if name not in problems.TASKS:
            raise UserError(f"--tasks={name}: no such task to evaluate; there are {', '.join(problems.TASKS)}")
    if not given:
        raise UserError(f"--tasks: empty; choose from {', '.join(problems.TASKS)}")
    return tuple(name for name in problems.TASKS if name in given)


def run(subject: Subject, names: Sequence[str], options: Options, console: Console) -> list[Score]:
    """The outcomes of all tasks; each is printed when it is there. Every row is read before anything is computed."""
    asked = {name: _ask(subject, name, options) for name in names}
    lacks = problems.sandbox_lacks() if "humaneval" in names else ()
    if lacks:
        console.print(f"humaneval runs the model's programs without: {', '.join(lacks)} (the kernel refuses it)")
    found = []
    for number, name in enumerate(names, 1):
        with cli.Bar(f"{name}, task {number} of {len(names)}", len(asked[name]), "problems") as bar:
            s = _score(subject, name, asked[name], options, bar)
        if name == "humaneval":
            s = dataclasses.replace(s, answers={**s.answers, "sandbox_lacks": list(lacks)})
        console.print(figures.line(s))
        found.append(s)
    return found


def _ask(subject: Subject, name: str, options: Options) -> list[_Asked]:
    """A task's problems with their prompts. UserError names a row that cannot be asked."""
    tokenizer, V = subject.tokenizer, subject.config.model.V
    if tokenizer.vocab_size > V:
        raise UserError(f"{subject.name}: the model has {V} ids, and its tokenizer's special tokens are behind them")
    found = problems.load(name, options.source, lambda: words.of(options.words, tokenizer), options.limit)
    labels = {label for problem in found if isinstance(problem, Choice) for label in problem.labels}
    for label in sorted(labels):
        if len(tokenizer.encode(label)) != 1:
            raise UserError(f"{name}: the label {label!r} of a choice is not one token; use letters or digits")
    return [_Asked(problem, conversation.render_for_completion(tokenizer, problem.messages)) for problem in found]


def _score(subject: Subject, name: str, asked: Sequence[_Asked], options: Options, bar: cli.Bar) -> Score:
    """A task's outcome."""
    began = time.monotonic()
    is_choice = isinstance(asked[0].problem, Choice)
    outcomes: list[_Outcome] = []
    for batch in (_chosen if is_choice else _written)(subject, asked, options):
        outcomes += batch
        bar.reach(len(outcomes))
    written = {
        "tokens": options.tokens,
        "cut": sum(o.ended == "cut" for o in outcomes),
        "no_room": sum(o.ended == "no_room" for o in outcomes),
        "samples": [o._asdict() for o in outcomes[:SHOWN]],
    }
    right, seconds = sum(o.right for o in outcomes), time.monotonic() - began
    return Score(name, len(asked), right, problems.TASKS[name].baseline, seconds, {} if is_choice else written)


def _chosen(subject: Subject, asked: Sequence[_Asked], options: Options) -> Iterator[list[_Outcome]]:
    """Of questions with choices, in any order."""
    questions, right = [], []
    for problem, prompt in asked:
        assert isinstance(problem, Choice)
        questions.append(choices.Question(prompt, [subject.tokenizer.encode(label)[0] for label in problem.labels]))
        right.append(problem.right)
    for batch in choices.choose(subject.config, subject.params, questions, options.batch_tokens):
        yield [_Outcome(right[number] == place) for number, place in batch]


def _written(subject: Subject, asked: Sequence[_Asked], options: Options) -> Iterator[list[_Outcome]]:
    """Of questions that are answered in words, in their order."""
    model, prompts = (subject.config, subject.params, subject.tokenizer), [prompt for _, prompt in asked]
    left = iter(asked)
    for batch in answers.write(*model, prompts, options.tokens, options.rows):
        outcomes = []
        for answer, (problem, _) in zip(batch, left):
            assert isinstance(problem, Open)
            reply = grade.reply(subject.tokenizer, answer.tokens)
            right, remark = problem.grade(reply)
            outcomes.append(_Outcome(right, problem.messages[0]["content"], reply.whole, answer.ended, remark))
        yield outcomes
