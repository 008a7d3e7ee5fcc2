"""Evaluation bundles for tests, in the layout of nanochat's eval_bundle.zip, and the words their texts are made of."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

WORDS = [
    "the",
    "people",
    "of",
    "this",
    "nation",
    "have",
    "met",
    "in",
    "peace",
    "and",
    "law",
    "will",
    "serve",
    "every",
    "state",
]


class Task(NamedTuple):
    """An entry of core.yaml; its examples are eval_data/<file>.jsonl, its baseline a percentage."""

    label: str
    kind: str
    file: str
    shots: int
    baseline: float
    options: dict[str, Any] = {}  # noqa: RUF012  more keys of the entry


def write(folder: Path, tasks: list[Task], examples: dict[str, list[dict[str, Any]]]) -> Path:
    """Writes the bundle into `folder` and returns it; `examples` are lines by file name."""
    (folder / "eval_data").mkdir(parents=True)
    for file, items in examples.items():
        (folder / "eval_data" / f"{file}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    entries = [
        {"label": t.label, "dataset_uri": f"{t.file}.jsonl", "num_fewshot": [t.shots], "icl_task_type": t.kind}
        | t.options
        for t in tasks
    ]
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    table = "".join(f"{t.label},{t.baseline:g}\n" for t in tasks)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + table)
    return folder


def write_small(folder: Path) -> Path:
    """Two tasks of nine examples and one shot each, `choice` and `lm`, of words that tiny_run's data holds."""
    choice = [{"query": f"the law {i}", "choices": ["peace", "honor"], "gold": i % 2} for i in range(9)]
    language = [{"context": f"the people {i}", "continuation": "have met"} for i in range(9)]
    tasks = [Task("choice", "multiple_choice", "choice", 1, 50), Task("lm", "language_modeling", "lm", 1, 0)]
    return write(folder, tasks, {"choice": choice, "lm": language})
