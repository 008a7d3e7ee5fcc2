"""CORE within a training: logged at its steps, equal to evaluating the checkpoint, cut off by a signal, mistakes told first."""

import json
import threading
from pathlib import Path

import jax
import pytest
import yaml
from helpers import tiny_run
from tensorboardX.proto import event_pb2

from nanojax import config, step, train
from nanojax.evaluate import __main__ as evaluate
from nanojax.evaluate import core
from nanojax.run import checkpoint, metrics

compile_cache = tiny_run.compile_cache
pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, tiny.py and bundle/ (two tasks, one shot each)."""
    folder = tmp_path_factory.mktemp("train")
    tiny_run.make_config(folder, tiny_run.make_data(folder))
    data = folder / "bundle" / "eval_data"
    data.mkdir(parents=True)
    choice = [{"query": f"the law {i}", "choices": ["of peace", "honor"], "gold": i % 2} for i in range(9)]
    language = [{"context": f"the people {i}", "continuation": "have met"} for i in range(9)]
    tasks = []
    for label, kind, items in (("choice", "multiple_choice", choice), ("lm", "language_modeling", language)):
        (data / f"{label}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        tasks.append({"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [1], "icl_task_type": kind})
    (folder / "bundle" / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    (folder / "bundle" / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,50\nlm,0\n")
    return folder


def _overrides(home: Path) -> dict:
    """CORE every 2 steps on 6 examples a task, of a run of 3 steps."""
    return {
        "model__depth": 1,
        "train__steps": 3,
        "eval__sample_tokens": 0,
        "eval__core_every": 2,
        "eval__core_per_task": 6,
        "eval__core_bundle": home / "bundle",
    }


def _events(folder: Path) -> list:
    events = []
    for path in sorted(folder.glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = content[at + 12 : at + 12 + size]
            events.append(event_pb2.Event.FromString(event))  # pyright: ignore[reportAttributeAccessIssue]
            at += 16 + size
    return events


def test_core_is_logged_at_its_steps(home: Path) -> None:
    """At steps 2 and 3 of 3; the last record is what evaluating the saved parameters gives; TensorBoard has the same."""
    run = home / "run"
    train.train(tiny_run.load(home / "tiny.py", run, **_overrides(home)))
    records = metrics.read(run, "core")
    assert [r["step"] for r in records] == [2, 3]
    assert all(r["examples"] == 12 for r in records)
    resolved, params, tokenizer = checkpoint.load_params(run)
    events = list(
        evaluate.evaluate_core(resolved, params, tokenizer, home / "bundle", 6, 64)
    )  # a microbatch's 64 tokens
    results = {e["task"]: e for e in events if "accuracy" in e}
    assert records[-1]["tasks"] == {label: r["centred"] for label, r in results.items()}
    assert records[-1]["core"] == core.core_of(results)
    scalars = {(e.step, v.tag): v.simple_value for e in _events(run / "tensorboard") for v in e.summary.value}
    for record in records:
        for label, value in {"CORE": record["core"], **record["tasks"]}.items():
            assert scalars[record["step"], f"core/{label}"] == pytest.approx(value)


def test_core_is_off_by_default(home: Path) -> None:
    """No key set: no task is loaded, whether or not there is a bundle."""
    assert train._core_tasks(tiny_run.load(home / "tiny.py", home / "off")) == []


def test_a_signal_cuts_core_off(home: Path) -> None:
    """Told to stop, it ends after the examples it is at and logs no half result."""
    resolved = tiny_run.load(home / "tiny.py", home / "cut", **_overrides(home))
    params = jax.jit(step.init_state, static_argnums=0)(resolved).params
    tokenizer = train.Tokenizer.load(Path(resolved.data.path) / "tokenizer")
    (home / "cut").mkdir()
    log, stop = metrics.Metrics(resolved, home / "cut", 0), threading.Event()
    stop.set()
    train._core(resolved, params, tokenizer, train._core_tasks(resolved), 3, log, stop)
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
def test_mistakes_are_told_before_anything_compiles(
    key: str, value: object, message: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One line on stderr, exit code 2, no word of compiling, no run folder."""
    overrides = _overrides(home) | {f"eval__{key}": value}
    arguments = tiny_run.arguments(home / "tiny.py", home / "never", **overrides)
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        config.run_main(train.main)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and message in err and err.count("\n") == 1
    assert "compiling" not in out and not (home / "never").exists()
