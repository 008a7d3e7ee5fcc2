"""Supervised fine-tuning: the config that follows from a base run and prepared conversations, trained by train.py's loop."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in train.py

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojax import cli, config_files, config_rules, tuning
from nanojax import config as configs
from nanojax.cli import UserError, run_main
from nanojax.config import Config
from nanojax.run import exits, run_folder
from nanojax.tasks import packing, prepared, stream

# nanochat's recipe of July 2026 (chat_sft.py): no warm-up, constant, then linear to 0 over the last half.
RECIPE: dict[str, Any] = {
    "optim.peak_lr": 0.8,
    "optim.warmup": 0.0,
    "optim.warmdown": 0.5,
    "optim.final_lr": 0.0,
    "optim.momentum_start": 0.85,
    "optim.momentum": 0.95,
    "optim.momentum_warmup": 300,
    "optim.momentum_final": 0.0,
    "optim.weight_decay": 0.0,
    "optim.matrix_decay": 0.0,
    "eval.every": 200,
    "eval.prompt": "What is the capital of France?",
    "checkpoint.every": 200,
}
DESCRIPTION = """Fine-tunes a run's model on prepared conversations: their supervised tokens only, all of a step's alike.

Rates, batch and formats are the base run's; the schedule is nanochat's. The same command again resumes. Any key of
python -m nanojax.train is overridden as --section.key=value. Exit codes as there."""
EXAMPLES = """\
  python -m nanojax.sft --run=runs/d24 --data=data/chat --out=runs/d24-chat
  python -m nanojax.sft --run=runs/d24 --data=data/mine --out=runs/mine --epochs=3 --train.tokens_per_step=65536
  python -m nanojax.plan --config=d24_2026_4070 --data.kind=conversations --train.tokens=4e8      what such a run needs"""


class Wish(NamedTuple):
    """The command line. `momenta` None: those of the base run if it has some."""

    base: str
    data: str
    out: str
    epochs: float
    momenta: str | None
    overrides: Sequence[str]


def config_of(wish: Wish, say: Any = print) -> Config:
    """The resolved config of a fine-tuning run. One that has begun keeps its own, whatever became of the base run.

    UserError for a base, data or key that cannot work; Failed where a run that has begun misses its data.
    """
    begun = run_folder.available(wish.out)
    base = run_folder.read_config(wish.out if begun else wish.base)
    if begun and base.train.init != wish.base:
        raise UserError(
            f"--out={wish.out}: holds a run that began from {base.train.init or 'random weights'}; choose another"
        )
    if not begun and base.data.kind != "text":
        say(f"{wish.base} is a fine-tuned run itself; its rates are taken for the base's")
    fixed = tuning.keys(bool(begun), base, RECIPE, wish.base, wish.out, wish.data, "conversations")
    fixed["optim.steps_before"] = _steps_before(wish, base.optim.steps_before if begun else None, say)
    overrides = config_files.pairs(wish.overrides)
    with exits.restarting(bool(begun)):
        steps = overrides.get("train.steps") or _steps(configs.override(base, fixed | overrides), wish.epochs, say)
    config = configs.override(base, fixed | {"train.steps": steps} | overrides)
    return config_rules.resolve(dataclasses.replace(config, name=Path(wish.out).name))


def _steps_before(wish: Wish, kept: int | None, say: Any) -> int:
    """optim.steps_before: 0 for fresh momenta. `kept` is that of a run that has begun."""
    if wish.momenta == "fresh":
        return 0
    if kept is not None:
        return kept
    there = run_folder.available(wish.base)
    if not there:
        raise UserError(f"--run={wish.base}: has no checkpoint yet; train until the first one is saved")
    if run_folder.imported(wish.base, there[-1]):
        if wish.momenta == "base":
            raise UserError(f"--momenta=base: {wish.base} holds imported weights without momenta; choose fresh")
        say(f"{wish.base} holds imported weights: momenta begin at zero")
        return 0
    return there[-1]


def _steps(config: Config, epochs: float, say: Any) -> int:
    """Steps of `epochs` passes over the mixture; says what is in a pass."""
    T = config.model.T
    _, of = prepared.load(config.data.path, "train", verify=False)
    plan = packing.plan_pass(of, T + 1, stream.pass_seed(config.train.seed, 0))
    used = np.minimum(np.diff(of.ends, prepend=0)[plan.numbers], T + 1).sum()
    rows = config.train.tokens_per_step // T
    steps = max(1, math.ceil(epochs * plan.rows / max(1, rows)))
    filled = used / max(1, plan.rows * (T + 1))
    say(
        f"{config.data.path}: {len(plan.numbers):,} conversations in {plan.rows:,} rows of {T + 1}, {filled:.1%} filled; "
        f"{plan.cut:,} cut to a row, {plan.left_out:,} left out without an answer in it; --epochs={epochs:g}: {steps:,} steps"
    )
    return steps


def parse(arguments: Sequence[str]) -> Wish:
    """The command line."""
    parser = cli.Parser("python -m nanojax.sft", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--data", type=cli.path, required=True, help="folder that python -m nanojax.tasks prepare wrote"
    )
    parser.add_argument(
        "--momenta", choices=["base", "fresh"], help="the optimizer's; default: the base run's if it has any"
    )
    a, rest = tuning.parse(parser, arguments)
    return Wish(a.run, str(Path(a.data)), a.out, a.epochs, a.momenta, rest)


def main() -> None:
    """The command."""
    wish = parse(sys.argv[1:])
    tuning.train(functools.partial(config_of, wish), "--data")


if __name__ == "__main__":
    run_main(main)
