"""What a report says of one stage alone: the model, its curves, its data, the commands that made it, its warnings."""

from typing import Any

from nanojax.report.blocks import Block, Chart, Commands, Prose, Section, Text
from nanojax.report.read import Stage
from nanojax.report.text import NONE, or_none
from nanojax.run.records import number

CURVES = (  # title, and each curve's kind of record and key
    ("loss, nats per token", {"training": ("train", "loss"), "validation": ("eval", "nll")}),
    ("validation, bits per byte", {"validation": ("eval", "bpb")}),
    (
        "held-out questions answered rightly",
        {"greedy": ("eval", "accuracy"), "one drawn": ("eval", "pass_1"), "one of eight drawn": ("eval", "pass_8")},
    ),
    ("reward, mean of a step's answers", {"reward": ("train", "reward")}),
    ("tokens of an answer", {"drawn, in training": ("train", "length"), "greedy, held out": ("eval", "length")}),
    (
        "share of a step",
        {"questions without a difference": ("train", "skipped"), "answers without an end": ("train", "unfinished")},
    ),
    ("CORE in training", {"CORE": ("core", "core")}),
    ("learning rate, as a multiple of the base rates", {"rate": ("train", "lr")}),
    ("tokens per second", {"tokens/s": ("train", "tokens_per_s")}),
    ("norm of the gradient", {"norm": ("train", "grad_norm")}),
    ("power of the GPU, W", {"power": ("train", "watts")}),
)


KINDS = {"text": "pretraining", "conversations": "fine-tuning", "rollouts": "reinforcement learning"}


def sections_of(stage: Stage) -> list[Section]:
    """The sections about a stage."""
    told = [*stage.status.warnings, *stage.unreadable]
    warnings = [Prose([(str(i), text) for i, text in enumerate(told, 1)])] if told else [Text("None.")]
    charts = _charts(stage) or [Text("No curve: fewer than two records.")]
    kind = KINDS[stage.kind]
    return [
        Section(2, f"{stage.name}: {kind}", [Prose(_facts(stage)), *charts]),
        Section(3, f"Data of {stage.name}", [Prose(_data(stage.data))] if stage.data else [Text("Not recorded.")]),
        Section(3, f"Commands of {stage.name}", _commands(stage)),
        Section(3, f"Warnings of {stage.name}", list(warnings)),
    ]


def stands(stage: Stage) -> str:
    """Whether the run is over, and at which step it is."""
    s = stage.status
    return f"{s.state}, at step {s.step:,}" + (f" of {s.steps:,}" if s.steps else "")


def _charts(stage: Stage) -> list[Block]:
    out: list[Block] = []
    for title, series in CURVES:
        curves = {name: points for name, where in series.items() if (points := stage.curve(*where))}
        if any(len(points) > 1 for points in curves.values()):
            out.append(Chart(title, curves))
    return out


def _facts(stage: Stage) -> list[tuple[str, str]]:
    rows = [("folder", str(stage.folder)), ("where it stands", stands(stage))]
    if stage.config:
        m, compute, train = stage.config.model, stage.config.compute, stage.config.train
        shape = f"{m.L} layers, width {m.D}, {m.N} heads of {m.H}, {m.V:,} ids, rows of {m.T:,} tokens"
        kept = f"blocks stored in {stage.config.stored.blocks}"
        rows += [
            ("model", f"family {m.family}, {shape}"),
            ("parameters", f"{m.parameters:,}; {m.flops_per_token:.3e} FLOPs per token"),
            ("computed in", f"{compute.dtype}, matmuls of the blocks in {compute.forward}; {kept}"),
            ("a step", f"{train.tokens_per_step:,} tokens; seed {train.seed}"),
        ]
    for begun in stage.of_kind("init")[:1]:
        told = (("", "from"), ("step ", "from_step"), ("momenta ", "momenta"))  # the last one only of newer runs
        said = ", ".join(f"{name}{begun[key]}" for name, key in told if begun.get(key) is not None)
        rows.append(("began from", said or NONE))
    starts = stage.of_kind("start")
    for key in ("device", "jax"):
        values = dict.fromkeys(str(start[key]) for start in starts if start.get(key))
        rows.append((key, ", ".join(values) or "not recorded"))
    if stage.status.kwh is None:
        rows.append(("energy", "not measured (no NVIDIA driver)"))
    if stage.damaged:
        rows.append(("records", f"{stage.damaged:,} damaged lines of metrics.jsonl are left out"))
    return rows


def _data(data: dict[str, Any]) -> list[tuple[str, str]]:
    tokenizer = _part(data, "tokenizer")
    rows = [
        ("task" if data.get("kind") == "rollouts" else "folder", str(data.get("path"))),
        ("tokenizer", f"{or_none(number(tokenizer, 'ids'), '{:,.0f}'.format)} ids"),
    ]
    if "inputs" in tokenizer:
        inputs = tokenizer["inputs"] if isinstance(tokenizer["inputs"], list) else [tokenizer["inputs"]]
        rows.append(("trained on", f"{', '.join(map(str, inputs))}; held out: {tokenizer.get('valid')}"))
    for split, name in (("train", "to train on"), ("valid", "held out")):
        said = _counts(_part(_part(data, "totals"), split))
        rows += [(name, said)] if said else []
    entries = data.get("entries")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            train, repeats, valid = (entry.get(key) for key in ("train", "repeats", "valid"))
            rows.append((str(entry.get("name")), f"{train} conversations × {repeats} in a pass; {valid} held out"))
    return rows


def _counts(of: dict[str, Any]) -> str:
    """12,345 tokens, 10 documents, 3.125 bytes per token."""
    tokens, size, documents, learnt = (number(of, key) for key in ("tokens", "bytes", "documents", "supervised"))
    said = [f"{tokens:,.0f} tokens"] if tokens is not None else []
    said += [f"{documents:,.0f} documents"] if documents is not None else []
    ordinary = (tokens or 0) - (documents or 0)  # each document has a begin token, which has no bytes
    said += [f"{size / ordinary:.3f} bytes per token"] if size is not None and ordinary > 0 else []
    said += [f"{learnt / tokens:.0%} of them supervised"] if learnt is not None and tokens else []
    return ", ".join(said)


def _commands(stage: Stage) -> list[Block]:
    """Each command once, in the order in which the stage needs them."""
    evals = sorted(stage.evals.values(), key=lambda content: number(content, "step") or 0)
    said = [_part(stage.data, "tokenizer"), stage.data, *stage.of_kind("start"), *evals]
    lines = list(dict.fromkeys(found["command"] for found in said if isinstance(found.get("command"), str)))
    return [Commands(lines)] if lines else [Text("Not recorded; config.json has every key.")]


def _part(of: dict[str, Any], key: str) -> dict[str, Any]:
    found = of.get(key)
    return found if isinstance(found, dict) else {}
