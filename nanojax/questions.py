"""What reinforcement learning asks and how it rewards an answer: questions of a task, or of a user's Python file."""

import hashlib
import importlib.machinery
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np

from nanojax.cli import UserError, first_line
from nanojax.config import Rollouts
from nanojax.conversation import render_for_completion
from nanojax.data.loader import FOREVER, pass_seed
from nanojax.evaluate import problems
from nanojax.evaluate.grade import Reply
from nanojax.tasks import words
from nanojax.tokenizer import Tokenizer

TASKS = {"gsm8k": "gsm8k", "arithmetic": "sums", "spelling": "spelling"}  # -> the name that prepare and evaluate have
GENERATED = 10_000  # questions of a generated task; those that come twice are one
HELD_OUT = 10  # of a file's questions, the first and every tenth from there on


class Question(NamedTuple):
    """The tokens of a question up to where the answer begins, its text, and the reward of an answer."""

    prompt: list[int]
    text: str
    reward: Callable[[Reply], float]


class Questions(NamedTuple):
    """The questions of a task.

    Attributes:
      longest: tokens of the longest prompt of all.
      left_out: how many are not among them, being too long for the rows.
      sha256: of all questions and, of a file, its text.
    """

    train: list[Question]
    held_out: list[Question]
    longest: int
    left_out: int
    sha256: str


def load(task: str, rl: Rollouts, tokenizer: Tokenizer, room: int) -> Questions:
    """The questions of a task or a file whose prompts have at most `room` tokens.

    UserError for one that is neither, is damaged, or has too few questions for a step.
    """
    made = _of_task(task, rl, tokenizer) if task in TASKS else _of_file(Path(task))
    parts, digest, longest, left_out = [], hashlib.sha256(made.source.encode()), 0, 0
    for part in (made.train, made.held_out):
        prompts = [render_for_completion(tokenizer, [{"role": "user", "content": text}]) for text, _, _ in part]
        digest.update(json.dumps([item for _, item, _ in part], sort_keys=True, default=repr).encode())
        longest = max([longest, *map(len, prompts)])
        parts.append([Question(p, text, reward) for p, (text, _, reward) in zip(prompts, part) if len(p) <= room])
        left_out += len(part) - len(parts[-1])
    train, held_out = parts
    if left_out and not train:
        raise UserError(
            f"{task}: all its questions to train on are longer than {room} tokens; lower --rl.tokens or raise --rl.row"
        )
    shorter = f", {left_out} longer than {room} tokens left out" if left_out else ""
    if len(train) < rl.questions:
        advice = "lower --rl.questions" if train else "give more of them"
        raise UserError(
            f"{task}: has {len(train)} questions to train on{shorter}, and a step takes {rl.questions}; {advice}"
        )
    if not held_out:
        raise UserError(f"{task}: has no held-out question{shorter}; give more of them")
    return Questions(train, held_out[: rl.held_out or None], longest, left_out, digest.hexdigest())


Item = tuple[str, Any, Callable[[Reply], float]]  # (text, what makes it this question, reward)


class _Made(NamedTuple):
    train: Sequence[Item]
    held_out: Sequence[Item]
    source: str


def _of_task(task: str, rl: Rollouts, tokenizer: Tokenizer) -> _Made:
    """Right answers are rewarded with 1, others with 0, as `nanojax.evaluate --eval=chat` grades them."""

    def items(held_out: bool) -> list[Item]:
        limit = 0 if held_out or name == "gsm8k" else GENERATED
        to_spell = lambda: words.of(rl.words or None, tokenizer)
        found = problems.load(name, Path(rl.source), to_spell, limit, held_out)
        assert all(isinstance(problem, problems.Open) for problem in found)
        return [
            (p.messages[0]["content"], p.messages, lambda reply, p=p: float(p.grade(reply).right))  # pyright: ignore
            for p in found
        ]

    name = TASKS[task]
    return _Made(items(False), items(True), task)


def _of_file(path: Path) -> _Made:
    """Questions and rewards of a Python file. What goes wrong in it is a UserError that names the file."""
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{path}: neither a task ({', '.join(TASKS)}) nor a Python file that is there")
    spec = importlib.util.spec_from_loader(
        f"nanojax_task_{path.stem}", importlib.machinery.SourceFileLoader(f"nanojax_task_{path.stem}", str(path))
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        source = path.read_text(encoding="utf-8")
        spec.loader.exec_module(module)
        own: dict[str, Any] = {name: getattr(module, name, None) for name in ("questions", "reward")}
        for name, function in own.items():
            if not callable(function):
                wrong = "is not a function" if hasattr(module, name) else "is missing"
                raise UserError(f"{path}: {name} {wrong}; a task needs questions() and reward(question, answer)")
        found = own["questions"]()
        if isinstance(found, str | bytes | dict) or not hasattr(found, "__iter__"):
            raise UserError(f"{path}: questions() returned {found!r:.60}; it must be a list of questions")
        found = list(found)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit would end the run as if it had gone well
        raise UserError(
            f"{path}: {type(error).__name__}: {first_line(error)}; a task needs questions() and reward(question, answer)"
        ) from None
    if not found:
        raise UserError(f"{path}: questions() returned no question")
    items: list[Item] = []
    for i, question in enumerate(found):
        text = question.get("question") if isinstance(question, dict) else question
        if not isinstance(text, str) or not text:
            raise UserError(
                f"{path}: question {i} is {question!r:.60}; expected text, or a dict with text as 'question'"
            )
        items.append((text, question, lambda reply, q=question: _rewarded(path, own["reward"], q, reply.whole)))
    items[0][2](Reply("", ("",)))  # a mistake shows now
    train = [item for i, item in enumerate(items) if i % HELD_OUT]
    return _Made(train, items[::HELD_OUT], source)


def _rewarded(path: Path, reward: Callable[[Any, str], Any], question: Any, answer: str) -> float:
    call = f"{path}: reward({question!r:.60}, {answer!r:.60})"
    try:
        value = reward(question, answer)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit would end the run as if it had gone well
        raise UserError(f"{call}: {type(error).__name__}: {first_line(error)}") from None
    try:
        if isinstance(value, str | bytes):  # float would read "1"
            raise TypeError
        number = float(value)
    except Exception:
        raise UserError(f"{call}: reward returned {value!r:.60}; it must be a number") from None
    if not math.isfinite(number):
        raise UserError(f"{call} is {number}; it must be finite")
    return number


class Order:
    """Numbers of the questions to train on, pass after pass, each pass in an order of its own.

    A pass leaves out the last few that fill no step, so that no step has a question twice.
    """

    def __init__(self, task: str, questions: Questions, per_step: int, seed: int):
        self.folder, self.questions, self.per_step, self.seed = Path(task), questions, per_step, seed

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """int64 []: the number of question `index`."""
        count = len(self.questions.train)
        number, place = divmod(int(index), count // self.per_step * self.per_step)
        if count > 1:
            seed = pass_seed(self.seed, number)
            place = grain.experimental.index_shuffle(place, max_index=count - 1, seed=seed, rounds=4)
        return np.asarray(place, np.int64)

    def identity(self) -> dict[str, Any]:
        """What must be the same wherever a state of this order is restored."""
        return {"questions": self.questions.sha256, "count": len(self.questions.train), "seed": self.seed}

    def state(self, position: int) -> dict[str, Any]:
        """Nothing: any position follows from its number."""
        return {}

    def restored(self, state: dict[str, Any]) -> "Order":
        """The same order."""
        return Order(str(self.folder), self.questions, self.per_step, self.seed)
