"""The planner without a compiler: hardware, energy and money, power readings, what fits, errors."""

import dataclasses
import itertools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanojax import cli, config_files, config_rules, hardware, xla
from nanojax import config as configs
from nanojax.cli import UserError
from nanojax.hardware import GIB
from nanojax.plan import __main__, compile, energy, planner

ROOT = Path(__file__).parents[2]
CARD = hardware.CARDS["rtx4070"]
EVERYDAY_NAMES = (
    "RTX 4070",
    "4070 Laptop",
    "4070 Super",
    "4070 Ti Super",
    "4060 Ti 16 GB",
    "3060",
    "3090",
    "4090",
    "5070",
    "5090",
)


def run(*arguments, **environment):
    """The command as a user runs it, on a machine without a GPU."""
    command = [sys.executable, "-m", "nanojax.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


# -- cards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("rtx4090", "bf16", 165.2), ("rtx4090", "fp8", 330.3), ("rtx4090", "tf32", 82.6), ("rtx4090", "int8", 660.6),
        ("rtx3090", "bf16", 71.0), ("rtx3090", "tf32", 35.6), ("rtx3090", "int8", 284.0), ("rtx3090", "fp8", 0.0),
        ("rtx5090", "bf16", 209.5), ("rtx5090", "fp8", 419.0), ("rtx5090", "tf32", 104.8), ("rtx5090", "int8", 838.0),
        ("h100", "bf16", 989.4), ("h100", "fp8", 1978.9), ("h100", "int8", 1978.9), ("h100", "tf32", 494.7),
        ("rtx4070", "bf16", 58.3), ("rtx4070", "int8", 233.2), ("rtx4070", "f32", 29.15),
    ],
)  # fmt: skip
def test_peaks_are_nvidias(name, dtype, tera):
    """SMs x clock x operations per clock give the whitepapers' dense totals to 1 %."""
    assert hardware.CARDS[name].peak(dtype) / 1e12 == pytest.approx(tera, rel=0.01)


def test_budgets():
    """10.5 GiB on the 12 GB desktop card, 6.8 on the 8 GB laptop, to 0.01; every budget is below the card's memory."""
    assert hardware.CARDS["rtx4070"].budget_bytes / 2**30 == pytest.approx(10.5, abs=0.01)
    assert hardware.CARDS["rtx4070_laptop"].budget_bytes / 2**30 == pytest.approx(6.8, abs=0.01)
    assert all(0.8 < c.budget_bytes / (c.memory_mib * 2**20) < 1 for c in hardware.CARDS.values())


@pytest.mark.parametrize("name", [*EVERYDAY_NAMES, "H100", "H200", "rtx-4070", "rtx4070", "RTX4060Ti_16GB"])
def test_cards_are_found_as_people_write_them(name):
    """By key and by everyday names."""
    assert hardware.find_card(name).key in hardware.CARDS


def test_cards_are_found_by_the_drivers_name():
    """What nvidia-smi prints finds the card itself."""
    assert all(hardware.find_card(card.name) is card for card in hardware.CARDS.values())
    assert len(hardware.CARDS) == 12


@pytest.mark.parametrize("name", ["rtx4071", "", "NVIDIA H100 PCIe", "4070 Ti"])
def test_unknown_card_names_the_known_ones(name):
    """A near miss must not plan for another card."""
    with pytest.raises(UserError, match=r"known are .*rtx4070.*to add one"):
        hardware.find_card(name)


@pytest.mark.parametrize(
    ("config", "card"),
    [("d32_4070", "rtx4070"), ("d32_4070_laptop", "rtx4070_laptop"), ("d32_4070_15b", "rtx4070"), ("demo", "rtx4070"),
     ("d12_h100", "h100"), ("d20_rtx5090_fast", "rtx5090"), ("d12_40700", "rtx4070"),
     ("d32_2026_2x4070", "rtx4070"), ("d20_8xh100", "h100")],
)  # fmt: skip
def test_card_of_a_config_is_in_its_name(config, card):
    """depth_hardware names: the longest match, whole words only."""
    assert hardware.card_of_config(config).key == card


# -- energy and money --------------------------------------------------------------------------------------------------


D32_TOKENS = 71_680 * 524_288  # nanochat's run1000.sh


def test_d32_is_4_54e20_flop():
    """6 FLOPs per token and parameter outside the embedding, plus 12 L N H T of attention, over nanochat's tokens."""
    model = configs.Model(depth=32)
    assert model.parameters == 12 * 32 * 2048**2 + 2 * 65_536 * 2048 == 1_879_048_192
    assert model.flops_per_token == 6 * (1_879_048_192 - 134_217_728) + 12 * 32 * 16 * 128 * 2048
    assert pytest.approx(4.5396e20, rel=1e-4) == model.flops_per_token * D32_TOKENS


def test_energy_of_263_days_at_220_watts():
    """d32's 4.54e20 FLOPs at 20 TFLOP/s are 263 days, and 220 W for them about 1,400 kWh (1 %)."""
    model = configs.Model(depth=32)
    bill = energy.bill(D32_TOKENS, 20e12 / model.flops_per_token, 220, {"NT$": 3.5})
    assert bill.days == pytest.approx(263, abs=1)
    assert bill.kwh == pytest.approx(1400, rel=0.02)
    assert bill.cost == {"NT$": pytest.approx(bill.kwh * 3.5)}


# -- power readings ----------------------------------------------------------------------------------------------------


def test_nvidia_smi_line():
    """MiB become bytes; [N/A] becomes None; a line without memory, or an error text, is no reading."""
    full = hardware.parse_smi("NVIDIA GeForce RTX 4070, 12282, 11500, 187.35, 200.00\n")
    assert full == hardware.Reading("NVIDIA GeForce RTX 4070", 12282 << 20, 11500 << 20, 187.35, 200.0, None)
    laptop = hardware.parse_smi("NVIDIA GeForce RTX 4070 Laptop GPU, 8188, 7900, [N/A], [N/A]")
    assert laptop and laptop.watts is None and laptop.watts_limit is None
    assert hardware.parse_smi("Unable to determine the device handle") is None
    assert hardware.parse_smi("x, [N/A], 1, 2, 3") is None


def meter_of(monkeypatch, readings, times):
    """A PowerMeter that sees these readings at these times."""
    clock = iter(times)
    monkeypatch.setattr(hardware, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    queue = iter(readings)
    monkeypatch.setattr(hardware, "read_gpu", lambda: next(queue))
    return hardware.PowerMeter()


def reading(watts, joules):
    return hardware.Reading("g", 1, 1, watts, 200.0, joules)


def test_power_meter_uses_the_counter(monkeypatch):
    """Joules by NVML's counter; mean watts between two updates."""
    meter = meter_of(monkeypatch, [reading(50, 1000), reading(180, 1900), reading(10, 2100)], [0, 10, 12])
    meter.update()
    assert (meter.joules, meter.watts) == (900, 90)
    meter.update()
    assert (meter.joules, meter.watts) == (1100, 100)


def test_power_meter_integrates_without_a_counter(monkeypatch):
    """Trapezoids between power readings, also after the driver was reloaded (the counter fell)."""
    meter = meter_of(monkeypatch, [reading(100, None), reading(200, None)], [0, 10])
    meter.update()
    assert meter.joules == 1500
    meter = meter_of(monkeypatch, [reading(100, 5000), reading(100, 3)], [0, 10])
    meter.update()
    assert meter.joules == 1000


def test_power_meter_without_gpu(monkeypatch):
    """Without a driver nothing is available and nothing fails."""
    meter = meter_of(monkeypatch, [None], [0])
    meter.update()
    assert (meter.available, meter.watts, meter.joules) == (False, None, 0.0)


def test_no_driver_no_reading(monkeypatch):
    """Without a driver neither pynvml nor nvidia-smi is asked."""
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked"))
    assert hardware.read_gpu() is None


# -- before training ---------------------------------------------------------------------------------------------------


def compiled(gib):
    """A stand-in for a compiled step whose memory analysis says `gib` GiB, half of it state."""
    half = int(gib * 2**30 / 2)
    stats = types.SimpleNamespace(
        argument_size_in_bytes=half, output_size_in_bytes=half, alias_size_in_bytes=half, temp_size_in_bytes=half
    )
    return types.SimpleNamespace(memory_analysis=lambda: stats)


def test_a_step_that_cannot_fit_is_refused_in_one_line():
    """10.4 GiB in a pool of 10.0: UserError with both numbers and what to do; in 10.5: the memory line."""
    config = config_files.load("demo")
    with pytest.raises(UserError, match=r"demo needs 10\.40 GiB .* XLA has 10\.00; .*nanojax\.plan"):
        planner.check(compiled(10.4), config, 10 * 2**30)
    assert planner.check(compiled(10.4), config, int(10.5 * 2**30)).endswith("peak 10.40 GiB of XLA's 10.50")
    assert "of XLA's" not in planner.check(compiled(10.4), config, None)


def test_allocator_leaves_room_for_the_context(monkeypatch):
    """A 12 GB card with 0.6 GiB of desktop: XLA gets the free memory less 0.7 GiB, enough for a plan of 10.5 GiB."""
    free = 11.4 * 2**30
    card = hardware.Reading("NVIDIA GeForce RTX 4070", 12282 << 20, int(free), None, None, None)
    share = xla.pool_fraction(card)
    assert 10.5 < share * 12282 / 1024 <= (free / 2**30 - 0.7)
    monkeypatch.setattr(hardware, "read_gpu", lambda: card)
    for name in xla._FRACTION:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(os.environ, "XLA_CLIENT_MEM_FRACTION", "0.5")  # restored afterwards
    assert "0.5" in (xla.share_memory() or "")
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    assert f"XLA_CLIENT_MEM_FRACTION={share:.2f}" in (xla.share_memory() or "")
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == f"{share:.2f}"
    monkeypatch.setattr(hardware, "read_gpu", lambda: None)
    assert xla.share_memory() is None


def test_the_card_of_this_machine(monkeypatch):
    """A known GPU with XLA's pool as its budget. Without a GPU, the compiler or the card's data: one line."""
    monkeypatch.setattr(xla, "cuda_compiler_installed", lambda: True)
    reading = hardware.Reading("NVIDIA GeForce RTX 4070", 12282 << 20, 11 << 30, None, None, None)
    monkeypatch.setattr(hardware, "read_gpu", lambda: reading)
    budgets = [planner.card_here(limit).budget_bytes / GIB for limit in (9 * GIB, None)]
    assert budgets == pytest.approx([9.0, 10.5], abs=0.01)

    monkeypatch.setattr(hardware, "read_gpu", lambda: dataclasses.replace(reading, name="NVIDIA Unheard Of"))
    with pytest.raises(UserError, match=r"residuals=auto: NVIDIA Unheard Of is not in .*hardware.py"):
        planner.card_here(None)
    monkeypatch.setattr(xla, "cuda_compiler_installed", lambda: False)
    with pytest.raises(UserError, match=r"residuals=auto: jax's CUDA plugin is not installed; choose inputs"):
        planner.card_here(None)
    monkeypatch.setattr(hardware, "read_gpu", lambda: None)
    with pytest.raises(UserError, match="residuals=auto: there is no NVIDIA GPU"):
        planner.card_here(None)


def test_auto_residuals_are_stored_and_kept(monkeypatch, tmp_path):
    """The run folder's config has the choice, and a resumed run keeps it without asking again."""
    from nanojax import train
    from nanojax.run import resume, run_folder

    config = config_files.load("demo", ["--compute.residuals=auto"])
    chosen = types.SimpleNamespace(config=configs.override(config, {"compute.residuals": "attn+mlp_in"}))
    monkeypatch.setattr(planner, "card_here", lambda limit: hardware.CARDS["rtx4070"])
    monkeypatch.setattr(planner, "best_residuals", lambda *_, **__: chosen)
    concrete = train._with_residuals(config, tmp_path)
    assert concrete.compute.residuals == "attn+mlp_in"
    run_folder.write_config(tmp_path, concrete)
    monkeypatch.setattr(run_folder, "available", lambda run: [3])
    monkeypatch.setattr(planner, "best_residuals", lambda *_, **__: pytest.fail("asked again"))
    assert train._with_residuals(config, tmp_path) == concrete
    assert resume.check(tmp_path, concrete).config == concrete


@pytest.mark.long
def test_the_caches_key_covers_the_code_of_the_step():
    """All that nanojax.step imports is hashed into the name of a kept plan; of the config, its values are."""
    code = "import sys, nanojax.step; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('nanojax')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    package = ROOT / "nanojax"
    hashed = {str(file) for pattern in compile.STEP_SOURCES for file in package.glob(pattern)}
    others = ("__init__.py", "cli.py", "config.py", "config_rules.py", "fields.py", "files.py", "hardware.py")
    assert set(done.stdout.split()) - hashed == {str(package / name) for name in others}


# -- changes and automatic choices -------------------------------------------------------------------------------------


def fake_make(peaks, rates):
    """planner.make with peaks (GiB) and rates by compute.residuals."""

    def make(config, card, **_):
        choice = config.compute.residuals
        return types.SimpleNamespace(
            config=config, fits=peaks[choice] <= 10.5, tokens_per_second=rates[choice], verdict="does not fit"
        )

    return make


@pytest.mark.parametrize(
    ("peaks", "best"),
    [((9, 8, 7, 5), "all"), ((12, 10, 7, 5), "cheap"), ((12, 11, 11, 9), "inputs")],
)
def test_best_residuals_fit_and_are_fastest(monkeypatch, peaks, best):
    """The most residuals that fit, if keeping fewer is slower."""
    ladder = planner.residual_ladder()
    rates = dict(zip(ladder, (50.0, 45.0, 42.0, 40.0)))
    monkeypatch.setattr(planner, "make", fake_make(dict(zip(ladder, peaks)), rates))
    assert planner.best_residuals(config_files.load("demo"), CARD).config.compute.residuals == best


def test_best_residuals_prefer_speed_to_what_is_kept(monkeypatch):
    """If keeping everything is slower than recomputing some of it, the faster choice wins."""
    ladder = planner.residual_ladder()
    rates = dict(zip(ladder, (50.0, 55.0, 42.0, 40.0)))
    monkeypatch.setattr(planner, "make", fake_make(dict.fromkeys(ladder, 1), rates))
    assert planner.best_residuals(config_files.load("demo"), CARD).config.compute.residuals == "cheap"


def test_no_residuals_fit(monkeypatch):
    """One line that says so."""
    ladder = planner.residual_ladder()
    monkeypatch.setattr(planner, "make", fake_make(dict.fromkeys(ladder, 20), dict.fromkeys(ladder, 1.0)))
    with pytest.raises(UserError, match="even with block inputs only"):
        planner.best_residuals(config_files.load("demo"), CARD)


def test_ladder_is_what_the_config_accepts():
    """Every rung names residuals that the model knows, each rung a subset of the one before."""
    from nanojax.model.forward import residual_names

    rungs = [set(residual_names(configs.override(config_files.load("demo"), {"compute.residuals": r})))
             for r in planner.residual_ladder()]  # fmt: skip
    assert all(lower < upper for upper, lower in itertools.pairwise(rungs))


def test_changes_only_save():
    """Fewer rows, fewer residuals, narrower formats; nothing that is already so."""
    base = config_files.load(
        "demo", ["--train.microbatch=4", "--train.tokens_per_step=4096", "--compute.residuals=cheap"]
    )
    offered = [next(iter(c.items())) for c in planner.changes(base)]
    assert ("train.microbatch", "2") in offered and ("train.microbatch", "1") in offered
    assert ("compute.residuals", "inputs") in offered and ("compute.residuals", "all") not in offered
    lean = {
        "train.microbatch": 1,
        "compute.residuals": "inputs",
        "compute.loss_chunk": 256,
        "accumulate.blocks": "bf16",
    }
    lean |= {f"stored.{k}": "int8" for k in ("blocks", "embed", "head", "momentum", "adam")}
    lean |= {"accumulate.embed_head": "bf16"}
    assert planner.changes(config_rules.resolve(configs.override(base, lean))) == []
    tables = {"stored.value": "int8"}
    assert tables in planner.changes(config_files.load("d24_2026_4070")) and tables not in planner.changes(base)


def test_attention_is_chosen_as_on_the_card():
    """cuDNN for bf16 with head_dim up to 128 although no GPU is here; the chunked form for f32; a choice stays."""
    base = config_files.load("demo")
    for dtype, choice, expected in (
        ("bf16", "auto", "cudnn"),
        ("f32", "auto", "chunked"),
        ("bf16", "chunked", "chunked"),
    ):
        changed = configs.override(base, {"compute.dtype": dtype, "compute.attention": choice})
        assert compile.for_gpu(changed).compute.attention == expected


# -- the cache ---------------------------------------------------------------------------------------------------------

PROGRAM = compile.Program("HLO", 4, 3, 2, 1, {"params": 1, "other": 3}, (compile.Value("v", 1, 0, "f32[]"),), 0.5)


def test_cache_gives_back_what_it_got_and_survives_damage(tmp_path):
    """The kept program is marked as cached; a truncated, foreign or empty file is a miss, not an error."""
    path = tmp_path / "deep" / "x.json.gz"
    compile._store(path, PROGRAM)
    assert compile._load(path) == dataclasses.replace(PROGRAM, cached=True)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not gzip", b"\x1f\x8b\x08\x00"):
        path.write_bytes(damage)
        assert compile._load(path) is None
    assert [p.name for p in path.parent.iterdir()] == ["x.json.gz"]


def test_cache_key_follows_what_the_step_depends_on(monkeypatch):
    """The key ignores the prompt and the run folder, and depends on shape, format, schedule and card."""
    card, base = hardware.CARDS["rtx4070"], config_files.load("demo")
    key = compile.key(base, card)
    same = configs.override(base, {"eval.prompt": "other", "train.run": "elsewhere", "checkpoint.every": 7})
    assert compile.key(same, card) == key
    for change in ({"model.depth": 2}, {"stored.blocks": "int8"}, {"optim.matrix_lr": 0.1}, {"train.microbatch": 1}):
        assert compile.key(config_rules.resolve(configs.override(base, change)), card) != key
    assert compile.key(base, hardware.CARDS["h100"]) != key


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=d32_4071"], "no such config"),
        (["--config=demo", "--card=rtx9999"], "unknown card; known are"),
        ([], "--config: missing"),
        (["--config=demo", "--model.dept=3"], "no such key"),
        (["--config=demo", "--price=-1"], "--price=-1"),
        (["--config=demo", "--watts=0"], "--watts=0"),
        (["--config=demo", "--top=x"], "--top"),
        (["--config=demo", "--try=train.microbatch"], "expected KEY=VALUE"),
        (["--table", "--config=demo"], "--table"),
        (["--config=demo", "extra"], "expected --section.key=value"),
        (["--config=demo", "--measure"], "no NVIDIA GPU"),
        (["--config=demo", "--decode=1,0"], "numbers of rows from 1"),
        (["--config=demo", "--decode=two"], "--decode=two"),
        (["--config=demo", "--decode", "--context=9999"], "--context=9999"),
        (["--config=demo", "--decode", "--hlo=x"], "--hlo: one program"),
        (["--config=demo", "--cache=int8"], "add --decode"),
        (["--config=demo", "--decode", "--try=train.microbatch=1,2"], "leave out --try"),
        (["--days=7", "--decode"], "leave out --decode"),
        (["--config=demo", "--cards=rtx4070"], "expected a number from 1 to 64 and a card"),
        (["--config=demo", "--cards=2xrtx9999"], "unknown card"),
        (["--config=demo", "--cards=3xrtx4070"], "does not divide the step's 1 microbatches"),
        (["--config=demo", "--cards=2xrtx4070", "--card=h100"], "leave out --card"),
        (["--config=demo", "--cards=2xrtx4070", "--decode"], "leave out --decode"),
        (["--config=demo", "--link=10GbE"], "add --cards"),
        (["--config=demo", "--link=wire", "--cards=2xrtx4070"], "--link"),
        (["--config=demo", "--parallel.devices=all"], "a plan needs a number"),
        (["--cards=2xrtx4070", "--table"], "--config: missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, monkeypatch, capsys):
    """One line on stderr that says what is wrong, nothing on stdout."""
    if "--measure" in arguments and hardware.nvidia_driver():
        pytest.skip("this machine has an NVIDIA driver")
    monkeypatch.setattr(sys, "argv", ["nanojax.plan", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run_main(__main__.main)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1 and err.startswith("error: "), err


def test_a_mistake_at_the_shell():
    """The same through python -m: exit 2, one line, no traceback, nothing on stdout."""
    done = run("--config=demo", "--card=rtx9999")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --card=rtx9999: unknown card")


def test_help_has_examples_and_all_cards():
    """--help exits 0 and shows commands to copy and every card."""
    done = run("--help")
    assert done.returncode == 0
    assert "python -m nanojax.plan --config=d32_4070" in done.stdout
    assert all(key in done.stdout for key in hardware.CARDS)
