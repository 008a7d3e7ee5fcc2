"""The start of a run on a GPU: what the doctor says, and the choices, from the run folder, the cache or a trial.

It comes before jax starts on the card, because the trial needs the card and the allocator cannot change later. Nothing in it
can stop a run. On a CPU it does nothing, except that a run begun with choices that a CPU can make goes on with them.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from nanojax import config as configs
from nanojax import files, hardware, xla
from nanojax.card import advice, facts, machine, memory, trial
from nanojax.card.advice import Line
from nanojax.card.facts import Facts
from nanojax.card.questions import NO_GPU, PLAIN, Answer
from nanojax.card.trial import Found
from nanojax.cli import UserError, first_line
from nanojax.config import Compute, Config, Optim
from nanojax.plan import compile
from nanojax.run import run_folder

Say = Callable[[str], None]
# For a run from another run's config: the machine that trains it chooses again.
OF_THE_CARD = {f"compute.{key}": "auto" for key in PLAIN}


class Card(NamedTuple):
    """What a start asks of the machine. Tests give another."""

    here: Callable[[], bool] = xla.gpu_expected
    driver: Callable[[], bool] = hardware.nvidia_driver
    facts: Callable[[], Facts] = facts.gather
    asking: Callable[[Config], AbstractContextManager[trial.Ask]] = trial.asking
    take: memory.Take = memory.take


HERE = Card()


@dataclasses.dataclass(frozen=True)
class Started:
    """What the run goes on with: its config with concrete choices, and what machine.json says of them."""

    config: Config
    on_gpu: bool = False
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def lowered(self, before: Config, now: Config) -> "Started":
        """With the residuals that the run had to go down to, so that it finds them when it goes on."""
        pair = [before.compute.residuals, now.compute.residuals]
        return dataclasses.replace(self, config=now, record=self.record | {"residuals": pair})

    def records(self, step: int) -> list[dict[str, Any]]:
        """For metrics.jsonl."""
        if not self.on_gpu:
            return []
        kept = {key: self.record[key] for key in ("choices", "lines") if key in self.record}
        return [{"kind": "card", "step": step, **kept}]


def begin(config: Config, run: Path, card: Card = HERE, say: Say = print) -> Started:
    """Asks the card about `config`, says what is worth saying, and sets the allocator."""
    earlier = _earlier(run)
    kept = _kept(config, earlier, card.here())
    first = earlier is None and machine.read(run) == {}
    told: list[Line] = []
    seen = Facts()
    if card.driver():  # also where jax does not see the card: that is what is worth saying
        seen, told = _told(card)
        if first:
            for line in told:
                say(str(line))
    if not card.here():
        _check_without_gpu(config)
        return Started(configs.override(config, {f"compute.{key}": value for key, value in kept.items()}))
    config = _lowered(config, earlier, run)
    try:
        found = _as_begun(_found(config, seen, card, say), kept)
    except Exception as error:
        plain = {key: PLAIN[key] for key in PLAIN if getattr(config.compute, key) == "auto"}
        found = Found(plain | kept, lines=(f"the card could not be tried ({first_line(error)}); plain XLA is used",))
    if any(answer.why == NO_GPU for answer in found.answers):  # what else the trial says follows from that
        found = dataclasses.replace(found, lines=(f"the card could not be tried ({NO_GPU}); plain XLA is used",))
    config = configs.override(config, {f"compute.{key}": value for key, value in found.choices.items()})
    if xla.ALLOCATOR not in os.environ and found.allocator != "default":
        xla.use_allocator(found.allocator)
    for line in found.lines:
        say(line)
    record = machine.described(config, seen) | {"advice": [line._asdict() for line in told]}
    record |= {"choices": found.choices | {"allocator": found.allocator}, "lines": list(found.lines)}
    record |= {"answers": [answer._asdict() for answer in found.answers]}
    return Started(config, True, record)


def _check_without_gpu(config: Config) -> None:
    """UserError for a choice of compute that only an NVIDIA GPU can make."""
    here = config.without_gpu().compute
    for key in PLAIN:
        if (wanted := getattr(config.compute, key)) != getattr(here, key):
            raise UserError(
                f"--compute.{key}={wanted}: needs an NVIDIA GPU, and jax computes on none here; leave it at auto"
            )


def _earlier(run: Path) -> Config | None:
    """The config that the run was begun with, if it has a checkpoint that says so."""
    try:
        return run_folder.read_config(run) if run_folder.available(run) else None
    except (UserError, OSError):
        return None


def _kept(config: Config, earlier: Config | None, gpu: bool) -> dict[str, str]:
    """The choices of a run that has begun, for keys of compute that are auto now and that this machine can compute with."""
    if earlier is None:
        return {}
    there = earlier if gpu else earlier.without_gpu()
    values = {key: getattr(there.compute, key) for key in PLAIN if getattr(config.compute, key) == "auto"}
    return {key: value for key, value in values.items() if value != "auto"}


def _lowered(config: Config, earlier: Config | None, run: Path) -> Config:
    """`config` with the residuals that the run went down to, where the command still asks for what it began with."""
    if earlier and machine.read(run).get("residuals") == [config.compute.residuals, earlier.compute.residuals]:
        return configs.override(config, {"compute.residuals": earlier.compute.residuals})
    return config


def _as_begun(found: Found, kept: dict[str, str]) -> Found:
    """`found` with the choices of the run folder, which make a resumed run bit for bit, but for those that fail here."""
    failed = {answer.question for answer in found.answers if not answer.ok}
    stay = {key: value for key, value in kept.items() if f"{key}={value}" not in failed}
    others = [
        f"compute.{key}={value} stays, as the run began" for key, value in stay.items() if found.choices[key] != value
    ]
    return dataclasses.replace(found, choices=found.choices | stay, lines=(*found.lines, *others))


def _told(card: Card) -> tuple[Facts, list[Line]]:
    try:
        seen = card.facts()
        return seen, advice.worth_telling(advice.lines(seen))
    except Exception as error:  # a finding is never worth a run
        return Facts(), [Line("warning", "doctor", f"this machine could not be looked at ({first_line(error)})")]


def _found(config: Config, seen: Facts, card: Card, say: Say) -> Found:
    """The choices for this card, driver, jax and config: the cache's, or a trial's. The memory is tried each time."""
    path = xla.user_cache() / "card" / f"{key(config, seen)}.json"
    known, allocators = load(path), ["default", "cuda_async"]
    if known is None:
        say(
            "trying this config's kernels and memory on this card, once for each driver, jax and config: a few minutes ..."
        )
    elif known.allocator != "default":
        allocators.reverse()
    by_hand = os.environ.get(xla.ALLOCATOR)
    with card.asking(config) as ask:
        found = trial.choose(config, ask, [by_hand] if by_hand else allocators, known)
    if known is None and found.lasting:
        try:
            files.write_json(path, dataclasses.asdict(found) | {"answers": [a._asdict() for a in found.answers]})
        except (UserError, OSError) as error:
            say(f"warning: the choices are not kept for the next run ({error})")
    return found


def key(config: Config, seen: Facts) -> str:
    """A hash of all that the choices depend on. Of the optimizer nothing: the trial has no update."""
    plain = dataclasses.replace(config, optim=Optim())
    of_machine = [
        seen.card,
        seen.driver,
        seen.memory_total,
        seen.wsl2,
        os.environ.get(xla.ALLOCATOR),
        dict(seen.versions),
    ]
    sources = (*compile.STEP_SOURCES, "card/*.py", "plan/verify.py")
    return compile.key(plain, hardware.CARDS["rtx4070"], sources, of_machine)


def load(path: Path) -> Found | None:
    """What the cache has; None for what is absent, damaged or nonsense."""
    allowed = {name: get_args(hint) for name, hint in get_type_hints(Compute).items()}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        answers = tuple(Answer(**answer) for answer in table["answers"])
        found = Found(dict(table["choices"]), str(table["allocator"]), tuple(map(str, table["lines"])), answers)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    sound = set(found.choices) == set(PLAIN) and all(v in allowed[k] and v != "auto" for k, v in found.choices.items())
    return found if sound and found.allocator in xla.ALLOCATORS else None
