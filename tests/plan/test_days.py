"""The best model for a time, with a planner of known speed and memory; CORE by FLOPs; the command."""

import io
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from nanojax import cli, config_files, hardware, weights, xla
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.hardware import GIB, Card
from nanojax.plan import __main__, compile, core_of_flops, days, energy, planner, report, roofline

CARD = hardware.CARDS["rtx4070"]
SPEED = 60e12  # FLOP/s of the planner that stands in, at every depth unless a test says otherwise
Peak = Callable[[Config], float]
ROW = re.compile(r"^ *d(\d+) ")


def gib_by_depth(config: Config) -> float:
    """A peak that grows as the model does; int8 tables save a tenth, leaner residuals a twentieth of it."""
    peak = 5.2 * config.model.parameters / 1e9
    return peak * (0.9 if config.stored.value == "int8" else 1) * (0.95 if config.compute.residuals != "all" else 1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Config]]:
    """Replaces the compiler; returns the list of configs that are then compiled."""

    def replace(peak: Peak = gib_by_depth, speed: Callable[[int], float] = lambda depth: SPEED) -> list[Config]:
        seen: list[Config] = []

        def make(
            config: Config, card: Card, *, watts: float | None = None, prices: Any = None, **_: Any
        ) -> planner.Plan:
            seen.append(config)
            size = int(peak(config) * GIB)
            rate = speed(config.model.depth) / config.model.flops_per_token
            rate *= 1 if config.compute.residuals == "all" else 0.9 if config.compute.residuals == "cheap" else 0.8
            bill = energy.bill(config.train.tokens, rate, card.watts if watts is None else watts, prices)
            memory = compile.Memory(size, 0, 0, 0, 0, 0, 0, size, 0, ())
            program = compile.Program("", size, size, size, 0, {}, (), 0.0)
            return planner.Plan(config, card, program, memory, roofline.Estimate([], []), rate, bill, (8.0, 0.0))

        monkeypatch.setattr(compile, "start_compiler", lambda: None)
        monkeypatch.setattr(planner, "make", make)
        monkeypatch.setattr(days, "_state_bytes", lambda depth: int(0.5 * GIB * depth / 8))
        monkeypatch.setattr(compile, "least_bytes", lambda config: 0)
        return seen

    return replace


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The command's stdout."""
    monkeypatch.setattr(sys, "argv", ["nanojax.plan", *arguments])
    cli.run_main(__main__.main)
    return capsys.readouterr().out


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.5, 1, 2, 3.5, 5, 7, 10])
def test_the_best_ratio_is_as_published(fake: Callable, budget: float) -> None:
    """Of all even depths none is nearer to ratios 8 to 12 than the first; its tokens fill the time and keep it.

    Computed apart: ratio = FLOP/s x seconds / FLOPs per token / scaling parameters.
    """
    fake(peak=lambda config: 1.0)
    first = days.best(budget, CARD)[0]
    outside = {}
    for depth in range(8, 60, 2):
        model = config_files.load(days.BASE, [f"--model.depth={depth}"]).model
        ratio = SPEED * budget * 86400 / model.flops_per_token / weights.scaling_parameters(model)
        outside[depth] = math.log(max(1, 8 / ratio, ratio / 12))
    assert outside[first.depth] == min(outside.values())
    step = first.plan.config.train.tokens_per_step / first.plan.tokens_per_second / 86400
    rounding = 0.01 * weights.scaling_parameters(first.plan.config.model) / first.plan.tokens_per_second / 86400
    assert budget - step - rounding <= first.plan.bill.days <= budget


def test_only_what_is_shown_is_compiled_when_the_speed_is_foreseen(fake: Callable) -> None:
    """At one FLOP/s for all depths the first compilation foresees the others: three shown, at most four compiled."""
    seen = fake(peak=lambda config: 1.0)
    choices = days.best(7, CARD)
    assert len(choices) == days.SHOWN
    assert len({config.model.depth for config in seen}) == len(seen) <= days.SHOWN + 1


def test_a_first_guess_that_is_far_off_is_mended(fake: Callable) -> None:
    """A card ten times slower than guessed, deeper models faster than shallow ones: the same choice as with every depth known."""
    speed = lambda depth: 4e12 * depth / 12
    fake(peak=lambda config: 1.0, speed=speed)
    first = days.best(20, CARD)[0]
    ratios = {}
    for depth in range(8, 60, 2):
        model = config_files.load(days.BASE, [f"--model.depth={depth}"]).model
        ratios[depth] = speed(depth) * 20 * 86400 / model.flops_per_token / weights.scaling_parameters(model)
    nearest = min(ratios, key=lambda depth: math.log(max(1, 8 / ratios[depth], ratios[depth] / 12)))
    assert first.depth == nearest and first.ratio == pytest.approx(ratios[nearest], abs=0.011)


def test_memory_is_saved_by_tables_then_residuals_before_depth(fake: Callable) -> None:
    """A depth above the budget gets int8 tables; if that is too little, fewer residuals, of which the fastest that fit."""
    fits_at = {24: ("bf16", "all"), 26: ("int8", "all"), 28: ("int8", "cheap"), 30: ("", "")}

    def peak(config: Config) -> float:
        tables, residuals = fits_at.get(config.model.depth, ("bf16", "all"))
        lean = residuals == "cheap" and config.compute.residuals != "all"
        enough = config.stored.value == tables or tables == "bf16"
        return 9.0 if enough and (lean or config.compute.residuals == residuals) else 11.0

    fake(peak=peak)
    found = {choice.depth: choice for choice in days.best(30, CARD)}
    assert [d for d, choice in found.items() if not choice.plan.fits] == [30] == [list(found)[-1]]
    for depth in (24, 26, 28):
        config = found[depth].plan.config
        assert (config.stored.value, config.compute.residuals) == fits_at[depth]


def test_a_small_card_gets_the_deepest_that_fits(fake: Callable) -> None:
    """With time for a deeper model than memory allows, the deepest that fits leads, and the page says why it stops there."""
    fake()
    card = hardware.CARDS["rtx4070_laptop"]
    choices = days.best(60, card)
    fitting = [choice for choice in choices if choice.plan.fits]
    assert choices[0].depth == max(choice.depth for choice in fitting)
    assert choices[0].ratio > 12 and not choices[0].usual
    assert all(choice.plan.memory.peak <= card.budget_bytes for choice in fitting)
    assert "No deeper model fits rtx4070_laptop" in page(choices)


def test_a_state_beyond_the_card_is_not_compiled(fake: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depths whose state alone exceeds the card are known without the compiler."""
    seen = fake(peak=lambda config: 1.0)
    monkeypatch.setattr(days, "_state_bytes", lambda depth: (depth > 20) * 100 * GIB)
    assert days.best(30, CARD)[0].depth == 20
    assert max(config.model.depth for config in seen) == 20


@pytest.mark.parametrize("known_without_compiling", [True, False])
def test_a_card_for_no_model(fake: Callable, monkeypatch: pytest.MonkeyPatch, known_without_compiling: bool) -> None:
    """If not even the smallest fits, by its state or by its compiled peak: one line, no command that cannot run."""
    fake(peak=lambda config: 100.0)
    if known_without_compiling:
        monkeypatch.setattr(days, "_state_bytes", lambda depth: 100 * GIB)
    with pytest.raises(UserError, match="rtx4070: the smallest model, d8, does not fit"):
        days.best(7, CARD)


@pytest.mark.long
def test_state_bytes_are_those_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on memory is the sum over the state's arrays, and residuals come on top."""
    from nanojax import step

    config = config_files.load("d12_2026_4070")
    monkeypatch.setattr(compile, "start_compiler", lambda: None)
    import jax

    leaves = jax.tree.leaves(step.abstract_state(config))
    assert compile.state_bytes(config) == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert compile.least_bytes(config) == compile.state_bytes(config) + step.residual_bytes(config)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0.5", "7", "60"])
def test_the_command_gives_the_plan(fake: Callable, monkeypatch: Any, capsys: Any, budget: str) -> None:
    """The printed arguments, passed to plan --json, give the same tokens, days, peak and money; and train accepts the config."""
    fake()
    told = json.loads(run(monkeypatch, capsys, f"--days={budget}", "--json", "--price=0.3", "--watts=180"))
    for model in told["models"]:
        if not model["fits"]:
            continue
        _, _, module, *arguments = shlex.split(model["command"])
        assert module == "nanojax.train"
        again = json.loads(run(monkeypatch, capsys, *arguments, "--json", "--price=0.3", "--watts=180"))
        same = set(again) - {"would_fit"}
        assert {key: model[key] for key in same} == {key: again[key] for key in same}
        assert config_files.load(arguments[0].partition("=")[2], arguments[1:]).model.depth == model["depth"]
        assert model["days"] <= float(budget)


def test_the_page_has_a_row_per_model_and_ends_with_the_command(fake: Callable, monkeypatch: Any, capsys: Any) -> None:
    """Best first, no line wider than 132 columns, the first row's command last; progress does not go to stdout."""
    fake()
    text = run(monkeypatch, capsys, "--days=7")
    told = json.loads(run(monkeypatch, capsys, "--days=7", "--json"))
    rows = [int(found[1]) for found in map(ROW.match, text.splitlines()) if found]
    assert rows == [model["depth"] for model in told["models"]]
    assert text.strip().splitlines()[-1] == told["models"][0]["command"]
    table = text.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 132
    assert told["days"] == 7 and told["card"] == "rtx4070"


def test_a_run_folder_of_its_own(fake: Callable) -> None:
    """Two budgets or two depths never share a run folder, nor that of the config they change."""
    fake()
    folders = [choice.plan.config.train.run for budget in (5, 7) for choice in days.best(budget, CARD)]
    assert len(set(folders)) == len(folders) and f"runs/{days.BASE}" not in folders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--days=0"], "--days=0: must be more than 0 and at most 365"),
        (["--days=-3"], "--days=-3: must be"),
        (["--days=nan"], "--days=nan: must be"),
        (["--days=inf"], "--days=inf: must be"),
        (["--days=1e30"], "--days=1e+30: must be"),
        (["--days=366"], "--days=366: must be"),
        (["--days="], "--days"),
        (["--days=week"], "--days"),
        (["--days=1e-9"], "too short; the smallest model, d8 at ratio 8, needs more than"),
        (["--days=7", "--card=rtx9999"], "unknown card"),
        (["--days=7", "--config=demo"], "leave out --config"),
        (["--days=7", "--table"], "leave out --table"),
        (["--days=7", "--measure"], "leave out --measure"),
        (["--days=7", "--hlo=x"], "leave out --hlo"),
        (["--days=7", "--top=3"], "leave out --top"),
        (["--days=7", "--try=model.depth=8,10"], "leave out --try"),
        (["--days=7", "--model.depth=3", "--stored.value=int8"], "leave out --model.depth, --stored.value"),
        (["--days=7", "--watts=nan"], "--watts"),
        (["--table", "--top=3"], "leave out --top"),
    ],
)
def test_mistakes_are_one_line_before_anything_compiles(
    fake: Callable, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    """Exit 2, one line on stderr that says what is wrong, nothing on stdout, nothing compiled."""
    seen = fake()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, *arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, seen) == (2, "", [])
    assert message in err and err.count("\n") == 1 and err.startswith("error: "), err


def test_too_short_by_the_modelled_speed(fake: Callable) -> None:
    """A time that the peak allows but the modelled speed does not: the least time is named, and suffices."""
    fake()
    smallest = config_files.load(days.BASE, ["--model.depth=8", "--train.ratio=8"])
    need = smallest.train.tokens * smallest.model.flops_per_token / SPEED / 86400
    with pytest.raises(UserError, match="too short") as error:
        days.best(need * 0.9, CARD)
    named = float(re.search(r"needs ([\d.]+) days", str(error.value))[1])  # pyright: ignore[reportOptionalSubscript]
    assert named == pytest.approx(need, rel=0.06)
    assert days.best(named * 1.06, CARD)[0].depth == 8


# -- CORE --------------------------------------------------------------------------------------------------------------


def test_core_is_the_line_through_the_published_runs() -> None:
    """Least squares by the standard library: the 2026 runs' distances from their mean and the 2025 runs' from theirs."""
    xs, ys = [], []
    for family in ("2026", "2025"):
        runs = [run for run in core_of_flops.RUNS if run.family == family]
        x, y = [math.log10(run.flops) for run in runs], [run.core for run in runs]
        xs += [a - statistics.mean(x) for a in x]
        ys += [b - statistics.mean(y) for b in y]
    slope = statistics.linear_regression(xs, ys, proportional=True).slope
    assert core_of_flops.core(1e20).value - core_of_flops.core(1e19).value == pytest.approx(slope, rel=1e-9)
    assert 0.07 < slope < 0.09


def test_published_runs_lie_in_their_range() -> None:
    """Each run lies in the range at its own FLOPs; none is called extrapolated, and what lies beyond is."""
    for run in core_of_flops.RUNS:
        core = core_of_flops.core(run.flops, run.family)
        assert core.low <= run.core <= core.high and not core.extrapolated, run
    least, most = core_of_flops.published()
    assert core_of_flops.core(least * 0.99).extrapolated and core_of_flops.core(most * 1.01).extrapolated


def test_the_range_widens_away_from_the_runs() -> None:
    """At least two standard deviations of CORE between seeds to each side, and more beyond the published FLOPs."""
    width = lambda flops: core_of_flops.core(flops).high - core_of_flops.core(flops).low
    assert 4 * core_of_flops.NOISE <= width(1.6e19) < width(1e20) < width(1e21)
    assert width(1.6e19) < width(1e18) < width(1e17)


def test_every_run_names_its_source_and_plausible_flops() -> None:
    """A source, and FLOPs within 10 % of the depth's own count at the ratio named (windows were 768 in some runs)."""
    for run in core_of_flops.RUNS:
        assert run.source.startswith("nanochat")
        named = re.fullmatch(r"d(\d+), ratio ([\d.]+)", run.model)
        if named:
            config = config_files.load(days.BASE, [f"--model.depth={named[1]}", f"--train.ratio={named[2]}"])
            assert config.train.tokens * config.model.flops_per_token == pytest.approx(run.flops, rel=0.1)


def page(choices: list[days.Choice]) -> str:
    """What report prints of `choices`."""
    out = io.StringIO()
    report.show_choices(choices, Console(file=out, width=132), energy.PRICES)
    return out.getvalue()


def test_extrapolation_and_other_ratios_are_marked(fake: Callable) -> None:
    """A row beyond the published FLOPs says extrapolated, one whose ratio is not 8 to 12 has a star, others have neither."""
    fake(peak=lambda config: 1.0)
    choices = [*days.best(2, CARD), *days.best(100, CARD)]
    rows = [line for line in page(choices).splitlines() if ROW.match(line)]
    assert len(rows) == len(choices)
    for row, choice in zip(rows, choices):
        assert ("extrapolated" in row) == choice.core.extrapolated
        assert (f"{choice.ratio:.1f}*" in row) == (not choice.usual)
        assert f"{choice.core.value:.3f}" in row
    assert {choice.core.extrapolated for choice in choices} == {choice.usual for choice in choices} == {True, False}


# -- the compiler ------------------------------------------------------------------------------------------------------


@pytest.mark.plan
@pytest.mark.slow
@pytest.mark.skipif(not xla.cuda_compiler_installed(), reason="the plan extra is not installed")
def test_the_smallest_model_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """43 minutes on a 4070, compiled: the peak exceeds the bound, the time is kept, the command repeats it."""
    monkeypatch.setattr(days, "FIRST_SHARE", 0.19)  # d8's own, so that nothing else is compiled
    (first,) = days.best(0.03, CARD)
    assert first.plan.fits and first.plan.memory.peak >= compile.least_bytes(first.plan.config)
    assert 0.029 < first.plan.bill.days <= 0.03
    again = planner.make(config_files.load(days.BASE, first.arguments.split()[1:]), CARD)
    assert (again.memory.peak, again.bill) == (first.plan.memory.peak, first.plan.bill)
