"""Reads the stages behind a run: its own folder, and that of the run it began from, as far as they are there."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanojax import files
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.run import records, run_folder
from nanojax.run.records import number
from nanojax.status import Status, status

MOST_STAGES = 8  # a run that began from a run that began from a run
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one run folder says.

    Attributes:
      config: None if it is missing or damaged.
      data: of data.json; empty in runs that had none.
      damaged: lines of metrics.jsonl that are no records.
      evals: what nanojax.evaluate wrote, by name of the file: {"bpb_000150": {...}}.
      texts: its greedy samples, by name of the file.
      unreadable: a line for each of data.json and evals/ that is there and cannot be read.
    """

    folder: Path
    status: Status
    config: Config | None
    records: list[Record]
    damaged: int
    data: dict[str, Any]
    evals: dict[str, dict[str, Any]]
    texts: dict[str, str]
    unreadable: list[str]

    @property
    def name(self) -> str:
        """As the folder is called."""
        return self.folder.resolve().name

    @property
    def flops(self) -> float | None:
        """Training FLOPs so far, as nanochat counts them."""
        return self.config.model.flops_per_token * self.status.tokens if self.config and self.status.tokens else None

    @property
    def init(self) -> str:
        """The run folder that this one's weights came from, as it was written; empty for random weights."""
        return self.config.train.init if self.config else ""

    @property
    def kind(self) -> str:
        """What it learnt from, as data.kind says."""
        return self.config.data.kind if self.config else "text"

    def of_kind(self, kind: str) -> list[Record]:
        """The records of one kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    def curve(self, kind: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of each record of `kind` that has this number."""
        found = ((record["step"], number(record, key)) for record in self.of_kind(kind))
        return [(step, value) for step, value in found if value is not None and abs(step) < 1e15]

    @property
    def seconds(self) -> float | None:
        """From each start to the last record before the next one, together; stops are not in it. None without times."""
        spans: list[list[float]] = []
        for record in self.records:
            time = number(record, "time")
            if record["kind"] == "start":
                spans.append([])
            if time is not None and spans:
                spans[-1].append(time)
        measured = [max(0.0, span[-1] - span[0]) for span in spans if len(span) > 1]
        return sum(measured) if measured else None


def stages(run: Path) -> tuple[list[Stage], str]:
    """The stages up to `run`, the first one first, and the run folder that is named as the first one's origin and not there."""
    found = [stage(run)]
    seen = {run.resolve()}
    while found[0].init and len(found) < MOST_STAGES:
        folder = _find(found[0])
        if folder is None or folder.resolve() in seen:
            return found, found[0].init
        seen.add(folder.resolve())
        found.insert(0, stage(folder))
    return found, ""


def _find(of: Stage) -> Path | None:
    """The folder that a stage began from: where it was, or beside the stage, as after copying both."""
    for folder in (Path(of.init), of.folder.absolute().parent / Path(of.init).name):
        with contextlib.suppress(OSError, ValueError):
            if folder.is_dir() and ((folder / run_folder.CONFIG).is_file() or run_folder.available(folder)):
                return folder
    return None


def stage(folder: Path) -> Stage:
    """What the folder says; whatever is missing or damaged is left out and told."""
    unreadable: list[str] = []
    config, found, damaged = None, [], 0
    with contextlib.suppress(UserError):  # told by status
        config = run_folder.read_config(folder)
    with contextlib.suppress(UserError):
        found, damaged = records.read(folder), records.damaged(folder)
    data: dict[str, Any] = {}
    if (folder / run_folder.DATA).exists():
        with _told(unreadable):
            data = files.read_table(folder / run_folder.DATA, "")
            if not isinstance(data.get("path"), str) or not isinstance(data.get("tokenizer", {}), dict):
                raise UserError(f"{folder / run_folder.DATA}: does not say what the data is")
    evals, texts = {}, {}
    for path in sorted((folder / "evals").glob("*.json")):
        with _told(unreadable):
            content = files.read_table(path, f"{path}: has just gone")
            if path.stem.startswith(("chat_", "core_")) and not isinstance(content.get("tasks"), dict):
                raise UserError(f"{path}: names no tasks; evaluate again")
            evals[path.stem] = content
    for path in sorted((folder / "evals").glob("sample_*.txt")):
        with contextlib.suppress(OSError):
            texts[path.stem] = path.read_text(encoding="utf-8", errors="replace")
    return Stage(folder, status(folder), config, found, damaged, data, evals, texts, unreadable)


@contextlib.contextmanager
def _told(lines: list[str]) -> Iterator[None]:
    """Puts the text of a UserError in `lines` and goes on behind the block."""
    try:
        yield
    except UserError as error:
        lines.append(str(error))
