"""Reinforcement learning: the config that follows from a fine-tuned run and a task, trained by train.py's loop."""

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

from nanojax import cli, config_files, config_rules, questions, tuning
from nanojax import config as configs
from nanojax.cli import UserError, run_main
from nanojax.config import Config
from nanojax.engine.decode import ROUND
from nanojax.run import exits, run_folder
from nanojax.tokenizer import Tokenizer

# nanochat's recipe (chat_rl.py): a twentieth of the rates, linear to 0 from the first step, no decay, fresh momenta.
RECIPE: dict[str, Any] = {
    "optim.peak_lr": 0.05,
    "optim.warmup": 0.0,
    "optim.warmdown": 1.0,
    "optim.final_lr": 0.0,
    "optim.momentum_start": 0.95,
    "optim.momentum": 0.95,
    "optim.momentum_warmup": 0,
    "optim.momentum_final": 0.0,
    "optim.weight_decay": 0.0,
    "optim.matrix_decay": 0.0,
    "optim.steps_before": 0,
    "compute.held": 0,  # a step has too few microbatches to be worth its memory
    "eval.every": 60,
    "checkpoint.every": 60,
}
DESCRIPTION = f"""Trains a fine-tuned model on rewards: it answers questions, and right answers become likelier.

TASK is {", ".join(questions.TASKS)}, or a Python file with questions() and reward(question, answer). The same command again
resumes. Any key of python -m nanojax.train is overridden as --section.key=value. Exit codes as there."""
EXAMPLES = """\
  python -m nanojax.rl --run=runs/d24-chat --task=gsm8k --out=runs/d24-rl
  python -m nanojax.rl --run=runs/d24-chat --task=mine.py --out=runs/mine --schedule=cosine --train.steps=200
  python -m nanojax.rl --run=runs/chat_demo_tuned --task=arithmetic --out=runs/sums --rl.questions=8 --rl.samples=8
  python -m nanojax.plan --config=d24_2026_4070 --rl                                         what such a run needs"""


class Wish(NamedTuple):
    """The command line."""

    base: str
    task: str
    out: str
    epochs: float
    schedule: str | None
    overrides: Sequence[str]


def config_of(wish: Wish, say: Any = print) -> Config:
    """The resolved config of a run that learns from rewards. One that has begun keeps its own.

    UserError for a base, task or key that cannot work; Failed where a run that has begun misses its task.
    """
    begun = run_folder.available(wish.out)
    base = run_folder.read_config(wish.out if begun else wish.base)
    if begun and (base.train.init, base.data.path) != (wish.base, wish.task):
        began = f"began from {base.train.init or 'random weights'} with {base.data.path}"
        raise UserError(f"--out={wish.out}: holds a run that {began}; choose another")
    if not begun and base.data.kind == "text":
        say(f"{wish.base} is not fine-tuned: it may answer nothing that earns a reward")
    fixed = tuning.keys(bool(begun), base, RECIPE, wish.base, wish.out, wish.task, "rollouts")
    if wish.schedule:
        fixed["optim.decay"] = wish.schedule
    overrides = config_files.pairs(wish.overrides)
    config = configs.checked(configs.override(base, fixed | overrides))
    with exits.restarting(bool(begun)):
        config = _with_sizes(config, overrides, wish.epochs, bool(begun), say)
    return config_rules.resolve(dataclasses.replace(config, name=Path(wish.out).name))


def _with_sizes(config: Config, overrides: dict[str, str], epochs: float, begun: bool, say: Any) -> Config:
    """`config` with the rows, microbatch and steps that follow from the task's questions."""
    T = config.model.T
    longest = config.rl.row if begun or "rl.row" in overrides else T
    if not begun and "rl.tokens" not in overrides:
        config = configs.override(config, {"rl.tokens": max(1, min(config.rl.tokens, longest // 2))})
    rl = config.rl
    tokenizer = Tokenizer.load(Path(run_folder.origin(config)) / "tokenizer")
    room = longest - rl.tokens
    if room < 1:
        row = f"rows of --rl.row={rl.row}" if "rl.row" in overrides else f"{longest}"
        raise UserError(f"--rl.tokens={rl.tokens}: leaves no room for a question in {row} tokens; choose less")
    found = questions.load(config.data.path, rl, tokenizer, room)
    row = min(room, found.longest) + rl.tokens
    row = rl.row if begun or "rl.row" in overrides else min(T, math.ceil(row / ROUND) * ROUND)
    answers = rl.questions * rl.samples
    rows = max(1, config.train.microbatch * T // row)  # of a microbatch: as many tokens as the base run's
    sizes: dict[str, Any] = {"rl.row": row, "train.tokens_per_step": 0}
    sizes["train.microbatch"] = max(n for n in range(1, min(rows, answers) + 1) if answers % n == 0)
    sizes["train.steps"] = max(1, int(epochs * (len(found.train) // rl.questions)))
    kept = {*overrides, *({"rl.row", "train.microbatch"} if begun else ())}
    sizes = {key: value for key, value in sizes.items() if key not in kept}
    config = configs.override(config, sizes)
    chunk = math.gcd(config.compute.loss_chunk, config.train.microbatch * row)
    if not begun and "compute.loss_chunk" not in overrides and chunk < config.compute.loss_chunk:
        config = configs.override(config, {"compute.loss_chunk": chunk})
    say(
        f"{config.data.path}: {len(found.train):,} questions to train on, {len(found.held_out):,} held out, "
        f"{found.left_out:,} left out as too long; rows of {row} tokens; {config.train.steps:,} steps of {answers} answers"
    )
    return config


def parse(arguments: Sequence[str]) -> Wish:
    """The command line."""
    parser = cli.Parser("python -m nanojax.rl", DESCRIPTION, EXAMPLES)
    parser.add_argument("--task", type=cli.path, required=True, help="a task's name, or a Python file")
    parser.add_argument("--schedule", choices=["linear", "cosine"], help="how the rates fall to 0 (linear)")
    a, rest = tuning.parse(parser, arguments)
    return Wish(a.run, a.task, a.out, a.epochs, a.schedule, rest)


def main() -> None:
    """The command."""
    wish = parse(sys.argv[1:])
    tuning.train(functools.partial(config_of, wish), "--task")


if __name__ == "__main__":
    run_main(main)
