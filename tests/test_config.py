"""Configs: found by name, overridden, resolved, stored; 200 random mistakes each become one line before any compile."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from helpers import tiny_run

from nanojax import cli, config_files, config_rules, quant, step, train
from nanojax import config as configs
from nanojax.cli import UserError
from nanojax.config import Config

home = tiny_run.home


def test_parameter_counts() -> None:
    """The exact counts of d12, d20 and d32, and that the initial state has just these shapes."""
    counts = {
        depth: config_rules.resolve(Config(model=configs.Model(depth=depth))).model.parameters for depth in (12, 20, 32)
    }
    assert counts == {12: 185_597_952, 20: 560_988_160, 32: 1_879_048_192}
    assert _count(config_files.load("d32_4070")) == 1_879_048_192


def _count(config: Config) -> int:
    """Values in the parameters of the initial state, however they are stored."""
    floats = jax.eval_shape(quant.decode_tree, step.abstract_state(config).params)
    return sum(leaf.size for leaf in jax.tree.leaves(floats))


@pytest.mark.parametrize("name", config_files.available())
def test_every_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found from another directory, resolves, survives JSON, and its state has the counted parameters."""
    monkeypatch.chdir(tmp_path)
    config = config_files.load(name)
    assert config.name == name and config.train.run == f"runs/{name}" and config.train.steps > 0
    assert config_rules.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config
    assert config.microbatches * config.train.microbatch * config.model.T == config.train.tokens_per_step
    assert _count(config) == config.model.parameters


def test_overrides(home: Path) -> None:
    """Every key takes a value of its type from text, and a path works as well as a name."""
    name = str(home / "tiny.py")
    base = config_files.load(name)
    for name_of_key, key in configs.keys(base).items():
        same = configs.keys(configs.override(base, {name_of_key: str(key.value)}))[name_of_key]
        assert same.value == key.value and type(same.value) is type(key.value), name_of_key
    changed = config_files.load(
        name, ["--model.depth=3", "--optim.matrix_lr=1e-3", "--train.steps=1_000", "--optim.nesterov=no"]
    )
    assert (changed.model.depth, changed.optim.matrix_lr, changed.train.steps) == (3, 0.001, 1000)
    assert changed.optim.nesterov is False


def test_steps_follow_from_tokens() -> None:
    """20 tokens per parameter: d32's 37.6 B tokens are nanochat's 71,680 steps of 524,288."""
    config = config_rules.resolve(Config(model=configs.Model(depth=32)))
    assert config.train.steps == 71_680 and config.train.tokens == 37_580_963_840


# A mistake: random -> (arguments, words that the error must hold). {} stands for the run folder's parent.
Mistake = Callable[[random.Random], tuple[list[str], str]]


def _typo(rng: random.Random) -> tuple[list[str], str]:
    key = rng.choice(list(configs.keys(Config())))
    at = rng.randrange(len(key) + 1)
    wrong = rng.choice(
        [key[:at] + rng.choice("qxz_") + key[at:], key.replace(".", "_"), key.upper(), key.split(".")[1]]
    )
    return [f"--{wrong}=1"], "no such key"


def _wrong_type(rng: random.Random) -> tuple[list[str], str]:
    numbers = [name for name, key in configs.keys(Config()).items() if key.type in (int, float)]
    key = rng.choice(numbers)
    value = rng.choice(["", "abc", "nan", "inf", "-inf", "1e400", "0x10", "1,5", "None", "1 2", "[]", "--", "٣x", "1e"])
    return [f"--{key}={value}"], f"--{key}="


def _fraction(rng: random.Random) -> tuple[list[str], str]:
    key = rng.choice([name for name, key in configs.keys(Config()).items() if key.type is int])
    return [f"--{key}={rng.choice(['1.5', '0.1', '1e-3', '1e30', '-3.7'])}"], f"--{key}="


def _choice(rng: random.Random) -> tuple[list[str], str]:
    others = ["f64", "int5", "", "F32", "fp8", "auto2"]
    keys = ["stored.blocks", "stored.adam", "accumulate.blocks", "compute.forward", "compute.dw", "compute.attention"]
    return [f"--{rng.choice(keys)}={rng.choice(others)}"], "choose one of"


def _bool(rng: random.Random) -> tuple[list[str], str]:
    return [f"--{rng.choice(['optim.nesterov', 'train.tensorboard'])}={rng.choice(['2', 'maybe', '', 'tru'])}"], "bool"


def _not_positive(rng: random.Random) -> tuple[list[str], str]:
    keys = ["model.depth", "model.head_dim", "model.vocab", "model.seq", "model.softcap", "model.rope_base"]
    keys += ["train.microbatch", "model.qk_scale", "train.log_every", "optim.ns_steps", "compute.loss_chunk"]
    key = rng.choice([*keys, "profile.steps", "checkpoint.keep_last"])
    return [f"--{key}={rng.choice([0, -1, -1000])}"], f"--{key}="


def _negative(rng: random.Random) -> tuple[list[str], str]:
    keys = ["model.width", "train.steps", "train.tokens", "train.seed", "eval.every", "eval.tokens", "checkpoint.every"]
    key = rng.choice([*keys, "optim.matrix_lr", "train.tokens_per_step", "optim.clip", "optim.momentum_warmup"])
    return [f"--{key}={-rng.randrange(1, 100)}"], f"--{key}="


def _fractions_of_one(rng: random.Random) -> tuple[list[str], str]:
    key = rng.choice(["momentum", "momentum_start", "beta1", "beta2", "warmdown", "final_lr"])
    return [f"--optim.{key}={rng.choice(['1.5', '-0.1', '2', '100'])}"], f"--optim.{key}="


SIZES = [
    (["--model.head_dim=33"], "model.head_dim"),
    (["--model.width=65"], "head_dim"),
    (["--model.width=100"], "head_dim"),
    (["--model.vocab=65537"], "65536"),
    (["--train.tokens_per_step=100"], "try 128"),
    (["--model.seq=33"], "66"),
    (["--train.microbatch=3"], "microbatch"),
    (["--compute.loss_chunk=48"], "loss_chunk"),
    (["--model.depth=1000000000"], "10000"),
    (["--model.family=2026", "--model.depth=1000000000"], "10000"),
    (["--model.depth=1000", "--model.width=12800"], "10^12"),
    (["--train.seed=4294967296"], "2^32"),
    (["--model.head_dim=1"], "even"),
    (["--train.steps=3000000000"], "2^31"),
    (["--optim.warmup=0.9", "--optim.warmdown=0.9"], "exceed"),
    (["--accumulate.blocks=momentum"], "nesterov"),
    (["--compute.residuals=everything"], "residuals"),
    (["--compute.residuals=qkv+nothing"], "residuals"),
]


FOLDERS = [
    (["--data.path=/nonexistent/data"], "/nonexistent/data"),
    (["--data.path="], "data"),
    (["--data.path={}"], "{}"),
    (["--data.path={}/tiny.py"], "tiny.py"),
    (["--train.run={}/tiny.py/run"], "cannot write"),
    (["--train.run=/proc/nanojax"], "cannot write"),
    (["--model.vocab=299"], "300"),
    (["--model.vocab=1"], "300"),
    (["--model.seq=65536", "--train.tokens_per_step=131072"], "65537"),
]


FORMS = [
    (["model.depth=3"], "expected --section.key=value"),
    (["--model.depth"], "expected --section.key=value"),
    (["3", "--model.depth"], "expected"),
    (["-x"], "expected"),
    (["--=3"], "no such key"),
    ([""], "expected"),
    (["--config=tinny"], "no such config"),
    (["--config={}/none.py"], "no such file"),
    (["--config="], "missing"),
]


MISTAKES: list[Mistake] = [
    _typo,
    _wrong_type,
    _fraction,
    _choice,
    _bool,
    _not_positive,
    _negative,
    _fractions_of_one,
    lambda rng: rng.choice(SIZES),
    lambda rng: rng.choice(FOLDERS),
    lambda rng: rng.choice(FORMS),
]


@pytest.fixture
def no_compile() -> Iterator[list[str]]:
    """Names of jax's compile events that happened; must stay empty."""
    happened: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "compile" in event:
            happened.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield happened
    jax.monitoring.unregister_event_duration_listener(listen)


def test_200_broken_configs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, no_compile: list[str]
) -> None:
    """200 random mistakes: exit 2, one line on stderr that names the culprit, nothing compiled, no run folder made."""
    rng = random.Random(0)
    monkeypatch.setattr("nanojax.xla.settings", lambda: None)
    monkeypatch.chdir(tmp_path)
    for number in range(200):
        wrong, words = MISTAKES[number % len(MISTAKES)](rng)
        wrong = [w.replace("{}", str(home)) for w in wrong]
        run = tmp_path / "run"
        arguments = [*tiny_run.arguments(home / "tiny.py", run), *wrong]
        monkeypatch.setattr("sys.argv", ["train", *arguments])
        status = 0
        try:
            cli.run_main(train.main)
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        assert status == 2, wrong
        assert len(said.err.splitlines()) == 1 and said.err.startswith("error: "), (wrong, said.err)
        assert words.replace("{}", str(home)) in said.err, (wrong, said.err)
        assert said.out == "" and not run.exists() and not no_compile, wrong


@pytest.mark.parametrize("old, new", configs.RENAMED.items())
def test_renamed_keys(old: str, new: str) -> None:
    """A run's old config.json is read under the new name; on a command line the old name is answered with the new one."""
    config = configs.override(config_files.load("demo"), {new: "bf16"})
    stored = configs.to_dict(config)
    section, name = new.split(".")
    stored[section][old.split(".")[1]] = stored[section].pop(name)
    assert config_rules.from_dict(stored) == config
    with pytest.raises(UserError, match=rf"--{old}: no such key; it is called {new} now"):
        config_files.load("demo", [f"--{old}=bf16"])


def test_harmful_changes() -> None:
    """What a key does to a resumed run: nothing, other rounding, another schedule; all others change its results."""
    earlier = config_files.load("demo")
    harmless = ["--train.run=elsewhere", "--eval.every=3", "--checkpoint.every=7", "--profile.start=2", "--data.path=b"]
    other = ["--compute.residuals=inputs", "--optim.warmdown=0.5", "--train.seed=1", "--stored.blocks=bf16"]
    now = config_files.load("demo", [*harmless, "--train.log_every=5", *other])
    changed = {effect: configs.changes(earlier, now, effect) for effect in ("rounding", "schedule", "results")}
    assert changed["rounding"] == {"compute.residuals": ("cheap", "inputs")}
    assert changed["schedule"] == {"optim.warmdown": (0.2, 0.5)}
    assert changed["results"] == {"stored.blocks": ("f32", "bf16"), "train.seed": (0, 1)}
    assert set(configs.changes(earlier, now, "none")) == {a[2:].split("=")[0] for a in harmless} | {"train.log_every"}


def test_large_whole_numbers_are_exact() -> None:
    """Beyond 2^53, where a float is inexact; and 2e9 is a whole number, 2^63 is too large."""
    exact = configs.override(Config(), {"train.tokens": "9007199254740993", "train.steps": "2e9"}).train
    assert (exact.tokens, exact.steps) == (9007199254740993, 2_000_000_000)
    with pytest.raises(UserError, match="expected int"):
        configs.override(Config(), {"train.tokens": "9223372036854775808"})


def test_nearest_names() -> None:
    """A mistyped key or config is answered with the nearest ones."""
    with pytest.raises(UserError, match=r"did you mean model\.depth"):
        config_files.load("demo", ["--model.dept=3"])
    with pytest.raises(UserError, match=r"did you mean .*compute\.forward"):
        config_files.load("demo", ["--forward=int8"])
    with pytest.raises(UserError, match=r"did you mean .*d32_4070"):
        config_files.load("d32_407")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "x = ",
        "def get_config(): return 3",
        "def get_config(): return 1/0",
        "import nothing_of_this_name",
        "raise SystemError('no')",
    ],
)
def test_broken_config_files(tmp_path: Path, content: str) -> None:
    """A config file that does not work is named with the reason."""
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(UserError, match=r"broken\.py: "):
        config_files.load(str(tmp_path / "broken.py"))


def test_values_behind_a_space() -> None:
    """`--key value` is `--key=value`, negative numbers too; in the files, wrong types are told as on the command line."""
    spaced = config_files.load("demo", ["--model.depth", "2", "--profile.start", "-1", "--train.steps=5"])
    assert spaced == config_files.load("demo", ["--model.depth=2", "--profile.start=-1", "--train.steps=5"])
    wrong = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, depth="two"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--model\.depth=two: expected int"):
        config_rules.resolve(wrong)


def test_home_folder_in_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in every key that is a path, from the command line or the file; not in other text."""
    monkeypatch.setenv("HOME", "/h")
    names = [name for name, _, field, _ in configs._fields(Config()) if field.metadata["path"]]
    assert names == ["data.path", "rl.source", "rl.words", "train.run", "train.init", "eval.core_bundle"]
    config = config_files.load("demo", [f"--{name}=~/x" for name in [*names, "eval.prompt"]])
    found = configs.keys(config)
    assert {found[name].value for name in names} == {"/h/x"} and config.eval.prompt == "~/x"
