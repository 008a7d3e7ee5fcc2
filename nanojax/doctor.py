"""The command that says what keeps this machine from training, or slows it, with what to do.     python -m nanojax.doctor"""

import json
import os
import sys
from pathlib import Path

from nanojax import cli, config_files
from nanojax.card import advice, facts
from nanojax.cli import Parser, run_main

DESCRIPTION = """What this machine has to train on, and what stands in the way: one line each, with what to do.

Looks at the driver, CUDA and cuDNN against what jax wants, the card's memory, display, power and other programs,
conflicting libraries, WSL2, RAM and disk. Changes nothing. Exit code 0: nothing prevents training; 1: a problem does."""
EXAMPLES = """\
  python -m nanojax.doctor
  python -m nanojax.doctor --config=d32_4070        also whether that config fits this card, disk and RAM now
  python -m nanojax.doctor --json > doctor.json     for a bug report: no user, host or path in it"""


def main() -> None:
    """The command."""
    parser = Parser("python -m nanojax.doctor", DESCRIPTION, EXAMPLES)
    parser.add_argument("--config", help="name or path of a config; any --section.key=value overrides it")
    parser.add_argument("--json", action="store_true", help="print the facts and the lines as JSON, and nothing else")
    a, rest = parser.parse_known_args()
    if rest and a.config is None:
        needs = "; keys of a config need --config" if "." in rest[0].split("=")[0] else "; see --help"
        raise cli.UserError(f"{rest[0]}: no such option{needs}")
    config = config_files.load(a.config, rest) if a.config is not None else None
    found = facts.gather(folder=Path(config.train.run if config else "runs"), probe=facts.ask_jax)
    need = None
    if config:
        os.environ["JAX_PLATFORMS"] = "cpu"  # sizes need no GPU, and a broken one would end this
        from nanojax.card import memory

        need = memory.need(config)
    lines = advice.lines(found, need)
    bad = any(line.level == "problem" for line in lines)
    if a.json:
        print(json.dumps({"facts": facts.as_json(found), "lines": [line._asdict() for line in lines]}, indent=1))
    else:
        print("\n".join(map(str, lines)))
        print("something prevents training: see the problems above" if bad else "nothing prevents training")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
