"""What the chat evaluation found: each figure with its interval, ChatCORE, as a table, JSON and CSV."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nanojax import files
from nanojax.evaluate import interval, published
from nanojax.evaluate.interval import Estimate

CHOICES = ("arc_easy", "arc_challenge", "mmlu")
MEANS = {  # of centred accuracies; each is there where all of its tasks are
    "ChatCORE": (*CHOICES, "gsm8k", "humaneval"),  # nanochat's of October 2025, and again since July 2026
    "ChatCORE+counting": (*CHOICES, "gsm8k", "humaneval", "counting"),  # as in between
    "ChatCORE categorical": CHOICES,
}
DECIMALS = 6  # of a number in the CSV


@dataclasses.dataclass(frozen=True)
class Score:
    """The outcome of a task: `right` of `n` problems.

    Attributes:
      baseline: the accuracy of guessing.
      answers: of a task with written answers, how many met which limit, and some of them to be read; else empty.
    """

    task: str
    n: int
    right: int
    baseline: float
    seconds: float
    answers: dict[str, Any]

    @property
    def accuracy(self) -> Estimate:
        """The share of right answers."""
        return interval.share(self.right, self.n)

    @property
    def centred(self) -> Estimate:
        """(accuracy - baseline) / (1 - baseline)."""
        return interval.centred(self.accuracy, self.baseline)


def means_of(scores: Sequence[Score]) -> dict[str, Estimate]:
    """The means of MEANS whose tasks are all there."""
    found = {s.task: s.centred for s in scores}
    return {
        name: interval.mean([found[task] for task in tasks])
        for name, tasks in MEANS.items()
        if set(tasks) <= set(found)
    }


def line(s: Score) -> str:
    """A task's outcome in one line."""
    limits = [f"{s.answers[key]:,} {what}" for key, what in (("cut", "cut"), ("no_room", "without room"))
              if s.answers.get(key)]  # fmt: skip
    return " · ".join([f"{s.task:<13} accuracy {s.accuracy}", f"{s.right:,} of {s.n:,}", *limits, f"{s.seconds:.1f} s"])


def table(scores: Sequence[Score], limit: int) -> Table:
    """All figures, beside those of nanochat's d20."""
    out = Table(title="chat" + (f", first {limit} problems per task" if limit else ""))
    for name in ("task", "n", "accuracy", "95%", "centred", "d20"):
        out.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    between = lambda e: f"{e.low:.3f} to {e.high:.3f}"
    theirs = {name: f"{value:.4f}" for name, value in published.CHAT.items()}
    for s in scores:
        accuracy, centred = s.accuracy, s.centred.value
        figures = f"{accuracy.value:.4f}", between(accuracy), f"{centred:+.4f}"
        out.add_row(s.task, f"{s.n:,}", *figures, theirs.get(s.task, ""))
    for name, mean in means_of(scores).items():
        out.add_row(name, "", "", between(mean), f"{mean.value:+.4f}", theirs.get(name, ""), style="bold")
    return out


def as_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Means of centred accuracies, and tasks. low and high are the bounds of 95% intervals."""
    means = {name: {**mean._asdict(), "tasks": list(MEANS[name])} for name, mean in means_of(scores).items()}
    tasks = {}
    for s in scores:
        (accuracy, low, high), (centred, centred_low, centred_high) = s.accuracy, s.centred
        tasks[s.task] = {
            "n": s.n,
            "right": s.right,
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "baseline": s.baseline,
            "centred": centred,
            "centred_low": centred_low,
            "centred_high": centred_high,
            "seconds": s.seconds,
            **s.answers,
        }
    return {"means": means, "tasks": tasks}


def write_csv(path: Path, scores: Sequence[Score]) -> None:
    """A row for each task, then one for each mean, which has centred figures only."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    bounds = lambda name: (name, f"{name} low", f"{name} high")
    rows.writerow(["Task", "N", "Right", *bounds("Accuracy"), "Baseline", *bounds("Centered")])
    decimals = lambda *values: [f"{value:.{DECIMALS}f}" for value in values]
    for s in scores:
        rows.writerow([s.task, s.n, s.right, *decimals(*s.accuracy, s.baseline, *s.centred)])
    for name, mean in means_of(scores).items():
        rows.writerow([name, *[""] * 6, *decimals(*mean)])
    with files.write_atomic(path) as file:
        file.write(text.getvalue().encode())
