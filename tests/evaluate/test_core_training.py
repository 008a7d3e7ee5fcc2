"""CORE during training: logged at its steps, equal to evaluating the checkpoint, cut off by a signal, mistakes reported first."""

import functools
import threading
from pathlib import Path

import jax
import pytest
from helpers import core_bundle, tensorboard, tiny_run

from nanojax import cli, step, train
from nanojax.evaluate import core
from nanojax.run import checkpoint, guard, metrics, watch

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = pytest.mark.usefixtures("compile_cache", "bundle")


@pytest.fixture(scope="module")
def bundle(home: Path) -> Path:
    """A bundle of two tasks beside data/ and tiny.py."""
    return core_bundle.write_small(home / "bundle")


def _overrides(home: Path) -> dict:
    """CORE every 2 steps on 6 examples per task, in a run of 3 steps."""
    return {
        "model__depth": 1,
        "train__steps": 3,
        "eval__sample_tokens": 0,
        "eval__core_every": 2,
        "eval__core_per_task": 6,
        "eval__core_bundle": home / "bundle",
    }


@pytest.mark.long
def test_core_is_logged_at_its_steps(home: Path) -> None:
    """At steps 2 and 3 of 3; the last record is what evaluating the saved parameters gives; TensorBoard has the same."""
    run = home / "run"
    train.train(tiny_run.load(home / "tiny.py", run, **_overrides(home)))
    records = metrics.read(run, "core")
    assert [r["step"] for r in records] == [2, 3]
    assert all(r["examples"] == 12 for r in records)
    resolved, params, tokenizer = checkpoint.load_params(run)
    microbatch = 64  # tokens
    tasks = core.load_tasks(home / "bundle")
    run_again = core.evaluate(resolved, params, tokenizer, tasks, 6, microbatch)
    scores = [score for score in run_again if score.finished]
    assert records[-1]["tasks"] == {score.task.label: score.centred for score in scores}
    assert records[-1]["core"] == core.core_of(scores)
    scalars = {
        (e.step, v.tag): v.simple_value for e in tensorboard.events(run / "tensorboard") for v in e.summary.value
    }
    for record in records:
        for label, value in {"CORE": record["core"], **record["tasks"]}.items():
            assert scalars[record["step"], f"core/{label}"] == pytest.approx(value)


def test_core_is_off_by_default(home: Path) -> None:
    """No key set: no task is loaded, whether or not there is a bundle."""
    assert core.tasks_of(tiny_run.load(home / "tiny.py", home / "off")) == []


def test_a_signal_cuts_core_off(home: Path) -> None:
    """Told to stop, it ends after the examples it is at and logs no half result."""
    resolved = tiny_run.load(home / "tiny.py", home / "cut", **_overrides(home))
    state = jax.jit(step.init_state, static_argnums=0)(resolved)
    tokenizer = train.Tokenizer.load(Path(resolved.data.path) / "tokenizer")
    (home / "cut").mkdir()
    log, stop = metrics.Metrics(resolved, home / "cut", 0), threading.Event()
    stop.set()
    alive = functools.partial(guard.alive, watch.Watch(home / "cut", 0), stop)
    guard.attempt(log, "CORE", train._core, resolved, state, tokenizer, core.tasks_of(resolved), log, alive)
    log.close()
    assert metrics.read(home / "cut", "core") == []


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("core_bundle", "nowhere", "--eval.core_bundle=nowhere: core.yaml is missing"),
        ("core_per_task", 1, "--eval.core_per_task must be above 1"),
        ("core_every", -1, "--eval.core_every=-1: must be at least 0"),
    ],
)
def test_mistakes_are_reported_before_anything_compiles(
    key: str, value: object, message: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One line on stderr, exit code 2, no word of compiling, no run folder."""
    overrides = _overrides(home) | {f"eval__{key}": value}
    arguments = tiny_run.arguments(home / "tiny.py", home / "never", **overrides)
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run_main(train.main)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and message in err and err.count("\n") == 1
    assert "compiling" not in out and not (home / "never").exists()
