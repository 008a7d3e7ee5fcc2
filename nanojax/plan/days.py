"""The best model of nanochat's recipe of July 2026 that a card trains in a given time.

Depth is the one dial: from it follow width, speed and memory, and from the speed the tokens that the time pays for. A
depth's speed is first estimated from the FLOP/s of the compiled depth nearest to it, and only what is shown is compiled.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

from nanojax import config as configs
from nanojax import config_files, weights
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.hardware import Card
from nanojax.plan import compile, core_of_flops, energy, planner
from nanojax.plan.core_of_flops import Core
from nanojax.plan.planner import Plan, Say

BASE = "d24_2026_4070"  # every model is this config with other keys, so that a command line can name it
RATIOS = (8.0, 12.0)  # nanochat's leaderboard and its depth ladder; its measured optima, 8.2 to 11.2, lie between
LEAST_RATIO = 4.0  # of a model that is shown: half of the least published
LEAST_DEPTH = 8  # even depths only: their width is 64 per layer exactly
LONGEST = 365.0  # days
SHOWN = 3
# Where the search starts, as a share of the card's int8 peak. By the model d20 to d28 reach 0.36 to 0.42.
FIRST_SHARE = 0.37


@dataclasses.dataclass(frozen=True)
class Choice:
    """A model that trains in the time, with the keys of `BASE` that make it, and CORE of published runs at its FLOPs."""

    keys: dict[str, Any]
    plan: Plan
    core: Core

    @property
    def depth(self) -> int:
        return self.plan.config.model.depth

    @property
    def ratio(self) -> float:
        return self.plan.config.train.ratio

    @property
    def flops(self) -> float:
        return self.plan.config.model.flops_per_token * self.plan.config.train.tokens

    @property
    def usual(self) -> bool:
        """Whether the ratio is one at which runs were published; CORE is theirs only then."""
        return RATIOS[0] <= self.ratio <= RATIOS[1]

    @property
    def arguments(self) -> str:
        """What follows `python -m nanojax.train` or `python -m nanojax.plan`."""
        return " ".join([f"--config={BASE}", *_overrides(self.keys)])

    def as_json(self) -> dict[str, Any]:
        """The plan for scripts, with its depth, ratio, CORE and command."""
        core = {
            "core": self.core.value,
            "core_range": [self.core.low, self.core.high],
            "core_extrapolated": self.core.extrapolated,
            "ratio_published": self.usual,
        }
        own = {"depth": self.depth, "ratio": self.ratio}
        return own | core | {"command": f"python -m nanojax.train {self.arguments}"} | self.plan.as_json()


def best(days: float, card: Card, *, prices: dict[str, float] | None = None, **options: Any) -> list[Choice]:
    """Up to SHOWN models that `card` trains in `days`, the best first, and at the end one that proved too large for it.

    The best has a ratio within RATIOS, or the one nearest to it. Published runs do not tell depths within it apart, so the
    one with more FLOPs comes first.

    Args:
      prices: as for planner.make.
      options: the others of planner.make.

    Raises:
      UserError: `days` is not a possible time, or the smallest model needs more of it, or more memory than `card` has.
    """
    check(days, card)
    compile.start_compiler()
    search = _Search(days, card, {"prices": prices, **options})
    while missing := [depth for depth in search.order()[:SHOWN] if depth not in search.compiled]:
        search.compile(missing[0])
    fitting = [depth for depth in search.order() if depth in search.compiled][:SHOWN]
    if not fitting:
        raise UserError(f"--card={card.key}: the smallest model, d{LEAST_DEPTH}, does not fit its memory")
    too_large = [depth for depth, (_, plan) in search.compiled.items() if not plan.fits]
    return [search.choice(depth) for depth in (*fitting, *sorted(too_large)[:1])]


def check(days: float, card: Card) -> None:
    """UserError if no model can be trained in `days`, as far as that is known before anything is compiled."""
    if not 0 < days <= LONGEST:
        raise UserError(f"--days={days:g}: must be more than 0 and at most {LONGEST:g}")
    smallest = _config({"model.depth": LEAST_DEPTH, "train.ratio": RATIOS[0]})
    least = smallest.train.tokens * smallest.model.flops_per_token / card.peak("int8") / energy.DAY
    if days < least:
        raise _too_short(days, card, f"more than {least:.1g}")


def _too_short(days: float, card: Card, need: str) -> UserError:
    return UserError(
        f"--days={days:g}: too short; the smallest model, d{LEAST_DEPTH} at ratio {RATIOS[0]:g}, needs {need} days "
        f"on {card.key}"
    )


class _Search:
    """What is known so far: the keys and the plan of each compiled depth."""

    def __init__(self, days: float, card: Card, options: dict[str, Any]) -> None:
        self.days, self.card, self.options = days, card, options
        self.say: Say = options.get("say") or (lambda _: None)
        self.compiled: dict[int, tuple[dict[str, Any], Plan]] = {}

    def order(self) -> list[int]:
        """The depths that may fit, the best first."""
        return sorted(self._depths(), key=lambda depth: (_outside(self._ratio(depth)), -self._flops_per_second(depth)))

    def _depths(self) -> Iterator[int]:
        """From the smallest to the largest that fits and gets LEAST_RATIO."""
        for depth in itertools.count(LEAST_DEPTH, 2):
            if depth in self.compiled:
                fits = self.compiled[depth][1].fits
            else:
                fits = _state_bytes(depth) <= self.card.budget_bytes
            if not fits or (depth > LEAST_DEPTH and self._ratio(depth) < LEAST_RATIO):
                return
            yield depth

    def compile(self, depth: int) -> None:
        """Adds the plan of `depth`. UserError if it is the smallest and takes longer than there is."""
        self.say(f"d{depth}: about ratio {self._ratio(depth):.1f} in {self.days:g} days; compiling")
        self.compiled[depth] = _fit(depth, self.card, self.options)
        plan, ratio = self.compiled[depth][1], self._ratio(depth)
        self.say(f"d{depth}: {plan.tokens_per_second:,.0f} tokens/s modelled, ratio {ratio:.1f}, {plan.verdict}")
        if depth == LEAST_DEPTH and ratio < RATIOS[0]:
            raise _too_short(self.days, self.card, f"{self.days * RATIOS[0] / ratio:.2g}")

    def choice(self, depth: int) -> Choice:
        """The compiled `depth` with the tokens that the time pays for."""
        keys, plan = self.compiled[depth]
        ratio = math.floor(self._ratio(depth) * 100) / 100  # rounded down, so that the time is kept
        keys = {"model.depth": depth, "train.ratio": ratio, **keys, "train.run": f"runs/d{depth}_{self.days:g}_days"}
        config = _config(keys)
        bill = energy.bill(config.train.tokens, plan.tokens_per_second, plan.bill.watts, self.options["prices"])
        plan = dataclasses.replace(plan, config=config, bill=bill)
        return Choice(keys, plan, core_of_flops.core(config.model.flops_per_token * config.train.tokens))

    def _flops_per_second(self, depth: int) -> float:
        """Of the compiled depth nearest to this one."""
        if not self.compiled:
            return FIRST_SHARE * self.card.peak("int8")
        near = min(self.compiled, key=lambda other: abs(other - depth))
        return self.compiled[near][1].tokens_per_second * _model(near).flops_per_token

    def _ratio(self, depth: int) -> float:
        """Tokens per scaling parameter that the time pays for."""
        model = _model(depth)
        tokens = self._flops_per_second(depth) / model.flops_per_token * self.days * energy.DAY
        return tokens / weights.scaling_parameters(model)


def _outside(ratio: float) -> float:
    """How far a ratio lies from RATIOS, as a logarithm; 0 within."""
    return max(0.0, math.log(RATIOS[0] / ratio), math.log(ratio / RATIOS[1]))


INT8_TABLES = {"stored.value": "int8"}
LEANEST = INT8_TABLES | {"compute.residuals": "inputs"}


def _fit(depth: int, card: Card, options: dict[str, Any]) -> tuple[dict[str, Any], Plan]:
    """The keys and the plan of `depth` that fit `card` at the least loss of quality and speed; else the leanest plan.

    First as in BASE, then with value tables in int8, then with the residuals that planner.best_residuals chooses.
    """
    for keys in ({}, INT8_TABLES):
        config = _config({"model.depth": depth, **keys})
        if compile.least_bytes(config) <= card.budget_bytes:
            plan = planner.make(config, card, **options)
            if plan.fits:
                return keys, plan
    config = _config({"model.depth": depth, **LEANEST})
    plan = planner.make(config, card, **options)
    if plan.fits:
        plan = planner.best_residuals(config, card, **options)
    return INT8_TABLES | {"compute.residuals": plan.config.compute.residuals}, plan


def _overrides(keys: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def _config(keys: dict[str, Any]) -> Config:
    return config_files.load(BASE, _overrides(keys))


@functools.cache
def _model(depth: int) -> configs.Model:
    return _config({"model.depth": depth}).model


@functools.cache
def _state_bytes(depth: int) -> int:
    return compile.state_bytes(_config({"model.depth": depth, **INT8_TABLES}))
