"""Puts a plan together: compiled step, memory, modelled time, energy, money; and finds what would make a config fit."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from nanojax.cli import UserError
from nanojax.config import Config, override, resolve
from nanojax.plan import compile, energy, memory, roofline
from nanojax.plan.cards import Card

Say = Callable[[str], None]


def _quiet(_: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of `config` takes on `card`. Times are modelled unless `measured`."""

    config: Config
    card: Card
    program: compile.Program
    memory: memory.Memory
    estimate: roofline.Estimate
    tokens_per_second: float
    bill: energy.Bill
    block_bits: tuple[float, float]  # step.block_bits
    measured: bool = False

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.card.budget_bytes

    @property
    def verdict(self) -> str:
        return memory.verdict(self.memory, self.card)[1]

    @property
    def summary(self) -> str:
        """One line, as the configs' docstrings carry it."""
        rate, days = self.tokens_per_second, self.bill.days
        speed = f"{rate / 1e3:.1f}k" if rate >= 1e3 else f"{rate:.0f}"
        length = f"{days:.0f} days" if days >= 10 else f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"
        word = "measured" if self.measured else "modelled"
        return f"plan ({self.card.key}): peak {self.memory.peak / memory.GIB:.1f} GiB, {speed} tok/s {word}, {length}"

    def as_json(self) -> dict[str, Any]:
        """Bytes, tokens, FLOPs, seconds; the keys that scripts read."""
        model, train, m = self.config.model, self.config.train, self.memory
        rate = "measured_tokens_per_second" if self.measured else "modelled_tokens_per_second"
        return {
            "config": self.config.name,
            "card": self.card.key,
            "parameters": model.parameters,
            "tokens_total": train.tokens,
            "tokens_per_step": train.tokens_per_step,
            "microbatch": train.microbatch,
            "residuals": self.config.compute.residuals,
            "flops_per_token": model.flops_per_token,
            "flops_total": model.flops_per_token * train.tokens,
            "peak_bytes": m.peak,
            "budget_bytes": self.card.budget_bytes,
            "fits": self.fits,
            "params_bytes": m.params,
            "opt_bytes": m.opt,
            "block_bits": self.block_bits[0],
            "remainder_bits": self.block_bits[1],
            "accum_bytes": m.accum,
            "residual_bytes": m.residuals,
            "temporary_bytes": m.temporaries,
            "argument_bytes": self.program.argument_bytes,
            "output_bytes": self.program.output_bytes,
            "alias_bytes": self.program.alias_bytes,
            "temp_bytes": self.program.temp_bytes,
            rate: self.tokens_per_second,
            "model_flops_per_second": self.tokens_per_second * model.flops_per_token,
            "seconds_per_step": train.tokens_per_step / self.tokens_per_second,
            "days": self.bill.days,
            "watts": self.bill.watts,
            "kwh": self.bill.kwh,
            "cost": self.bill.cost,
            "kernels": [dataclasses.asdict(k) for k in self.estimate.kernels[:20]],
            "time_by_kind": {kind: k.seconds for kind, k in self.estimate.by_kind().items()},
            "not_modelled": self.estimate.unknown,
            "compile_seconds": self.program.compile_seconds,
            "cached": self.program.cached,
        }


def make(
    config: Config,
    card: Card,
    *,
    cache: bool = True,
    watts: float | None = None,
    prices: dict[str, float] | None = None,
    efficiency: roofline.Efficiency | None = None,
    say: Say = _quiet,
) -> Plan:
    """The Plan of a resolved config on `card`; residuals "auto" become the best that fits.

    Args:
      watts: power while training; None = the card's limit.
      prices: money per kWh by currency; None = energy.PRICES.
      efficiency: measured shares of the card's peaks; None = the model's defaults.
      say: told what is being compiled.
    """
    if config.compute.residuals == "auto":
        return best_residuals_plan(config, card, cache, watts, prices, efficiency, say)
    say(f"compiling {config.name or 'the step'} for {card.key}: {_essence(config)}")
    program = compile.compile_step(config, card, cache)
    from nanojax import step  # imports jax, which must find the compiler set up

    measured = memory.measure(program, step.residual_bytes(config))
    estimate = roofline.estimate(program.hlo, card, efficiency)
    rate = config.train.tokens_per_step / estimate.seconds
    bill = energy.bill(config.train.tokens, rate, card.watts if watts is None else watts, prices)
    return Plan(config, card, program, measured, estimate, rate, bill, step.block_bits(config))


def _essence(config: Config) -> str:
    return f"microbatch {config.train.microbatch}, residuals {config.compute.residuals}"


# -- residuals ---------------------------------------------------------------------------------------------------------


def residual_ladder() -> list[str]:
    """Values of compute.residuals from the most memory to the least: each step down recomputes something more."""
    from nanojax.model.gpt import RESIDUALS

    names = [n for n in RESIDUALS if n != "mlp_hidden"]
    lean = [n for n in names if n != "qkv"]
    return ["all", "cheap", "+".join(lean), "inputs"]


def best_residuals(config: Config, card: Card, *, cache: bool = True, say: Say = _quiet) -> str:
    """The concrete compute.residuals with the most modelled tokens/s among those that fit `card`.

    UserError if none fits. Store the answer in the resolved config, so that a restart keeps it.
    """
    return best_residuals_plan(config, card, cache, None, None, None, say).config.compute.residuals


def best_residuals_plan(
    config: Config,
    card: Card,
    cache: bool,
    watts: float | None,
    prices: dict[str, float] | None,
    efficiency: roofline.Efficiency | None,
    say: Say,
) -> Plan:
    """The Plan of the best residuals. UserError if not even the leanest fit."""
    best: Plan | None = None
    last: Plan | None = None
    for choice in residual_ladder():
        trial = override(config, {"compute.residuals": choice})
        last = make(trial, card, cache=cache, watts=watts, prices=prices, efficiency=efficiency, say=say)
        if not last.fits:
            continue
        if best is not None and last.tokens_per_second <= best.tokens_per_second:
            break  # further down the ladder more is recomputed still
        best = last
    if best is None:
        assert last is not None
        raise UserError(
            f"--compute.residuals=auto: {last.verdict} even with block inputs only; "
            f"see what would fit: python -m nanojax.plan --config={config.name} --compute.residuals=inputs"
        )
    return best


# -- changes -----------------------------------------------------------------------------------------------------------


def changes(config: Config) -> list[dict[str, str]]:
    """Single changes that save memory, mildest first. Only those that differ from `config`."""
    rows, c, s, a = config.train.microbatch, config.compute, config.stored, config.accumulate
    out: list[dict[str, str]] = []
    while rows > 1:
        rows //= 2
        if config.train.tokens_per_step % (rows * config.model.T) == 0:
            out.append({"train.microbatch": str(rows)})
    ladder = residual_ladder()
    below = ladder[ladder.index(c.residuals) + 1 :] if c.residuals in ladder else ladder[-1:]
    out += [{"compute.residuals": choice} for choice in below if choice in ("cheap", "inputs")]
    if c.loss_chunk > 512 and (config.train.microbatch * config.model.T) % 512 == 0:
        out.append({"compute.loss_chunk": "512"})
    if s.adam != "int8":
        out.append({"stored.adam": "int8"})
    if a.embed_head == "f32":
        out.append({"accumulate.embed_head": "bf16"})
    if a.blocks == "f32":
        out.append({"accumulate.blocks": "bf16"})
    for part in ("momentum", "blocks", "embed", "head"):
        for form in {"f32": ("bf16", "int8"), "bf16": ("int8",)}.get(getattr(s, part), ()):
            out.append({f"stored.{part}": form})
    return out


def try_changes(
    plan: Plan, *, cache: bool = True, most: int = 4, say: Say = _quiet
) -> list[tuple[dict[str, str], Plan]]:
    """Changes that make a config fit that does not, each compiled to be sure, fastest first; [] if there is none.

    Single changes first, until `most` are found; where none is enough, the mildest combination, one change at a time.
    """

    def attempt(change: dict[str, str]) -> Plan | None:
        try:
            trial = resolve(override(plan.config, change))
        except UserError:  # a combination that the config's own rules forbid
            return None
        say(f"trying {' '.join(f'--{key}={value}' for key, value in change.items())}")
        return make(trial, plan.card, cache=cache, watts=plan.bill.watts)

    singles = changes(plan.config)
    found = []
    for change in singles:
        trial = attempt(change)
        if trial and trial.fits:
            found.append((change, trial))
            if len(found) == most:
                break
    if not found:
        together: dict[str, str] = {}
        for change in singles:
            together |= change  # a later value of the same key saves more
            trial = attempt(together)
            if trial and trial.fits:
                found.append((dict(together), trial))
                break
    return sorted(found, key=lambda item: -item[1].tokens_per_second)


def sweep(
    config: Config, card: Card, axes: Sequence[tuple[str, Sequence[str]]], *, cache: bool = True, say: Say = _quiet
) -> list[tuple[dict[str, str], Plan]]:
    """A Plan for every combination of `axes` (key, values), fitting ones first, fastest first."""
    out = []
    for values in itertools.product(*(v for _, v in axes)):
        change = {key: value for (key, _), value in zip(axes, values)}
        out.append((change, make(resolve(override(config, change)), card, cache=cache, say=say)))
    return sorted(out, key=lambda item: (not item[1].fits, -item[1].tokens_per_second))
