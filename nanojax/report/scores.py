"""What a report says of scores, beside published ones, and of the texts that a model wrote."""

from collections.abc import Sequence
from typing import Any

from nanojax.evaluate import interval, published
from nanojax.plan import core_of_flops
from nanojax.report.blocks import Block, Sample, Table, Text
from nanojax.report.read import Stage
from nanojax.report.text import NONE, or_none
from nanojax.run.records import number

SHOWN = 3  # questions of a task that are shown
Outcome = dict[str, Any]  # of a chat task, as nanojax.evaluate wrote it


def bpb(stages: Sequence[Stage]) -> list[Block]:
    """Bits per byte, each measurement with the text that it is of."""
    rows = []
    for stage in stages:
        for found in _evals(stage, "bpb"):
            shown = (("bpb", "{:.4f}"), ("nll", "{:.4f}"), ("tokens", "{:,.0f}"))
            figures = [or_none(number(found, key), form.format) for key, form in shown]
            rows.append((f"{stage.name}, {_step(found)}", *figures, str(found.get("input", ""))))
    if not rows:
        return [Text("Not measured apart from training: python -m nanojax.evaluate --run=RUN --eval=bpb")]
    return [Table(("model", "bits per byte", "nats per token", "tokens", "of"), rows)]


def core(stages: Sequence[Stage]) -> list[Block]:
    """CORE among published ones, and what published runs reached at these FLOPs."""
    ours = [(stage.name, *found) for stage in stages if (found := core_of(stage))]
    if not ours:
        return [Text("Not measured: python -m nanojax.evaluate --run=RUN --eval=core --bundle=eval_bundle")]
    theirs = [(f.model, f"{f.value:.4f}", f"published: {f.source}") for f in published.CORE]
    ranked = sorted([*ours, *theirs], key=lambda row: -float(row[1].split()[0]))
    return [
        Table(("model", "CORE (95% interval)", "of"), ranked),
        *(Text(said) for stage in stages if (said := _expected(stage))),
    ]


def core_of(stage: Stage) -> tuple[str, str] | None:
    """(CORE, of what): of all examples where they were asked, else of the first of each task; else from training."""
    found = [each for each in _evals(stage, "core") if number(each, "core") is not None]
    whole = [each for each in found if not each.get("max_per_task")]
    for each in reversed(whole or found):
        some = f"the first {each['max_per_task']} of each task" if each.get("max_per_task") else "all examples"
        return _estimate({"value": number(each, "core"), **_core_bounds(each)}, "value"), f"{_step(each)}, {some}"
    for record in reversed(stage.of_kind("core")):
        if (value := number(record, "core")) is not None:
            return f"{value:.4f}", f"{_step(record)}, {number(record, 'examples') or 0:,.0f} examples, in training"
    return None


def _core_bounds(found: dict[str, Any]) -> dict[str, float]:
    """The 95% interval of an evaluation's CORE, from each task's count and baseline; empty where a task lacks one."""
    estimates = []
    tasks = found.get("tasks")
    for task in tasks.values() if isinstance(tasks, dict) else ():
        figures = task if isinstance(task, dict) else {}
        right, n, baseline = (number(figures, key) for key in ("correct", "total", "baseline"))
        if right is None or baseline is None or not n or not 0 <= right <= n or not 0 <= baseline < 1:
            return {}
        estimates.append(interval.centred(interval.share(int(right), int(n)), baseline))
    bounds = interval.mean(estimates)._asdict() if estimates else {}
    return {key: bounds[key] for key in ("low", "high") if key in bounds}


def _expected(stage: Stage) -> str:
    """What published runs reached at the stage's FLOPs, where some did."""
    if stage.kind != "text" or not stage.config or not stage.flops:
        return ""
    there = core_of_flops.core(stage.flops, stage.config.model.family)
    if there.extrapolated:
        return ""
    return f"At the FLOPs of {stage.name}, published runs reached CORE {there.value:.3f} ({there.low:.3f} to {there.high:.3f})."


def chat(stages: Sequence[Stage]) -> list[Block]:
    """Each task's accuracy, a column for each stage, and the means over tasks."""
    outcomes, means = [_tasks(stage) for stage in stages], [means_of(stage) for stage in stages]
    theirs = {name: f"{value:.4f}" for name, value in published.CHAT.items()}
    rows = []
    for name in sorted({name for of in outcomes for name in of}):
        found = [of.get(name, {}) for of in outcomes]
        asked = dict.fromkeys(f"{n:,.0f}" for each in found if (n := number(each, "n")) is not None)
        guessing = next((b for each in found if (b := number(each, "baseline")) is not None), None)
        shares = [_estimate(each, "accuracy") for each in found]
        rows.append((name, " / ".join(asked), *shares, or_none(guessing, "{:.2f}".format), theirs.get(name, NONE)))
    rows += [
        (name, "", *(of.get(name, NONE) for of in means), "0.00", theirs.get(name, NONE))
        for name in sorted({name for of in means for name in of})
    ]
    if not rows:
        return [Text("Not measured: python -m nanojax.evaluate --run=RUN --eval=chat")]
    note = (
        "Shares of problems answered rightly, with 95% intervals; means are over shares centred so that guessing is 0."
    )
    head = ("task", "problems", *(stage.name for stage in stages), "guessing", "published d20")
    return [Table(head, rows), Text(f"{note} Published: {published.CHAT_SOURCE}.")]


def means_of(stage: Stage) -> dict[str, str]:
    """ChatCORE and its kin, as text with the interval; of the newest evaluation that has them."""
    out = {}
    for found in _evals(stage, "chat"):
        means = found.get("means")
        for name, mean in means.items() if isinstance(means, dict) else ():
            if isinstance(mean, dict) and number(mean, "value") is not None:
                out[name] = _estimate(mean, "value")
    return out


def written(stages: Sequence[Stage]) -> list[Block]:
    """Answers to the same question under each other, then continuations and what was written in training."""
    out: list[Block] = []
    for task in sorted({name for stage in stages for name in _tasks(stage)}):
        asked: dict[str, list[str]] = {}
        for stage in stages:
            for prompt, answer in _samples(_tasks(stage).get(task, {})):
                asked.setdefault(prompt, []).append(f"{stage.name}: {answer}")
        out += [Sample(f"{task}: {prompt}", "\n\n".join(said)) for prompt, said in list(asked.items())[:SHOWN]]
    for stage in stages:
        for name, text in list(stage.texts.items())[-1:]:
            texts = text.strip("\n").split("\n---\n")
            out.append(Sample(f"{stage.name}, greedy continuations ({name})", "\n\n".join(texts)))
        sampled = [r for r in stage.of_kind("sample") if isinstance(r.get("text"), str)]
        for i in sorted({0, len(sampled) // 2, len(sampled) - 1}) if sampled else ():
            out.append(Sample(f"{stage.name}, in training after {_step(sampled[i])}", sampled[i]["text"]))
    return out or [Text("No text of the model is in the run folder.")]


def _evals(stage: Stage, kind: str) -> list[dict[str, Any]]:
    """The stage's evaluations of a kind by step, those of the first examples before those of all; later ones count."""
    found = [content for name, content in stage.evals.items() if name.startswith(f"{kind}_")]
    return sorted(found, key=lambda content: (number(content, "step") or 0, not content.get("max_per_task")))


def _tasks(stage: Stage) -> dict[str, Outcome]:
    """Each chat task's newest outcome, of those the one with the most problems."""
    found: dict[str, tuple[tuple[float, float], Outcome]] = {}
    for content in _evals(stage, "chat"):
        tasks = content.get("tasks")
        for name, outcome in tasks.items() if isinstance(tasks, dict) else ():
            if isinstance(outcome, dict) and (n := number(outcome, "n")):
                rank = (number(content, "step") or 0, n)
                if name not in found or rank >= found[name][0]:
                    found[name] = rank, outcome
    return {name: outcome for name, (_, outcome) in found.items()}


def _samples(outcome: Outcome) -> list[tuple[str, str]]:
    """(question, answer with its mark) of what a task's outcome keeps."""
    kept = outcome.get("samples")
    samples = [each for each in kept if isinstance(each, dict)] if isinstance(kept, list) else []
    mark = lambda each: "right" if each.get("right") is True else "wrong"
    return [(str(each.get("prompt")), f"{each.get('answer')}   [{mark(each)}]") for each in samples]


def _estimate(of: dict[str, Any], key: str) -> str:
    """A figure and its interval: 0.8750 (0.8290 to 0.9101)."""
    value, low, high = (number(of, name) for name in (key, "low", "high"))
    between = f" ({low:.4f} to {high:.4f})" if low is not None and high is not None else ""
    return NONE if value is None else f"{value:.4f}{between}"


def _step(found: dict[str, Any]) -> str:
    return f"step {number(found, 'step') or 0:,.0f}"
