"""The memory bars, on XLA's own figures: every shipped config compiled for its card, which need not be there."""

import dataclasses
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers.paths import ROOT
from rich.console import Console

from nanojax import config as configs
from nanojax import config_files, config_rules, hardware, step, xla
from nanojax.config import Config
from nanojax.hardware import GIB
from nanojax.plan import compile, energy, planner, report, roofline

NO_COMPILER = pytest.mark.skipif(not xla.cuda_compiler_installed(), reason="the plan extra is not installed")
pytestmark = [pytest.mark.plan, NO_COMPILER]

# GiB at the peak that a config may need, and the least rows of a microbatch (T = 2048)
BARS = {"d32_4070_bf16": (10.5, 4), "d32_4070": (10.5, 1), "d32_4070_laptop": (6.8, 1), "d12_4070": (2.5, 1)}
# GiB at the peak and tokens/s, by our own roofline, of nanochat's recipe of July 2026
RECIPE_BARS = {"d24_2026_4070": (8.5, 20_500), "d28_2026_4070": (10.5, 13_700)}
PLAN_LINE = re.compile(
    r"plan \((?:\d+ x )?(?P<card>\w+)(?:, \w+)?\): peak (?P<gib>[\d.]+) GiB, (?P<rate>[\d.]+)(?P<k>k?) tok/s modelled, "
    r"(?P<time>[\d.]+) (?P<unit>days|hours)"
)
MODELLED = 9200  # tokens/s of d32_4070, by our own roofline
# At most 10.5 GiB, and 5 % slower than d32_4070 was when this bar was set. int8 has gained 1.6 % since, as its layers are no
# longer slices of stacks; below 8 bits they were not before, either.
LADDER = ["d32_4070_nf4", "d32_4070_int3_adamw8", "d32_4070_b2p67"]
INT8_THEN = 8147  # tokens/s
TRAFFIC = 260e3  # bytes per token and layer outside matmuls and attention, embedding, head and update included
# A config's tests stay in one worker, which compiles it once. Those without a bar take minutes together: slow.
GROUPS = {"d32_4070_15b": "d32_4070", "d32_4070_20b": "d32_4070"}  # the same step
one_worker = pytest.mark.xdist_group("small")  # these tests compile the same programs, 20 s each on one core


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrizes a test by config."""
    params = []
    for name in names:
        marks = [pytest.mark.xdist_group(GROUPS.get(name, name))] + [pytest.mark.slow] * (
            name not in BARS | RECIPE_BARS
        )
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", params)


FOR_A_CARD = [name for name in config_files.available() if re.search(r"_(\d+x)?(rtx)?[3-9]\d{3}|_h\d00", name)]


@functools.cache
def plan_of(name: str) -> planner.Plan:
    """The plan of a shipped config; compiled once, then from the cache."""
    return planner.make(config_files.load(name), hardware.card_of_config(name))


@pytest.mark.timed  # make bars runs it alone: another compilation beside it would be measured too
def test_the_command_answers_in_two_minutes_with_every_key(tmp_path: Path) -> None:
    """d32_4070 compiled afresh, --json: one JSON object on stdout with the keys that scripts read, within 120 s.

    What it compiled goes into the cache, for the other bars.
    """
    begin = time.monotonic()
    command = [sys.executable, "-m", "nanojax.plan", "--config=d32_4070", "--card=rtx4070", "--json"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # empty
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    took = time.monotonic() - begin
    shutil.copytree(tmp_path / "nanojax" / "plan", compile.cache_folder(), dirs_exist_ok=True)
    told = json.loads(done.stdout)
    keys = {"parameters", "tokens_total", "tokens_per_step", "flops_per_token", "peak_bytes", "temp_bytes"}
    keys |= {"residual_bytes", "alias_bytes", "modelled_tokens_per_second", "days", "kwh", "cost"}
    assert keys <= set(told)
    assert told["parameters"] == 1_879_048_192
    assert told["flops_per_token"] == 12_079_595_520
    assert told["days"] == pytest.approx(told["tokens_total"] / told["modelled_tokens_per_second"] / 86400)
    assert told["kwh"] == pytest.approx(told["days"] * 24 * 0.2)
    assert took < 120, f"{took:.0f} s"


@each(["d32_4070"])
def test_modelled_speed(name: str) -> None:
    """What d32 on the RTX 4070 is for: no change may make the compiled step slower than the bar."""
    assert plan_of(name).tokens_per_second >= MODELLED


@each(LADDER)
def test_below_8_bits(name: str) -> None:
    """Fewer bits fit the bar too, and decoding them costs at most 5 % of int8 storage's speed."""
    plan = plan_of(name)
    assert plan.memory.peak / GIB <= 10.5, plan.summary
    assert plan.tokens_per_second >= 0.95 * INT8_THEN, plan.summary


@each(RECIPE_BARS)
def test_the_newest_recipe(name: str) -> None:
    """d24 for GPT-2's CORE and d28 for d32's fit the card and reach the speed that their days are told by.

    Muon's update, Newton-Schulz included, takes less than 5% of the step. Three of four attentions, forward and backward,
    run in cuDNN with the recipe's window: 512 keys before the query's own.
    """
    plan = plan_of(name)
    gib, speed = RECIPE_BARS[name]
    assert plan.memory.peak / GIB <= gib and plan.tokens_per_second >= speed, plan.summary
    muon = sum(k.seconds for k in plan.estimate.kernels if "/muon" in k.op_name)
    assert 0 < muon < 0.05 * plan.estimate.seconds
    windows = re.findall(r'"sliding_window_length":\s*(\d+)', plan.program.hlo)
    assert windows.count("513") == 3 * windows.count("0") == 3 * plan.config.model.L // 2


@each(["d32_4070", *RECIPE_BARS])
def test_traffic(name: str) -> None:
    """What kernels that are neither matmul nor attention read and write in a step, by the compiled program."""
    plan = plan_of(name)
    moved = sum(k.bytes for k in plan.estimate.kernels if "matmul" not in k.kind and k.kind != "attention")
    assert moved / (plan.config.train.tokens_per_step * plan.config.model.L) <= TRAFFIC


@pytest.mark.slow  # two compilations of a minute each
@each(["d24_2026_4070", "d32_4070"])
def test_fine_tuning_fits_where_pretraining_does(name: str) -> None:
    """A step of conversations, with a weight per target, needs at most 0.3 GiB more than the config's own step."""
    card = hardware.card_of_config(name)
    plan = planner.make(config_files.load(name, ["--data.kind=conversations"]), card)
    assert plan.memory.peak <= plan_of(name).memory.peak + 0.3 * GIB, plan.summary


@each(BARS)
def test_memory_bar(name: str) -> None:
    """Peak as XLA's buffer assignment counts it, below the bar, at T = 2048 and the bar's microbatch."""
    plan = plan_of(name)
    gib, rows = BARS[name]
    assert plan.config.model.seq == 2048
    assert plan.config.train.microbatch >= rows
    assert plan.memory.peak / GIB <= gib, plan.summary


@each(FOR_A_CARD)
def test_config_fits_its_card(name: str) -> None:
    """Every config that names a card fits it, and the state is updated in place: all of it is aliased."""
    plan = plan_of(name)
    assert plan.fits, f"{plan.summary}: {plan.verdict}"
    assert plan.memory.not_reused == 0


@each(FOR_A_CARD)
def test_no_parameter_sized_temporary(name: str) -> None:
    """Temporaries that are not residuals stay below 0.15 of the parameters' bytes, as stored; of the ladder's lower rungs, in
    bf16: Newton-Schulz needs the same floats whatever a weight is stored in."""
    plan = plan_of(name)
    allowed = 0.15 * (plan.memory.params if name in BARS else 2 * plan.config.model.parameters)
    assert 0 < plan.memory.temporaries <= allowed, f"{plan.memory.largest}"


@each(FOR_A_CARD)
def test_docstring_tells_the_plan(name: str) -> None:
    """The docstring's `plan (card): peak .. GiB, .. tok/s modelled, .. days` is the planner's, to 3 %."""
    text = config_files.find(name).read_text()
    told = PLAN_LINE.search(text)
    plan = plan_of(name)
    assert told, f"{name}: its docstring lacks the line\n{plan.summary}"
    assert told["card"] == plan.card.key
    assert float(told["gib"]) == pytest.approx(plan.memory.peak / GIB, rel=0.03, abs=0.05), plan.summary
    rate, digit = float(told["rate"]) * (1000 if told["k"] else 1), 50 if told["k"] else 0.5
    assert rate == pytest.approx(plan.tokens_per_second, rel=0.03, abs=digit), plan.summary
    days = float(told["time"]) / (24 if told["unit"] == "hours" else 1)
    assert days == pytest.approx(plan.bill.days, rel=0.03, abs=0.5), plan.summary


@pytest.fixture(scope="module")
def small() -> Config:
    """A config that compiles in seconds, with the formats of the large ones."""
    changes = [
        "--model.depth=2",
        "--model.width=384",
        "--model.vocab=2048",
        "--model.seq=512",
        "--train.tokens_per_step=4096",
    ]
    changes += ["--train.microbatch=1", "--compute.loss_chunk=512"]
    return config_files.load("d32_4070", changes)


@one_worker
@pytest.mark.parametrize("key", ["rtx3060", "rtx4070", "h100", "rtx5070"])
def test_compiles_for_every_generation(small: Config, key: str) -> None:
    """XLA compiles the real step for Ampere, Ada, Hopper and Blackwell, flash attention and tensor cores included."""
    plan = planner.make(small, hardware.CARDS[key])
    assert "fmha" in plan.program.hlo
    assert {"attention", "int8 matmul"} <= set(plan.estimate.by_kind())
    assert plan.estimate.unknown == []
    assert plan.memory.not_reused == 0


@one_worker
def test_model_flops_are_within_the_compiled_ones(small: Config) -> None:
    """The roofline sees the FLOPs that the formula counts: at least the model's with causal attention counted half, at
    most 1.6 of it (recomputation, Newton-Schulz at this small batch)."""
    config = config_rules.resolve(configs.override(small, {"train.tokens_per_step": 65536}))
    plan = planner.make(config, hardware.CARDS["rtx4070"])
    m = config.model
    causal = m.flops_per_token - 6 * m.L * m.D * m.T
    seen = sum(k.flops for k in plan.estimate.kernels) / config.train.tokens_per_step
    assert causal <= seen <= 1.6 * causal


@one_worker
def test_more_kept_needs_more_memory(small: Config) -> None:
    """From everything over the cheap ones to block inputs only, each keeps less; the last exactly the inputs, to 1 %."""
    choices = ("all", "cheap", "inputs")
    plans = [
        planner.make(configs.override(small, {"compute.residuals": r}), hardware.CARDS["rtx4070"]) for r in choices
    ]
    kept = [p.memory.residuals for p in plans]
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] == pytest.approx(small.model.L * small.model.T * small.model.D * 2, rel=0.01)  # bf16


@one_worker
def test_bits_are_told(small: Config) -> None:
    """A plan shows and lists what a weight really takes, scales included: NF4 4.25 bits, and 2 of remainder."""
    config = configs.override(small, {"stored.blocks": "nf4", "stored.remainder": 2})
    plan, out = planner.make(config, hardware.CARDS["rtx4070"]), io.StringIO()
    report.show(plan, Console(file=out, width=160), {})
    report.show_table([plan], Console(file=out, width=160), {})
    assert re.search(
        r"block matrices +4\.25 +bits per weight, scales included, and 2 of remainders *\n", out.getvalue()
    )
    assert re.search(r" 4\.25\+2 ", out.getvalue())
    assert plan.as_json()["block_bits"] == 4.25 and plan.as_json()["remainder_bits"] == 2


@one_worker
def test_table_shows_every_config_whole(small: Config) -> None:
    """132 columns, what `--table` takes when piped, hold every cell of every shipped config uncut."""
    plan, out = planner.make(small, hardware.CARDS["rtx4070"]), io.StringIO()
    plan = dataclasses.replace(plan, tokens_per_second=335_861)  # demo's, the widest
    plans = []
    for name in config_files.available():
        config, card = config_files.load(name), hardware.card_of_config(name)
        bill = energy.bill(config.train.tokens, MODELLED / 2, card.watts)
        plans.append(dataclasses.replace(plan, config=config, card=card, bill=bill, block_bits=step.block_bits(config)))
    report.show_table(plans, Console(file=out, width=132), energy.PRICES)
    assert "…" not in out.getvalue()  # rich's mark where it cut a cell
    assert all(f" {p.config.name} " in out.getvalue() for p in plans)


@one_worker
def test_auto_residuals_become_concrete(small: Config, caplog: pytest.LogCaptureFixture) -> None:
    """`auto` on a card with room keeps what is fastest, and the plan's config says what that is."""
    card = hardware.CARDS["rtx4070"]
    plan = planner.make(configs.override(small, {"compute.residuals": "auto"}), card)
    best = planner.best_residuals(small, card).config.compute.residuals
    assert plan.config.compute.residuals == best in planner.residual_ladder()
    assert not caplog.records  # XLA and jax stay silent


@one_worker
def test_changes_are_found_for_a_card_that_is_too_small(small: Config) -> None:
    """A budget just below the peak: what is offered was compiled, fits, and changes the config."""
    card = hardware.CARDS["rtx4070"]
    config = config_rules.resolve(configs.override(small, {"train.microbatch": 4, "compute.held": 0}))
    whole = planner.make(config, card)
    tight = dataclasses.replace(card, reserve_gib=card.memory_mib / 1024 - 0.9 * whole.memory.peak / GIB)
    plan = planner.make(config, tight)
    assert not plan.fits
    found = planner.try_changes(plan, most=2)
    assert found and all(p.fits and p.memory.peak < plan.memory.peak for _, p in found)
    assert {"train.microbatch": "1"} in [c for c, _ in found] and planner.changes(small)[0] == {"compute.held": "0"}


@one_worker
def test_what_was_compiled_is_cached(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second plan comes from the cache, is equal, and is fast; --no-cache keeps nothing."""
    card = hardware.CARDS["rtx4070"]
    program = dataclasses.replace(planner.make(small, card).program, cached=False)
    monkeypatch.setattr(compile, "compile_for", lambda *_, **__: program)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planner.make(small, card, cache=False)
    assert not list(tmp_path.rglob("*.gz"))
    first = planner.make(small, card)
    begin = time.monotonic()
    second = planner.make(small, card)
    assert time.monotonic() - begin < 5
    assert (first.program.cached, second.program.cached) == (False, True)
    assert first.as_json() | {"cached": 0} == second.as_json() | {"cached": 0}


def on_two(name: str, **changes: str) -> planner.Plan:
    config = config_rules.resolve(configs.override(config_files.load(name), {"parallel.devices": "2", **changes}))
    return planner.make(config, hardware.CARDS["rtx4070"], link=hardware.LINKS["10GbE"])


@pytest.mark.slow  # two compilations of two minutes
@pytest.mark.xdist_group("d32_4070")
def test_two_cards() -> None:
    """d32 on two cards: each has half of the optimizer's arrays less than one alone, to 0.02 GiB, so that no second copy of the
    parameters or sums is held. 2^19 tokens per step at 97% on PCIe 4 and 90% on 10 GbE. What is sent is half of the gradients'
    sums and half of the stored parameters, once per step (1%): nothing else is exchanged."""
    one, plan = plan_of("d32_4070"), on_two("d32_4070")
    assert plan.memory.peak <= one.memory.peak - one.memory.opt / 2 + 0.02 * GIB and plan.memory.not_reused == 0
    assert plan.efficiency >= 0.90 and planner.advice(plan) is None
    pcie = roofline.estimate(plan.program.hlo, plan.card, link=hardware.LINKS["pcie4"])
    assert pcie.communication[0] / pcie.seconds <= 0.03
    assert plan.estimate.communication[1] == pytest.approx((plan.memory.accum + plan.memory.params) / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.xdist_group("d32_4070")
def test_two_cards_in_the_least_memory() -> None:
    """Without what d32_4070 holds for speed alone, two cards need 8.6 GiB each."""
    plan = on_two("d32_4070", **{"compute.held": "0", "compute.head": "float"})
    assert plan.memory.peak <= 8.6 * GIB and plan.efficiency >= 0.90, plan.summary


@pytest.mark.slow
@pytest.mark.xdist_group("d32_2026_2x4070")
def test_the_newest_d32_on_two_cards() -> None:
    """d32 of July 2026, 2.82 B parameters, which one card of 12 GB has no room for: 97% on PCIe 4, and each card fits."""
    plan = plan_of("d32_2026_2x4070")
    assert plan.config.model.parameters == 2_818_575_450 and plan.cards == 2
    assert plan.fits and plan.efficiency >= 0.97, plan.summary


def test_a_slow_link_is_told(small: Config) -> None:
    """A tiny model on 10 GbE waits for most of its time; the plan says so, and a step that is large enough."""
    config = config_rules.resolve(configs.override(small, {"parallel.devices": "2"}))
    plan = planner.make(config, hardware.CARDS["rtx4070"], link=hardware.LINKS["10GbE"])
    told = planner.advice(plan)
    assert told and "10 Gbit Ethernet is slow" in told and plan.as_json()["advice"] == told
    larger = int(re.search(r"tokens_per_step=(\d+)", told)[1])  # pyright: ignore[reportOptionalSubscript]
    seconds, _ = plan.estimate.communication
    computing = (plan.estimate.seconds - seconds) * larger / config.train.tokens_per_step
    assert 0.9 <= computing / (computing + seconds) < 0.96
