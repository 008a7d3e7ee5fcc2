"""The CORE metric of DCLM (arXiv:2406.11794) as nanochat computes it: 22 in-context tasks.

This file knows the tasks: the bundle on disk, prompts, few-shot sampling, which tokens are scored, which option wins,
and the resumable run over all of them. likelihood.py computes the log-likelihoods.

Rules, from nanochat's evaluation:
* examples are shuffled by Random(1337), then cut to the first --max-per-task; the shots of example i are drawn from the
  others by Random(1234 + i);
* multiple_choice: a prompt per choice; scored tokens start where the prompts first differ; lowest mean loss wins;
* schema: one prompt per context; scored tokens are the prompts' common tail; lowest mean loss wins;
* language_modeling: correct if every token of the continuation is the argmax given the tokens before it;
* centred = (accuracy - baseline) / (1 - baseline); CORE is the mean of the centred accuracies.
Prompts are never truncated: RoPE has no last position, and 10-shot prompts may be longer than the training rows.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from nanojax import files
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.evaluate import likelihood
from nanojax.evaluate.likelihood import Answer, Request
from nanojax.tokenizer import Tokenizer

KINDS = ("multiple_choice", "schema", "language_modeling")
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
WINDOW = 512  # examples scored and recorded together; an interruption loses at most these
DECIMALS = 6  # of a number in the CSV


@dataclasses.dataclass(frozen=True)
class Task:
    """One line of core.yaml. `baseline` is the accuracy of guessing, a fraction."""

    label: str
    kind: str
    path: Path
    shots: int
    delimiter: str
    baseline: float


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The outcome of the first `done` of a task's `total` examples, after `seconds`."""

    task: Task
    done: int
    total: int
    correct: int
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        return self.done == self.total

    @property
    def accuracy(self) -> float:
        """Fraction of the examples done that are answered correctly."""
        return self.correct / self.done

    @property
    def centred(self) -> float:
        """Accuracy on a scale where guessing is 0 and perfection 1."""
        return (self.accuracy - self.task.baseline) / (1 - self.task.baseline)


Score = Callable[[Sequence[Request]], list[list[Answer]]]


def load_tasks(bundle: Path, key: str = "bundle") -> list[Task]:
    """The tasks of a bundle folder (core.yaml, eval_meta_data.csv, eval_data/), in its order.

    UserError naming the argument `key` and what is missing or malformed there.
    """
    for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
        if not (bundle / name).exists():
            raise UserError(
                f"--{key}={bundle}: {name} is missing; unpack nanochat's eval_bundle.zip and give its folder"
            )
    try:
        listed = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = [
            Task(
                label=str(entry["label"]),
                kind=str(entry["icl_task_type"]),
                path=bundle / "eval_data" / entry["dataset_uri"],
                shots=int(entry["num_fewshot"][0]),
                delimiter=str(entry.get("continuation_delimiter", " ")),
                baseline=baselines[entry["label"]],
            )
            for entry in listed
        ]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"--{key}={bundle}: core.yaml or eval_meta_data.csv is malformed ({error!r})") from None
    for task in tasks:
        if task.kind not in KINDS:
            raise UserError(f"--{key}={bundle}: {task.label} has type {task.kind}; known are {', '.join(KINDS)}")
        if not task.path.is_file():
            raise UserError(f"--{key}={bundle}: {task.label} needs {task.path}, which is missing")
        if not 0 <= task.baseline < 1:
            raise UserError(f"--{key}={bundle}: baseline of {task.label} is not in [0, 100)")
    return tasks


def load_examples(task: Task, max_per_task: int = 0, key: str = "max-per-task") -> list[dict[str, Any]]:
    """All examples of a task in nanochat's shuffled order, or the first `max_per_task` of them (0 = all).

    UserError naming file and line, or the argument `key` when it leaves too few for the task's shots.
    """
    examples = []
    with open(task.path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
                values = [item[field] for field in FIELDS[task.kind]]
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
                raise UserError(f"{task.path}:{number}: not a {task.kind} example ({error!r})") from None
            options = values[1] if task.kind == "multiple_choice" else values[0]
            if "gold" in FIELDS[task.kind] and not (
                isinstance(options, list) and isinstance(item["gold"], int) and 0 <= item["gold"] < len(options)
            ):
                raise UserError(f"{task.path}:{number}: gold={item['gold']!r} does not name one of the options")
            examples.append(item)
    random.Random(1337).shuffle(examples)
    examples = examples[:max_per_task] if max_per_task else examples
    if len(examples) <= task.shots:
        raise UserError(
            f"{task.label}: {len(examples)} examples cannot give {task.shots} shots; --{key} must be above {task.shots}"
        )
    return examples


def shots_of(index: int, count: int, shots: int) -> list[int]:
    """Which examples stand before example `index` of `count`; the draw is over the others, in their order."""
    if not shots:
        return []
    drawn = random.Random(1234 + index).sample(range(count - 1), shots)
    return [i if i < index else i + 1 for i in drawn]


def prompts_of(task: Task, examples: Sequence[dict[str, Any]], index: int) -> list[str]:
    """The prompts whose tokens are compared: one per choice or context, or [without, with] the continuation."""
    item = examples[index]
    delimiter = task.delimiter
    shots = [examples[i] for i in shots_of(index, len(examples), task.shots)]
    if task.kind == "multiple_choice":
        head = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{head}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        head = "".join(f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots)
        return [f"{head}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    head = "".join(f"{s['context'].strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
    question = f"{head}{item['context'].strip()}{delimiter}"
    return [question.strip(), f"{question}{item['continuation']}"]


def _common(rows: Sequence[Sequence[int]], reverse: bool = False) -> int:
    """Length of the longest common head (or tail) of the rows."""
    for i, column in enumerate(zip(*(reversed(row) if reverse else row for row in rows))):
        if any(token != column[0] for token in column):
            return i
    return min(map(len, rows))


def requests_of(task: Task, rows: Sequence[list[int]]) -> list[Request]:
    """What to score for one example, given the tokens of its prompts (each begins with the begin token)."""
    if task.kind == "multiple_choice":
        start = _common(rows)
        return [Request(tuple(rows[0][:start]), tuple(tuple(row[start:]) for row in rows))]
    if task.kind == "schema":
        shortest = min(map(len, rows))
        tail = min(_common(rows, reverse=True), shortest - 1)  # the begin token is never scored
        start = min(_common(rows), shortest - tail)
        return [Request(tuple(rows[0][:start]), tuple(tuple(row[start:]) for row in rows), tail)]
    without, full = rows
    # The prompt without its continuation is a token prefix of the full one, unless the tokenizer merges characters across
    # the delimiter; then scoring starts at the first token that differs.
    start = _common([without, full])
    return [Request(tuple(full[:start]), (tuple(full[start:]),))]


def is_correct(task: Task, item: dict[str, Any], answers: Sequence[Answer]) -> bool:
    """Whether the scored branches answer the item correctly. Ties go to the first option, as in nanochat."""
    if task.kind == "language_modeling":
        return bool(answers[0].hits.all())
    # Summed in f64: the mean of equal f32 losses then does not depend on their number, so ties stay ties.
    losses = [float(a.nll.astype("f8").mean()) if a.nll.size else math.nan for a in answers]
    return losses.index(min(losses)) == item["gold"]


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The begin token and the prompt's tokens, for each prompt. A special token's name in it is ordinary text."""
    return [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(list(prompts))]


def score_window(
    task: Task, examples: Sequence[dict[str, Any]], indices: Sequence[int], tokenizer: Tokenizer, score: Score
) -> list[bool]:
    """Whether each of the examples `indices` is answered correctly; all are scored in one call of `score`."""
    prompts = [prompts_of(task, examples, i) for i in indices]
    rows = iter(tokenize(tokenizer, [p for group in prompts for p in group]))
    requests = [requests_of(task, [next(rows) for _ in group]) for group in prompts]
    answers = iter(score([r for group in requests for r in group]))
    out = []
    for index, group in zip(indices, requests):
        flat = [a for _ in group for a in next(answers)]
        out.append(is_correct(task, examples[index], flat))
    return out


class Ledger:
    """The file of a CORE run in progress: a header line, then one line per finished window; survives kill -9.

    `identity` says which model, bundle and options the outcomes belong to. A file with another identity is replaced.
    `done` maps (task label, first example) to the outcomes of that window.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path = path
        self.done: dict[tuple[str, int], list[bool]] = {}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # drops a torn last line
        try:
            header, *entries = [json.loads(line) for line in lines] or [None]
            if header == identity:
                self.done = {(e["task"], e["start"]): [c == "1" for c in e["correct"]] for e in entries}
        except (json.JSONDecodeError, KeyError, TypeError):
            self.done = {}
        kept = [self._line(task, start, correct) for (task, start), correct in self.done.items()]
        with files.write_atomic(path) as file:
            file.write((json.dumps(identity) + "\n" + "".join(kept)).encode())

    @staticmethod
    def _line(task: str, start: int, correct: Sequence[bool]) -> str:
        return json.dumps({"task": task, "start": start, "correct": "".join("01"[c] for c in correct)}) + "\n"

    def add(self, task: str, start: int, correct: Sequence[bool]) -> None:
        """Records the outcomes of the window of `task` that begins at example `start`."""
        self.done[task, start] = list(correct)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._line(task, start, correct))
        except OSError as error:
            raise files.write_error(self.path, error) from None


def fingerprint(tasks: Sequence[Task]) -> str:
    """Hash of everything but the model that the tasks' outcomes depend on: texts, shots, delimiters."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(f"{task.label}|{task.kind}|{task.shots}|{task.delimiter!r}".encode())
        digest.update(hashlib.sha256(task.path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def run(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    score: Score,
    max_per_task: int = 0,
    ledger: Ledger | None = None,
    window: int = WINDOW,
) -> Iterator[TaskScore]:
    """Evaluates every task; yields its score so far after every window of examples, so that the last one is finished."""
    for task in tasks:
        began = time.monotonic()
        examples = load_examples(task, max_per_task)
        correct: list[bool] = []
        for start in range(0, len(examples), window):
            indices = range(start, min(start + window, len(examples)))
            known = ledger.done.get((task.label, start)) if ledger else None
            if known is None or len(known) != len(indices):
                known = score_window(task, examples, indices, tokenizer, score)
                if ledger:
                    ledger.add(task.label, start, known)
            correct += known
            yield TaskScore(task, len(correct), len(examples), sum(correct), time.monotonic() - began)


def evaluate(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    max_per_task: int = 0,
    batch_tokens: int | None = None,
    ledger: Ledger | None = None,
) -> Iterator[TaskScore]:
    """`run` on these parameters, with about `batch_tokens` tokens per batch (None: `likelihood.default_tokens`)."""
    return run(tasks, tokenizer, likelihood.scorer(config, params, batch_tokens), max_per_task, ledger)


def tasks_of(config: Config) -> list[Task]:
    """The tasks of a training run, every file of them read and found usable; none when eval.core_every is 0."""
    if not config.eval.core_every:
        return []
    tasks = load_tasks(Path(config.eval.core_bundle), "eval.core_bundle")
    for task in tasks:
        load_examples(task, config.eval.core_per_task, "eval.core_per_task")
    return tasks


def finished(
    config: Config, params: Any, tokenizer: Tokenizer, tasks: Sequence[Task], alive: Callable[[], None]
) -> list[TaskScore]:
    """A training run's scores, in batches of a microbatch's size on each device, which are known to fit.

    Args:
      alive: called between parts; may raise.
    """
    done = []
    batch_tokens = config.train.microbatch * config.model.T
    for score in evaluate(config, params, tokenizer, tasks, config.eval.core_per_task, batch_tokens):
        if score.finished:
            done.append(score)
        alive()
    return done


def core_of(scores: Sequence[TaskScore]) -> float:
    """The mean of the tasks' centred accuracies."""
    return sum(score.centred for score in scores) / len(scores)


def write_csv(path: Path, scores: Sequence[TaskScore]) -> None:
    """nanochat's table: Task, Accuracy, Centered, and a last row CORE."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["Task", "Accuracy", "Centered"])
    for score in scores:
        table.writerow([score.task.label, f"{score.accuracy:.{DECIMALS}f}", f"{score.centred:.{DECIMALS}f}"])
    table.writerow(["CORE", "", f"{core_of(scores):.{DECIMALS}f}"])
    with files.write_atomic(path) as file:
        file.write(text.getvalue().encode())
