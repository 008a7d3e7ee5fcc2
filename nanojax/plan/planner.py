"""Makes a plan: compiled step, memory, modelled time, energy, money. Finds what fits a card, and what would."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from nanojax import hardware, weights, xla
from nanojax.cli import UserError
from nanojax.config import Config, override
from nanojax.config_rules import resolve
from nanojax.hardware import GIB, LINKS, Card, Link
from nanojax.plan import compile, energy, roofline

Say = Callable[[str], None]


def _quiet(_: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of `config` needs on `card`. Times are modelled unless `measured`."""

    config: Config
    card: Card
    program: compile.Program
    memory: compile.Memory
    estimate: roofline.Estimate
    tokens_per_second: float
    bill: energy.Bill
    block_bits: tuple[float, float]  # step.block_bits
    measured: bool = False
    link: Link | None = None  # of several cards; program, memory and estimate are one card's

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.card.budget_bytes

    @property
    def cards(self) -> int:
        return self.config.devices

    @property
    def efficiency(self) -> float:
        """The share of a step's time in which cards do not wait for each other's bytes."""
        return 1 - self.estimate.communication[0] / self.estimate.seconds

    @property
    def verdict(self) -> str:
        return compile.verdict(self.memory, self.card)[1]

    @property
    def summary(self) -> str:
        """One line, the form in the configs' docstrings."""
        rate, days = self.tokens_per_second, self.bill.days
        speed = f"{rate / 1e3:.1f}k" if rate >= 1e3 else f"{rate:.0f}"
        length = f"{days:.0f} days" if days >= 10 else f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"
        word = "measured" if self.measured else "modelled"
        cards = f"{self.cards} x {self.card.key}, {self.link.key}" if self.link else self.card.key
        return f"plan ({cards}): peak {self.memory.peak / GIB:.1f} GiB, {speed} tok/s {word}, {length}"

    def as_json(self) -> dict[str, Any]:
        """The plan for scripts: bytes, tokens, FLOPs, seconds."""
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
            "operand_bytes": m.operands,
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
        } | (self._link_as_json() if self.link else {})

    def _link_as_json(self) -> dict[str, Any]:
        """What several cards add. Bytes elsewhere are one card's, tokens, watts and money those of all."""
        seconds, sent = self.estimate.communication
        told = {"cards": self.cards, "link": self.link.key if self.link else None, "sent_bytes": sent}
        return told | {"communication_seconds": seconds, "efficiency": self.efficiency, "advice": advice(self)}


def make(
    config: Config,
    card: Card,
    *,
    cache: bool = True,
    watts: float | None = None,
    prices: dict[str, float] | None = None,
    efficiency: roofline.Efficiency | None = None,
    link: Link = LINKS["pcie4"],
    say: Say = _quiet,
) -> Plan:
    """The Plan of a resolved config on `card`; compute.residuals=auto becomes the best that fits.

    On as many such cards as the config's parallel.devices.

    Args:
      cache: take a compiled step from the user's cache folder, and keep it there.
      watts: power while training; None: the card's limit.
      prices: money per kWh by currency; None: energy.PRICES.
      efficiency: measured shares of the card's peaks; None: the model's defaults.
      link: what joins several cards.
      say: called with a line before each compilation.
    """
    compile.start_compiler()
    if config.compute.residuals == "auto":
        options: dict[str, Any] = dict(
            cache=cache, watts=watts, prices=prices, efficiency=efficiency, link=link, say=say
        )
        return best_residuals(config, card, **options)
    several = f"{config.devices} x " if config.several else ""
    say(f"compiling {config.name or 'the step'} for {several}{card.key}: {_essence(config)}")
    program = compile.compile_step(config, card, cache)
    from nanojax import step  # imports jax, after the compiler is set up

    within = step.accumulator_bytes(config) if config.several else 0
    measured = compile.memory_of(program, step.residual_bytes(config), step.operand_bytes(config), within)
    joined = link if config.several else None
    estimate = roofline.estimate(program.hlo, card, efficiency, joined)
    rate = config.train.tokens_per_step / estimate.seconds
    power = config.devices * (card.watts if watts is None else watts)
    bill = energy.bill(config.train.tokens, rate, power, prices)
    return Plan(config, card, program, measured, estimate, rate, bill, step.block_bits(config), link=joined)


SLOW_LINK = 0.9  # efficiency below which a link is called too slow


def advice(plan: Plan) -> str | None:
    """What would help where cards wait for each other for more than a tenth of a step; None where they do not."""
    if plan.link is None or plan.efficiency >= SLOW_LINK:
        return None
    seconds, _ = plan.estimate.communication
    times = math.ceil(seconds / (plan.estimate.seconds - seconds) * SLOW_LINK / (1 - SLOW_LINK))
    larger = 2 ** math.ceil(math.log2(times)) * plan.config.train.tokens_per_step
    helps = [f"--train.tokens_per_step={larger} (fewer exchanges of as many bytes)"]
    if plan.config.accumulate.blocks == "f32":
        helps.append("--accumulate.blocks=bf16 (half the bytes of gradients)")
    if plan.config.stored.blocks in ("f32", "bf16"):
        helps.append("--stored.blocks=int8 (fewer bytes of new weights)")
    return f"{plan.link.name} is slow for this: cards wait {1 - plan.efficiency:.0%} of the time; {'; or '.join(helps)}"


def _essence(config: Config) -> str:
    return f"d{config.model.depth}, microbatch {config.train.microbatch}, residuals {config.compute.residuals}"


# -- residuals ---------------------------------------------------------------------------------------------------------


def residual_ladder() -> list[str]:
    """Values of compute.residuals, the most memory first; each recomputes something that the one before keeps."""
    from nanojax.model.gpt import RESIDUALS

    names = [n for n in RESIDUALS if n != "mlp_hidden"]
    lean = [n for n in names if n != "qkv"]
    return ["all", "cheap", "+".join(lean), "inputs"]


def best_residuals(config: Config, card: Card, **options: Any) -> Plan:
    """The Plan with the compute.residuals that give the most modelled tokens/s among those that fit `card`.

    A run stores the choice (`.config.compute.residuals`) in its config, so that a restart keeps it.

    Args:
      options: as for `make`.

    Raises:
      UserError: none fits.
    """
    best: Plan | None = None
    last: Plan | None = None
    for choice in residual_ladder():
        last = make(override(config, {"compute.residuals": choice}), card, **options)
        if not last.fits:
            continue
        if best is not None and last.tokens_per_second <= best.tokens_per_second:
            break  # the choices below recompute even more
        best = last
    if best is None:
        assert last is not None
        raise UserError(
            f"--compute.residuals=auto: {last.verdict} even with block inputs only; "
            f"see what would fit: python -m nanojax.plan --config={config.name} --compute.residuals=inputs"
        )
    return best


# -- training on this machine ------------------------------------------------------------------------------------------


def card_here(limit_bytes: int | None) -> Card:
    """The Card of this machine's GPU, for compute.residuals=auto.

    Args:
      limit_bytes: XLA's pool, which becomes the card's budget; None: the budget in hardware.py.

    Raises:
      UserError: there is no NVIDIA GPU or no CUDA compiler here, or hardware.py does not know the GPU.
    """
    reading = hardware.read_gpu()
    if reading is None:
        raise UserError("--compute.residuals=auto: there is no NVIDIA GPU here to fit; choose inputs, cheap or all")
    if not xla.cuda_compiler_installed():
        raise UserError("--compute.residuals=auto: jax's CUDA plugin is not installed; choose inputs, cheap or all")
    for card in hardware.CARDS.values():
        if card.name == reading.name:
            if limit_bytes is None:
                return card
            return dataclasses.replace(card, reserve_gib=card.memory_mib / 1024 - limit_bytes / GIB)
    raise UserError(
        f"--compute.residuals=auto: {reading.name} is not in {hardware.__file__}; add it, or choose inputs, cheap or all"
    )


def check(compiled: Any, config: Config, limit_bytes: int | None) -> str:
    """The memory line of a compiled train step.

    Args:
      compiled: jax.stages.Compiled of a step that donates its state.
      limit_bytes: xla.pool_bytes().

    Raises:
      UserError: it needs more than `limit_bytes`. To be called before a state exists.
    """
    state, peak = compiled.memory_analysis().alias_size_in_bytes, xla.peak_bytes(compiled)
    line = f"memory: state {state / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB"
    if limit_bytes is None:
        return line
    if peak > limit_bytes:
        raise UserError(
            f"{config.name or 'this config'} needs {peak / GIB:.2f} GiB on the GPU, XLA has {limit_bytes / GIB:.2f}; "
            "close other programs that use the GPU, lower train.microbatch, or choose --compute.residuals=inputs; "
            f"python -m nanojax.plan --config={config.name or 'NAME'} tries what fits"
        )
    return f"{line} of XLA's {limit_bytes / GIB:.2f}"


# -- changes -----------------------------------------------------------------------------------------------------------


def changes(config: Config) -> list[dict[str, str]]:
    """Single changes to `config` that save memory, mildest first."""
    rows, c, s, a = config.train.microbatch, config.compute, config.stored, config.accumulate
    out: list[dict[str, str]] = [{"compute.held": "0"}] if c.held else []
    while rows > 1:
        rows //= 2
        if config.train.tokens_per_step % (rows * config.row) == 0:
            out.append({"train.microbatch": str(rows)})
    ladder = residual_ladder()
    below = ladder[ladder.index(c.residuals) + 1 :] if c.residuals in ladder else ladder[-1:]
    out += [{"compute.residuals": choice} for choice in below if choice in ("cheap", "inputs")]
    if c.loss_chunk > 512 and (config.train.microbatch * config.row) % 512 == 0:
        out.append({"compute.loss_chunk": "512"})
    if s.adam != "int8":
        out.append({"stored.adam": "int8"})
    if a.embed_head == "f32":
        out.append({"accumulate.embed_head": "bf16"})
    if a.blocks == "f32":
        out.append({"accumulate.blocks": "bf16"})
    tables = ("value",) if any(w.stored == "value" for w in weights.table(config.model).values()) else ()
    for part in (*tables, "momentum", "blocks", "embed", "head"):
        for form in {"f32": ("bf16", "int8"), "bf16": ("int8",)}.get(getattr(s, part), ()):
            out.append({f"stored.{part}": form})
    return out


def try_changes(
    plan: Plan, *, cache: bool = True, most: int = 4, say: Say = _quiet
) -> list[tuple[dict[str, str], Plan]]:
    """Changes that make the plan's config fit, each compiled, the fastest first; [] if there is none.

    Tries single changes until `most` of them fit. If none does, adds one change after another, mildest first.
    """

    def attempt(change: dict[str, str]) -> Plan | None:
        try:
            trial = resolve(override(plan.config, change))
        except UserError:  # the config's rules forbid it
            return None
        say(f"trying {' '.join(f'--{key}={value}' for key, value in change.items())}")
        link = plan.link or LINKS["pcie4"]
        return make(trial, plan.card, cache=cache, watts=plan.bill.watts / plan.cards, link=link)

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
    config: Config, card: Card, axes: Sequence[tuple[str, Sequence[str]]], **options: Any
) -> list[tuple[dict[str, str], Plan]]:
    """A Plan for every combination of `axes` (key, values): those that fit first, then by speed.

    Args:
      options: as for `make`.
    """
    out = []
    for values in itertools.product(*(v for _, v in axes)):
        change = {key: value for (key, _), value in zip(axes, values)}
        out.append((change, make(resolve(override(config, change)), card, **options)))
    return sorted(out, key=lambda item: (not item[1].fits, -item[1].tokens_per_second))
