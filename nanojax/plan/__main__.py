"""The command that plans a run.        python -m nanojax.plan"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from nanojax import cli, config_files, files, hardware
from nanojax.cli import Parser, UserError, run_main
from nanojax.config import Config, override
from nanojax.config_rules import resolve
from nanojax.hardware import LINKS, Card
from nanojax.plan import core_of_flops, days, decoding, energy, planner, report, rollouts

DESCRIPTION = """What a config needs on a GPU that may be absent: memory, days, kilowatt hours, money.

Compiles the real training step for the GPU; no GPU and no driver are needed. Times are modelled unless --measure."""
EXAMPLES = """\
  python -m nanojax.plan --config=d32_4070
  python -m nanojax.plan --config=d32_4070 --card=rtx3060 --json
  python -m nanojax.plan --config=d32_4070 --train.microbatch=2 --compute.residuals=cheap
  python -m nanojax.plan --config=d32_4070 --try=train.microbatch=1,2,4 --try=compute.residuals=cheap,all
  python -m nanojax.plan --config=d12_4070 --measure          (needs the GPU: measures instead of modelling)
  python -m nanojax.plan --table                              (all shipped configs)
  python -m nanojax.plan --days=7 --card=rtx4070              (the best model for a week)
  python -m nanojax.plan --config=d32_4070 --decode=1,16 --cache=int8     (answering: tokens/s of so many rows)
  python -m nanojax.plan --config=d32_4070 --cards=2xrtx4070 --link=10GbE     (two cards share each step)
  python -m nanojax.plan --config=d32_4070 --cards=2xrtx4070 --table          (1, 2, 4 and 8 of them)
  python -m nanojax.plan --config=d24_2026_4070 --rl=16x512          (reinforcement learning: 16 answers of 512 tokens)

Cards: """

# Options that belong to some plans only: attribute and flag.
OF_STEP = {"measure": "--measure", "axes": "--try", "top": "--top"}
OF_DECODING = {"context": "--context", "cache": "--cache"}
OF_TRAINING = {**OF_STEP, "watts": "--watts", "price": "--price"}
OF_ONE_CONFIG = {"config": "--config", "hlo": "--hlo", **OF_STEP, "decode": "--decode", "rl": "--rl", **OF_DECODING}


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("python -m nanojax.plan", DESCRIPTION, EXAMPLES + ", ".join(hardware.CARDS))
    parser.add_argument("--config", help="name or path of a config; any --section.key=value overrides it")
    parser.add_argument("--card", help="the GPU to plan for; default: the one in the config's name, or rtx4070")
    parser.add_argument("--cards", metavar="NxCARD", help="plan for N of these cards, which share each step: 2xrtx4070")
    parser.add_argument("--link", choices=LINKS, help="what joins the cards (pcie4); its rates are in hardware.py")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--hlo", metavar="FILE", type=cli.path, help="also write the optimised HLO to FILE")
    parser.add_argument(
        "--table", action="store_true", help="plan every shipped config; with --cards one config for 1, 2, 4, 8 cards"
    )
    parser.add_argument("--days", type=float, help="find the best model of the newest recipe for so many days")
    parser.add_argument("--measure", action="store_true", help="calibrate and time the step on the GPU in this machine")
    parser.add_argument("--try", dest="axes", metavar="KEY=A,B", action="append", default=[], help="compare values")
    parser.add_argument(
        "--decode", nargs="?", const="1,16", metavar="ROWS", help="plan the decoder of so many rows at a time (1,16)"
    )
    parser.add_argument(
        "--rl", nargs="?", const="16x512", metavar="ROWSxTOKENS",
        help="plan reinforcement learning: answers at a time, and tokens of each with its question (16x512)",
    )  # fmt: skip
    parser.add_argument("--context", type=int, help="--decode: tokens of a row (the model's whole sequence)")
    parser.add_argument("--cache", choices=("float", "int8"), default="float", help="--decode: keys and values (float)")
    parser.add_argument("--top", type=int, default=10, help="slowest kernels shown (default 10)")
    parser.add_argument("--watts", type=float, help="power while training; default: the card's limit")
    parser.add_argument("--price", type=float, help="money per kWh; default: USD 0.17 and NT$ 3.5")
    parser.add_argument("--currency", default="USD", help="currency of --price (default USD)")
    parser.add_argument("--no-cache", dest="keep", action="store_false", help="compile again, keep no compiled program")
    known, rest = parser.parse_known_args()
    if known.watts is not None and not 0 < known.watts < 1e6:
        raise UserError(f"--watts={known.watts:g}: must be between 0 and a million")
    if known.price is not None and not 0 <= known.price < 1e9:
        raise UserError(f"--price={known.price:g}: must be a price per kWh, not negative")
    of = lambda flags: [flag for name, flag in flags.items() if getattr(known, name) != parser.get_default(name)]
    if known.decode is None and (alone := of(OF_DECODING)):
        raise UserError(f"{alone[0]}: describes a decoder; add --decode")
    if known.decode is not None and (others := of(OF_TRAINING)):
        raise UserError(f"--decode: plans no training; leave out {', '.join(others)}")
    if known.rl is not None and (others := of({**OF_TRAINING, "hlo": "--hlo", "decode": "--decode"})):
        raise UserError(f"--rl: is a plan of its own; leave out {', '.join(others)}")
    _check_cards(known, rest)
    given = of(OF_ONE_CONFIG)
    given += [argument.partition("=")[0] for argument in rest]
    if known.days is not None and (given or known.table):
        raise UserError(
            f"--days: chooses the model by itself; leave out {', '.join([*given, *['--table'] * known.table])}"
        )
    if known.table and given and not known.cards:
        raise UserError(f"--table: plans all shipped configs by itself; leave out {', '.join(given)}")
    if known.days is None and not (known.table and not known.cards) and not known.config:
        names = ", ".join(config_files.available())
        raise UserError(f"--config: missing; there are {names}, or --table for all, or --days=7 for the best in a week")
    return known, rest


def _check_cards(known: argparse.Namespace, rest: list[str]) -> None:
    """UserError for options that do not go with --cards or --link."""
    several = known.cards or any(argument.startswith("--parallel.devices") for argument in rest)
    if known.link and not several:
        raise UserError(f"--link={known.link}: joins several cards; add --cards=2xrtx4070")
    if not known.cards:
        return
    others = {"card": "--card", "days": "--days", "decode": "--decode", "rl": "--rl", "measure": "--measure"}
    if alone := [flag for name, flag in others.items() if getattr(known, name)]:
        raise UserError(f"--cards: plans training on absent cards; leave out {', '.join(alone)}")
    if known.table and (
        alone := [flag for name, flag in {"axes": "--try", "hlo": "--hlo"}.items() if getattr(known, name)]
    ):
        raise UserError(f"--table: one row for 1, 2, 4 and 8 cards; leave out {', '.join(alone)}")


def _cards(text: str) -> tuple[int, Card]:
    """How many of which card `2xrtx4070` means."""
    count, _, name = text.partition("x")
    if not (count.isascii() and count.isdecimal() and 1 <= int(count) <= 64 and name):
        raise UserError(f"--cards={text}: expected a number from 1 to 64 and a card, for example --cards=2xrtx4070")
    return int(count), hardware.find_card(name, f"--cards={count}x")


def _by_number(a: argparse.Namespace, config: Config, card: Card, options: dict[str, Any], console: Console) -> None:
    """Plans of one config for 1, 2, 4 and 8 cards."""
    numbers = [n for n in (1, 2, 4, 8) if config.microbatches % n == 0]
    share = lambda n: resolve(override(config, {"parallel.devices": str(n)}))
    plans = [planner.make(share(n), card, **options) for n in numbers]
    if a.json:
        print(json.dumps([p.as_json() for p in plans], indent=1))
    else:
        report.show_cards(plans, console, options["prices"] or energy.PRICES)


def _say(message: str) -> None:
    """Prints progress to stderr, which leaves stdout to the plan."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def _axes(texts: list[str]) -> list[tuple[str, list[str]]]:
    out = []
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--try={text}: expected KEY=VALUE,VALUE, for example --try=train.microbatch=1,2,4")
        out.append((key, values.split(",")))
    return out


def _table(a: argparse.Namespace, prices: dict[str, float], console: Console) -> None:
    names = config_files.available()
    plans = []
    for i, name in enumerate(names, 1):
        card = hardware.find_card(a.card) if a.card else hardware.card_of_config(name)
        _say(f"{i} of {len(names)}: {name}")
        plans.append(planner.make(config_files.load(name), card, cache=a.keep, watts=a.watts, prices=prices, say=_say))
    if a.json:
        print(json.dumps([p.as_json() for p in plans], indent=1))
    else:
        report.show_table(plans, console, prices)


def _days(a: argparse.Namespace, prices: dict[str, float], console: Console) -> None:
    card = hardware.find_card(a.card or "rtx4070")
    choices = days.best(a.days, card, cache=a.keep, watts=a.watts, prices=prices, say=_say)
    if a.json:
        models = [choice.as_json() for choice in choices]
        told = {"days": a.days, "card": card.key, "core_published_flops": core_of_flops.published(), "models": models}
        print(json.dumps(told, indent=1))
    else:
        report.show_choices(choices, console, prices)


def _decoders(a: argparse.Namespace, config: Config, card: Card, console: Console) -> None:
    try:
        rows = [int(text) for text in a.decode.split(",")]
    except ValueError:
        rows = [0]
    if not all(0 < B <= 4096 for B in rows):
        raise UserError(f"--decode={a.decode}: expected numbers of rows from 1 to 4096, for example --decode=1,16")
    context = config.model.T if a.context is None else a.context
    if not 2 <= context <= config.model.T:
        raise UserError(f"--context={context}: must be from 2 to the model's sequence of {config.model.T}")
    if a.hlo and len(rows) > 1:
        raise UserError(f"--hlo: one program; ask for one number of rows, for example --decode={rows[0]}")
    plans = [decoding.make(config, card, B, context, a.cache == "int8", cache=a.keep, say=_say) for B in rows]
    if a.hlo:
        _write_hlo(a.hlo, plans[0].program.hlo)
    if a.json:
        print(json.dumps([plan.as_json() for plan in plans], indent=1))
    else:
        report.show_decoding(plans, console)


def _rollouts(a: argparse.Namespace, config: Config, card: Card, console: Console) -> None:
    sizes = a.rl.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and 2 <= int(size) <= 65536 for size in sizes):
        raise UserError(f"--rl={a.rl}: expected answers at a time and tokens of each, for example --rl=16x512")
    plan = rollouts.make(config, card, *map(int, sizes), cache=a.keep, say=_say)
    if a.json:
        print(json.dumps(plan.as_json(), indent=1))
    else:
        report.show_rollouts(plan, console)


def _measured(a: argparse.Namespace, config: Config, card: Card, prices: dict[str, float]) -> tuple[Any, list[str]]:
    """The plan with measured times, and lines on them."""
    from nanojax.plan import measure

    reading = hardware.read_gpu()
    if reading is None:
        raise UserError(
            "--measure: no NVIDIA GPU with a driver in this machine; without --measure the plan is modelled"
        )
    if card.name != reading.name:
        raise UserError(f"--measure: this machine has {reading.name}, not {card.name}; leave out --card")
    if config.several:
        raise UserError(f"--measure: times one card; leave out --parallel.devices={config.parallel.devices}")
    return measure.plan(config, card, prices=prices, watts=a.watts, say=_say)


def _write_hlo(path: Path, text: str) -> None:
    with files.write_atomic(path) as file:
        file.write(text.encode())


def main() -> None:
    a, overrides = _arguments()
    prices = energy.PRICES if a.price is None else {a.currency: a.price}
    out = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    if a.table and not a.cards:
        return _table(a, prices, out)
    if a.days is not None:
        return _days(a, prices, out)
    config = config_files.load(a.config, overrides)
    if config.parallel.devices == "all":
        raise UserError("--parallel.devices=all: a plan needs a number; give --cards=2xrtx4070")
    reading = hardware.read_gpu()
    card = hardware.find_card(
        a.card or (reading.name if reading and a.measure else hardware.card_of_config(config.name).key)
    )
    if a.cards:
        number, card = _cards(a.cards)
        config = resolve(override(config, {"parallel.devices": str(number)}))
    options: dict[str, Any] = dict(cache=a.keep, watts=a.watts, prices=prices, link=LINKS[a.link or "pcie4"], say=_say)
    if a.table:
        return _by_number(a, config, card, options, out)
    if a.rl is not None:
        return _rollouts(a, config, card, out)
    if a.decode is not None:
        return _decoders(a, config, card, out)
    if a.measure:
        plan, lines = _measured(a, config, card, prices)
    else:
        axes = _axes(a.axes)
        if axes:
            trials = planner.sweep(config, card, axes, **options)
            if a.json:
                print(json.dumps([{"change": c} | p.as_json() for c, p in trials], indent=1))
            else:
                report.show_sweep(trials, out)
            return
        plan = planner.make(config, card, **options)
        lines = []
    if a.hlo:
        _write_hlo(a.hlo, plan.program.hlo)
    found = []
    if not plan.fits:
        _say("it does not fit; trying what would")
        found = planner.try_changes(plan, cache=a.keep, say=_say)
    if a.json:
        changes = [
            {"change": c, "peak_bytes": p.memory.peak, "tokens_per_second": p.tokens_per_second} for c, p in found
        ]
        print(json.dumps(plan.as_json() | {"would_fit": changes} | ({"measured": lines} if lines else {}), indent=1))
        return
    report.show(plan, out, prices, a.top)
    for line in lines:
        out.print(line)
    if not plan.fits:
        report.show_changes(found, out)
    out.print(plan.summary)


if __name__ == "__main__":
    run_main(main)
