"""The page of a report: its sections, and the figures of all stages side by side. What a run does not say is not guessed."""

import itertools
import time
from collections.abc import Iterable
from typing import Any

from nanojax import cli
from nanojax.cli import duration, short
from nanojax.plan.energy import PRICES
from nanojax.report import scores
from nanojax.report.blocks import Page, Section, Table, Text
from nanojax.report.details import sections_of, stands
from nanojax.report.read import Stage
from nanojax.report.text import NONE, or_none


def page(stages: list[Stage], absent: str, now: float) -> Page:
    """The page about the last of `stages`. `absent`: the run folder that the first one names and that is not there."""
    last = stages[-1]
    sections = [
        Section(2, "In short", [Text(_lead(stages, absent, now)), _summary(stages), Text(HOW)]),
        Section(2, "Scores", []),
        Section(3, "Bits per byte", scores.bpb(stages)),
        Section(3, "CORE", scores.core(stages)),
        Section(3, "Chat tasks", scores.chat(stages)),
        Section(2, "What it writes", scores.written(stages)),
    ]
    for stage in stages:
        sections += sections_of(stage)
    return Page(f"Report on {last.name}", sections)


HOW = (
    "Time is from each start to the last record before the next one. Energy is what the GPU's driver counted; money is that "
    f"at household prices ({', '.join(f'{currency} {price:g}' for currency, price in PRICES.items())} per kWh). "
    "FLOPs are by nanochat's count: 6 per token and parameter outside the embedding, plus attention. "
    "Where records are many, a curve is the mean of neighbours, and a band their range."
)


def _lead(stages: list[Stage], absent: str, now: float) -> str:
    last = stages[-1]
    model = last.config.model if last.config else None
    what = f"a d{model.L} of {model.parameters:,} parameters" if model else "a model whose config cannot be read"
    how = {"conversations": "fine-tuned from", "rollouts": "trained on rewards, begun from"}
    begun = [
        f"{how.get(after.kind, 'begun from the weights of')} {before.name}"
        for before, after in itertools.pairwise(stages)
    ]
    if absent:
        begun.insert(0, f"from {absent}, whose folder is not there, so that stage is absent here")
    day = time.strftime("%Y-%m-%d", time.gmtime(now))
    return f"{', '.join([f'{last.name} is {what}', *begun])}: {stands(last)}. Written {day} by {cli.version()}."


def _summary(stages: list[Stage]) -> Table:
    columns = [_figures(stage) for stage in stages]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    if len(stages) == 1:
        return Table(("", stages[0].name), rows)
    together = {
        "tokens": _sum((s.status.tokens for s in stages), short),
        "training FLOPs": _sum((s.flops for s in stages), "{:.2e}".format),
        "time": _sum((s.seconds for s in stages), duration),
        "energy, kWh": _sum((s.status.kwh for s in stages), "{:.2f}".format),
        **{f"money, {c}": _sum((s.status.cost.get(c) for s in stages), "{:.2f}".format) for c in PRICES},
    }
    head = ("", *(stage.name for stage in stages), "together")
    return Table(head, [(*row, together.get(row[0], "")) for row in rows])


def _figures(stage: Stage) -> dict[str, str]:
    """A column of the summary."""
    s, core = stage.status, scores.core_of(stage)
    seconds, tokens = stage.seconds, s.tokens
    chat = scores.means_of(stage)
    return {
        "state": s.state,
        "steps": f"{s.step:,}" + (f" of {s.steps:,}" if s.steps else ""),
        "tokens": or_none(tokens, short),
        "training FLOPs": or_none(stage.flops, "{:.2e}".format),
        "loss, nats per token": or_none(s.loss, "{:.4f}".format),
        "validation, bits per byte": or_none(s.bpb, "{:.4f}".format),
        "held-out answers right": or_none(s.accuracy, "{:.1%}".format),
        "CORE": core[0] if core else NONE,
        "ChatCORE": chat.get("ChatCORE", NONE),
        "time": or_none(seconds, duration),
        "tokens/s, mean": or_none(tokens / seconds if tokens and seconds else None, short),
        "energy, kWh": or_none(s.kwh, "{:.2f}".format),
        **{f"money, {currency}": or_none(s.cost.get(currency), "{:.2f}".format) for currency in PRICES},
        "starts": f"{s.starts:,}",
        "warnings": f"{len(s.warnings) + len(stage.unreadable):,}",
    }


def _sum(values: Iterable[float | None], shown: Any) -> str:
    """The sum, or NONE where a stage does not say."""
    found = list(values)
    known = [value for value in found if value is not None]
    return shown(sum(known)) if len(known) == len(found) else NONE
