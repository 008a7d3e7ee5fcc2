"""A run folder's own files: which checkpoints it has, the config that each keeps, and what is set aside.

RUN/config.json, RUN/data.json (what its data folder says of itself, see source.py), RUN/tokenizer/, RUN/checkpoints/STEP/
(checkpoint.py), RUN/metrics.jsonl and RUN/tensorboard/ (metrics.py).
Each checkpoint has its own copy of the config it was trained with, and that one counts; config.json shows the newest.
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanojax import config as configs
from nanojax import config_rules, files
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.run import records

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
DATA = "data.json"
COMPLETE = "commit_success.txt"


def write_config(run: Path, config: Config) -> None:
    """config.json, whole or not at all."""
    configs.save(config, run / CONFIG)


def read_config(run: str | os.PathLike) -> Config:
    """The resolved config of a run folder: its newest checkpoint's own; config.json's where no checkpoint has one.

    UserError if there is none, or it is damaged.
    """
    for step in reversed(available(run)):
        try:
            return saved_config(run, step)
        except UserError:
            continue  # whether that checkpoint is whole is checked where it is loaded
    return _shown_config(run)


def check(run: str) -> None:
    """UserError unless --run is a folder that a run wrote, or an empty one."""
    if not Path(run).is_dir():
        raise UserError(f"--run={run}: no such folder")
    names = {path.name for path in Path(run).iterdir()}
    if names and not names & {CONFIG, CHECKPOINTS, records.FILE, "lock"}:
        raise UserError(f"--run={run}: not a run folder; it holds {', '.join(sorted(names)[:3])}")


def origin(config: Config) -> str:
    """The folder with the tokenizer of a run that begins from another: its own once it has a checkpoint."""
    return config.train.run if available(config.train.run) else config.train.init


def _shown_config(run: str | os.PathLike) -> Config:
    path = Path(run) / CONFIG
    missing = f"{run}: not a run folder (no config.json); train one with python -m nanojax.train"
    return config_rules.from_dict(files.read_table(path, missing), str(path))


def available(run: str | os.PathLike) -> list[int]:
    """Steps of the run's checkpoints, oldest first. A save that was cut off is not among them."""
    folder = Path(run) / CHECKPOINTS
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal() and p.is_dir())


def saved_meta(run: str | os.PathLike, step: int) -> dict[str, Any]:
    """What the checkpoint of `step` keeps beside its arrays: step, data position, config. UserError if it cannot be read."""
    path = Path(run) / CHECKPOINTS / str(step) / "meta" / "data.json"
    meta = files.read_table(path, f"{path}: is missing; copy the checkpoint again")
    if not is_sealed(meta):
        raise UserError(f"{path}: is not what was saved; copy the checkpoint again")
    return meta


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` with a checksum of its JSON: one flipped bit of the data position would train on other text, unseen."""
    return {**meta, "seal": zlib.crc32(json.dumps(meta, sort_keys=True).encode())}


def is_sealed(meta: dict[str, Any]) -> bool:
    """Whether `meta` is what `sealed` made. Checkpoints of before that have no seal and pass."""
    rest = {key: value for key, value in meta.items() if key != "seal"}
    return "seal" not in meta or meta["seal"] == sealed(rest)["seal"]


def saved_config(run: str | os.PathLike, step: int) -> Config:
    """The config that the checkpoint of `step` was trained with. UserError if it cannot be read."""
    config = saved_meta(run, step).get("config")
    if not isinstance(config, dict):  # of before configs were kept there
        return _shown_config(run)
    return config_rules.from_dict(config, f"{Path(run) / CHECKPOINTS / str(step)}: its config")


def check_complete(folder: Path, parts: Iterable[str]) -> None:
    """UserError if a checkpoint's folder, one of `parts` or its meta was not written or copied to the end.

    Orbax does not look: a folder that was being deleted, or copied in part, has no such mark.
    """
    for part in ("", *parts, "meta"):
        if not (folder / part / COMPLETE).is_file():
            raise UserError(f"{Path(part) / COMPLETE} is missing")


def visible_damage(run: str | os.PathLike, step: int) -> str | None:
    """What is wrong with the checkpoint of `step`, as far as its small files tell; None if nothing is."""
    try:
        parts = ["params"] if saved_meta(run, step).get("data") == {} else ["params", "opt"]
        check_complete(Path(run) / CHECKPOINTS / str(step), parts)
    except UserError as error:
        return str(error)
    return None


def imported(run: str | os.PathLike, step: int) -> bool:
    """Whether the checkpoint of `step` came from another program: weights without optimizer and data position."""
    try:
        return saved_meta(run, step).get("data") == {}
    except UserError:
        return False


def set_aside(run: Path, steps: list[int], name: str) -> None:
    """Moves the checkpoints of `steps` to RUN/`name`/, where an earlier one of the same step stays."""
    for step in steps:
        (run / name).mkdir(exist_ok=True)
        number = sum(1 for p in (run / name).glob(f"{step}*"))
        os.rename(run / CHECKPOINTS / str(step), run / name / (f"{step}.{number}" if number else str(step)))


def keep_records(run: Path, name: str) -> None:
    """Copies metrics.jsonl to RUN/`name`/, before the records of steps that will be trained again are dropped."""
    if (run / records.FILE).exists():
        with files.write_atomic(run / name / records.FILE) as file:
            file.write((run / records.FILE).read_bytes())


def check_path(run: str | os.PathLike) -> None:
    """UserError where orbax, which takes UTF-8 only, could not write or read the folder's checkpoints."""
    try:
        str(Path(run).absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"{run}: checkpoints need a path that is UTF-8; rename the folder or choose another") from None


def recovery_hint(run: Path) -> str:
    """What a diverged run can go back to."""
    steps = available(run)
    last = f"the last good checkpoint is {run / CHECKPOINTS / str(steps[-1])}" if steps else "no checkpoint yet"
    return f"{last}; lower the learning rates (optim.*) in another --train.run"
