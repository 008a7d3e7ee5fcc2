"""A run folder's own files: its resolved config, which checkpoints it has, and whether a command continues it.

RUN/config.json, RUN/tokenizer/, RUN/checkpoints/STEP/ (checkpoint.py), RUN/metrics.jsonl and RUN/tensorboard/ (metrics.py).
"""

import os
from pathlib import Path

from nanojax import config as configs
from nanojax import files
from nanojax.cli import UserError
from nanojax.config import Config

CHECKPOINTS = "checkpoints"


def write_config(run: Path, config: Config) -> None:
    """config.json, whole or not at all."""
    configs.save(config, run / "config.json")


def read_config(run: str | os.PathLike) -> Config:
    """The resolved config of a run folder. UserError if there is none or it is damaged."""
    path = Path(run) / "config.json"
    missing = f"{run}: not a run folder (no config.json); train one with python -m nanojax.train"
    return configs.from_dict(files.read_table(path, missing), str(path))


def available(run: str | os.PathLike) -> list[int]:
    """Steps of the run's checkpoints, oldest first. A save that was cut off is not among them."""
    folder = Path(run) / CHECKPOINTS
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def check_continues(run: Path, config: Config) -> None:
    """UserError naming the keys in which `config` differs from the run that the folder's checkpoints belong to."""
    if not available(run):
        return
    changed = configs.harmful_changes(read_config(run), config)
    if changed:
        list_of = ", ".join(f"{key} (was {earlier}, now {now})" for key, (earlier, now) in changed.items())
        raise UserError(
            f"{run}: its checkpoints were trained with other settings: {list_of}; choose another --train.run"
        )


def recovery_hint(run: Path) -> str:
    """What a diverged run can go back to."""
    steps = available(run)
    last = f"the last good checkpoint is {run / CHECKPOINTS / str(steps[-1])}" if steps else "no checkpoint yet"
    return f"{last}; lower the learning rates (optim.*) in another --train.run"
