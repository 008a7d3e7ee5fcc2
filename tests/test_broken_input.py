"""Hundreds of broken command lines, configs, run folders, checkpoints and models: one line and exit 2, or they work.

The cases are drawn from the seed in each test's parameter. Commands run in this process, without what takes time: training ends
where its logs would open, sampling and measuring where the model would run.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import tiny_run

from nanojax import config as configs
from nanojax import config_rules, sample, train, xla
from nanojax.card import memory
from nanojax.cli import run_main
from nanojax.evaluate import __main__ as evaluate
from nanojax.evaluate import bpb
from nanojax.interop import __main__ as interop
from nanojax.interop import convert
from nanojax.plan import __main__ as plan
from nanojax.plan import planner
from nanojax.run import checkpoint, metrics, run_folder

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = pytest.mark.usefixtures("compile_cache")
seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 4))])
WORDS = (
    "",
    "-1",
    "0",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1e18",
    "9" * 30,
    "true",
    "null",
    "x",
    "int3",
    "~",
    "~nobody/x",
    "é" * 300,
)
WORDS += (
    "caf\udce9",
    "a" * 5000,
    "/proc/nothing",
    "/dev/null",
    "..",
    "f32",
    "0.5",
    "2",
    "64",
    "1_0",
    "[]",
    "{}",
    "=",
    "--",
)
VALUES = (
    None,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "x",
    "",
    True,
    [],
    [1],
    {},
    {"a": 1},
    "64",
    0.5,
    3,
    2**40,
)


class Reached(BaseException):
    """The command read all its input and would begin to compute."""


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., bool]:
    """A function that runs a command: True if it works; False if it ends as a mistake should; otherwise the test fails."""

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    for place, name in ((metrics, "Metrics"), (bpb, "measure"), (planner, "make"), (planner, "best_residuals")):
        monkeypatch.setattr(place, name, reached)
    monkeypatch.setattr(sample, "_stream", reached)
    monkeypatch.setattr(memory, "fitting", lambda config, *_: (config, None, ""))
    for name in ("configure", "settings", "start"):
        monkeypatch.setattr(xla, name, lambda: None)

    def run(main: Callable[[], None], *arguments: Any) -> bool:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        try:
            run_main(main)
            return True
        except Reached:
            return True
        except SystemExit as stop:
            lines = capsys.readouterr().err.splitlines()
            errors = [line for line in lines if not line.startswith("warning: ")]
            if stop.code in (0, None):
                return True
            assert stop.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), (
                arguments,
                stop.code,
                lines,
            )
            print(arguments, lines)  # shown when the test fails later
            return False

    return run


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """A run folder with checkpoints 9 and 12."""
    train.train(tiny_run.load(home / "tiny.py", home / "whole", eval__every=0))
    return home / "whole"


@pytest.fixture(scope="module")
def models(whole: Path) -> Path:
    """nanochat/ and hf/, that run as other programs keep it. nanochat wants as many rows as its tokenizer has ids."""
    config, params, tokenizer = checkpoint.load_params(whole)
    params = jax.tree.map(np.asarray, params)
    convert.export_transformers(whole.parent / "hf", config, params, tokenizer)
    fewer = {**params, "embed": params["embed"][: tokenizer.vocab_size], "head": params["head"][: tokenizer.vocab_size]}
    narrow = config_rules.resolve(configs.override(config, {"model.vocab": tokenizer.vocab_size}))
    convert.export_nanochat(whole.parent / "nanochat", narrow, fewer, tokenizer, 12)
    return whole.parent


def pick(rng: np.random.Generator, among: Any) -> Any:
    return among[int(rng.integers(len(among)))]


@pytest.mark.long
@seeds
def test_command_lines(home: Path, whole: Path, tmp_path: Path, outcome: Callable, seed: int, monkeypatch: Any) -> None:
    """200 command lines of train, plan, sample, evaluate and interop with one to three odd options."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(seed)
    keys = [*configs.keys(configs.Config()), "model.dept", "nonsense", "", "config", "steps", "train.run.x"]
    run = {f"--run={whole}", f"--hf={home}"}
    options = (
        "tokens",
        "top-k",
        "temperature",
        "seed",
        "samples",
        "step",
        "dtype",
        "eval",
        "data",
        "text",
        "prompt",
        "out",
    )
    options += ("batch-tokens", "token-bytes", "by", "key", "max-per-task", "bundle", "run", "hf", "nonsense")
    worked = 0
    for case in range(200):
        command = (train, train, plan, sample, evaluate, interop)[case % 6]
        if command in (train, plan):
            given = [
                f"--config={pick(rng, [home / 'tiny.py', home / 'tiny.py', 'demo', *WORDS])}",
                f"--train.run={tmp_path}/r",
            ]
            names = keys
        elif command is interop:
            given = [
                pick(rng, ["import", "export", "x"]),
                pick(rng, [whole, home, *WORDS]),
                pick(rng, [tmp_path / "o", *WORDS]),
            ]
            names = ("to", "dtype", "step", "tokenizer")
        else:
            given, names = [pick(rng, sorted(run)), *([f"--out={tmp_path}/e"] if command is evaluate else [])], options
        for _ in range(int(rng.integers(1, 4))):
            name, value, form = pick(rng, names), pick(rng, WORDS), int(rng.integers(8))
            given += [f"--{name}"] if form == 0 else [f"--{name}", value] if form < 4 else [f"--{name}={value}"]
        worked += outcome(command.main, *given)
    assert 0 < worked < 150


@pytest.mark.long
@seeds
def test_config_files(tmp_path: Path, outcome: Callable, seed: int, home: Path, monkeypatch: Any) -> None:
    """150 config files: any key with a value of any type, things that are no config, and text that is no Python."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(seed)
    whole = (home / "tiny.py").read_text()
    names = list(configs.keys(configs.Config()))
    odd = [
        "",
        "x = (",
        "import nothing_there",
        "def get_config(): return 1",
        "get_config = 3",
        "raise SystemExit(0)",
        "\0",
    ]
    odd += [
        "def get_config(): raise KeyError",
        "def get_config(x): pass",
        "1/0",
        "def get_config(): return get_config()",
    ]
    odd += [
        "import dataclasses\nfrom nanojax.config import Config\ndef get_config(): return Config(model={})",
        "\ufeff" + whole,
    ]
    worked = 0
    for case in range(150):
        path = tmp_path / f"c{case}.py"
        if case % 3:
            section, key = pick(rng, names).split(".")
            value = str(pick(rng, VALUES)).replace("nan", "float('nan')").replace("inf", "float('inf')")
            value = repr(pick(rng, WORDS)) if rng.random() < 0.4 else value if value not in ("", "x") else repr(value)
            change = f"dataclasses.replace(c, {section}=dataclasses.replace(c.{section}, {key}={value}))"
            path.write_text(
                f"{whole}\nimport dataclasses\nplain = get_config\n\ndef get_config():\n    c = plain()\n    return {change}\n",
                errors="surrogateescape",
            )
        else:
            raw = bytearray(pick(rng, [*odd, whole]).encode())
            for _ in range(int(rng.integers(0, 3)) if raw else 0):
                raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
            path.write_bytes(raw)
        worked += outcome(train.main, f"--config={path}", f"--train.run={tmp_path}/r{case}")
    assert 10 < worked < 90


def damage(path: Path, rng: np.random.Generator) -> None:
    """Removes, empties, cuts or overwrites a file, changes a bit of it, or puts a folder in its place."""
    raw, how = bytearray(path.read_bytes()), int(rng.integers(7))
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(b"")
    elif how == 2:
        path.write_bytes(raw[: int(rng.integers(len(raw) + 1))])
    elif how == 3:
        path.write_bytes(rng.integers(0, 256, len(raw), np.uint8).tobytes())
    elif how in (4, 5) and raw:
        raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
    elif how == 6:
        path.unlink()
        path.mkdir()


def paths_in(table: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON object, nested ones too."""
    for key, value in table.items() if isinstance(table, dict) else ():
        yield (*at, key)
        yield from paths_in(value, (*at, key))


def change_json(path: Path, rng: np.random.Generator) -> None:
    """One value of a JSON object becomes another, of any type, or is left out; deep nesting now and then."""
    table = json.loads(path.read_text())
    *to, last = pick(rng, list(paths_in(table)))
    inner = table
    for key in to:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[last]
    else:
        inner[last] = pick(rng, VALUES)
    text = json.dumps(table)
    path.write_text("[" * 100_000 if rng.random() < 0.03 else text)


@pytest.mark.long
@pytest.mark.parametrize(("seed", "cases"), [(0, 30), *(pytest.param(i, 80, marks=pytest.mark.slow) for i in range(4))])
def test_run_folders(home: Path, whole: Path, tmp_path: Path, outcome: Callable, seed: int, cases: int) -> None:
    """80 run folders, of which make test has 30, in which one to three files are damaged, or config.json says something else.

    Unless both checkpoints or the tokenizer are hit, sample, evaluate, export, train.init and train work; nothing that is
    whole is lost, and an export is whole or not there.
    """
    rng = np.random.default_rng(seed)
    worked = 0
    for case in range(cases):
        run, out = tmp_path / f"r{case}", tmp_path / f"x{case}"
        shutil.copytree(whole, run)
        order = lambda p: (p.parent, p.stat().st_size, p)  # orbax names many files at random
        files = [p for p in run.rglob("*") if p.is_file() and p.parent.name != "tensorboard" and p.name != "lock"]
        files.sort(key=order)
        newest = [p for p in files if "12" in p.parts]
        small = [p for p in files if "checkpoints" not in p.parts]
        victims = {
            pick(rng, newest) if rng.random() < 0.7 else pick(rng, small) for _ in range(int(rng.integers(1, 4)))
        }
        if rng.random() < 0.2:
            change_json(run / "config.json", rng)
        else:
            for victim in victims:
                damage(victim, rng)
        for junk in ("abc", "²", "12.orbax-checkpoint-tmp"):
            (run / "checkpoints" / junk).mkdir()
        good = outcome(*{
            0: (sample.main, f"--run={run}"),
            1: (evaluate.main, f"--run={run}", "--eval=bpb", f"--out={out}-e"),
            2: (interop.main, "export", run, out),
            3: (train.main, *tiny_run.arguments(home / "tiny.py", run)),
            4: (train.main, *tiny_run.arguments(home / "tiny.py", tmp_path / f"i{case}", train__init=run)),
        }[case % 5])  # fmt: skip
        worked += good
        tokenizer_hit = case % 5 != 3 and any(p.parent.name == "tokenizer" for p in victims)
        assert good or tokenizer_hit, (case, victims)
        assert out.exists() == (good and case % 5 == 2) and not list(tmp_path.glob("*.tmp"))
        assert 9 in run_folder.available(run)
        shutil.rmtree(run)
    assert worked > cases * 5 // 8


@pytest.mark.long
@seeds
def test_imported_models(models: Path, tmp_path: Path, outcome: Callable, seed: int) -> None:
    """120 models of nanochat and Hugging Face with a damaged file or another value in its JSON: a refused one leaves nothing."""
    rng = np.random.default_rng(seed)
    worked = 0
    for case in range(120):
        folder, run = tmp_path / f"m{case}", tmp_path / f"r{case}"
        shutil.copytree(models / ("nanochat", "hf")[case % 2], folder)
        names = sorted(p for p in folder.iterdir() if p.name not in ("token_bytes.pt", "tokenizer_config.json"))
        if rng.random() < 0.6:
            change_json(pick(rng, [p for p in names if p.suffix == ".json"]), rng)
        else:
            damage(pick(rng, names), rng)
        good = outcome(interop.main, "import", folder, run)
        worked += good
        assert run.exists() == good and (not good or run_folder.available(run)), case
        shutil.rmtree(folder)
    assert 5 < worked < 100
