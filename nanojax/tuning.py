"""What fine-tuning and reinforcement learning share: a run that begins from another run, whose config it follows from."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanojax import cli, config_files
from nanojax import train as training
from nanojax.card.start import OF_THE_CARD
from nanojax.cli import UserError
from nanojax.config import Config

HARMLESS: dict[str, Any] = {"eval.core_every": 0, "profile.start": -1, "parallel.devices": "1", "parallel.processes": 1}


def parse(parser: cli.Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parser's options with --run, --out and --epochs, and the overrides behind them. UserError before anything is read."""
    parser.add_argument("--run", type=cli.path, required=True, help="run folder to begin from")
    parser.add_argument("--out", type=cli.path, required=True, help="run folder to train in")
    parser.add_argument("--epochs", type=cli.positive, default=1.0, help="passes over the data (1)")
    known, rest = parser.parse_known_args(arguments)
    if Path(known.run).resolve() == Path(known.out).resolve():
        raise UserError("--out: is the base run's folder; choose another")
    config_files.pairs(rest)
    known.run, known.out = (str(Path(folder)) for folder in (known.run, known.out))  # without a last slash
    return known, rest


def keys(begun: bool, base: Config, recipe: dict[str, Any], run: str, out: str, path: str, kind: str) -> dict[str, Any]:
    """What the command sets: of a new run the recipe, of each start where it begins and what it learns from.

    What the base run chose for its card is chosen again by the machine that trains.
    """
    new = {} if begun else {**HARMLESS, **recipe, "train.seed": base.train.seed, "train.extend": 0}
    return new | OF_THE_CARD | {"train.init": run, "train.run": out, "data.path": path, "data.kind": kind}


def train(make: Callable[[], Config], data_option: str) -> None:
    """Trains what `make` gives and ends the process. A mistake is told in the words of the command, not of the keys it sets."""
    typed = {"--train.run": "--out", "--train.init": "--run", "--data.path": data_option}
    try:
        training.end_process(make)
    except UserError as error:
        told = functools.reduce(lambda text, key: text.replace(*key), typed.items(), str(error))
        raise UserError(told) from None
