"""The loop: compiles once, donates, stops on signals and NaN, resumes, and tells of mistakes before it compiles."""

import functools
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import top_kernels
from helpers import tiny_run

from nanojax import cli, files, step, train
from nanojax import config as configs
from nanojax.card import traced
from nanojax.data import loader
from nanojax.run import checkpoint, exits, metrics, run_folder

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = pytest.mark.usefixtures("compile_cache")
Values = dict[str, jax.Array]  # the metrics that a step returns beside its state


def change_step(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[step.State, Values], tuple[step.State, Values]]
) -> None:
    """Until the test ends, a train step returns `change` of what it computed. `change` is traced and compiled with it."""
    original = step.train_step

    def changed(config: configs.Config, state: step.State, batch: step.Batch) -> tuple[step.State, Values]:
        return change(*original(config, state, batch))

    monkeypatch.setattr(step, "train_step", changed)


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The run folder of an uninterrupted run."""
    run = home / "whole"
    train.train(tiny_run.load(home / "tiny.py", run))
    return run


def test_run_folder(whole: Path) -> None:
    """Twelve steps leave 12 train records, evaluations at 5, 10 and 12, samples, TensorBoard events, 2 checkpoints."""
    records = metrics.read(whole)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [5, 10, 12]
    assert [r["step"] for r in records if r["kind"] == "sample"] == [5, 10, 12]
    assert records[0]["kind"] == "start"
    assert run_folder.available(whole) == [9, 12]
    assert list((whole / "tensorboard").glob("events*"))
    assert json.loads((whole / "config.json").read_text())["train"]["run"] == str(whole)
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    # the head starts at zero, so the first loss is ln V up to rounding
    assert losses[0] == pytest.approx(math.log(320), rel=1e-5) and losses[-1] < losses[0] - 0.5


def test_same_command_after_the_end(whole: Path, home: Path, capsys: pytest.CaptureFixture) -> None:
    """A finished run does nothing more and writes nothing."""
    before = (whole / metrics.FILE).read_bytes()
    train.train(tiny_run.load(home / "tiny.py", whole))
    assert (whole / metrics.FILE).read_bytes() == before
    assert "all 12 steps are done" in capsys.readouterr().out


@pytest.mark.long
def test_compiles_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The train step is traced once and compiled once in a run of 7 steps; nothing at all compiles after step 2."""
    traced, compiled = [], []

    def counting(state: step.State, values: Values) -> tuple[step.State, Values]:
        traced.append(1)
        return state, values

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(metrics.read(tmp_path / "run", "train")))

    change_step(monkeypatch, counting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        never = dict(eval__every=0, eval__prompt="", checkpoint__every=0)
        train.train(tiny_run.load(home / "tiny.py", tmp_path / "run", train__steps=7, **never))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(traced) == 1
    assert compiled and sum(at in (2, 3, 4, 5, 6) for at in compiled) == 0


@pytest.mark.long
def test_donation(home: Path, tmp_path: Path) -> None:
    """All of the state's bytes are aliased to the step's output, and the buffers of a restored state are reused."""
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", train__steps=2)
    train.train(config)
    abstract, batch = step.abstract_state(config), step.abstract_batch(config)
    compiled = jax.jit(functools.partial(step.train_step, config), donate_argnums=0).lower(abstract, batch).compile()
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    memory = compiled.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == size
    restored = checkpoint.restore(tmp_path / "run", config)
    assert restored is not None
    state = restored[0]
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size > 1}
    new, _ = compiled(state, step.Batch(jnp.zeros(config.batch_shape, jnp.int32)))
    reused = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new) if leaf.size > 1}
    assert len(pointers & reused) == len(pointers)


@pytest.mark.long
def test_bpb_is_the_losses(whole: Path, home: Path) -> None:
    """The logged bits per byte equal a computation by hand from the full logits (1e-5 relative)."""
    from nanojax import model

    config, params, tokenizer = checkpoint.load_params(whole)
    nats = size = 0.0
    sizes = tokenizer.bytes_per_token()
    batches = list(loader.valid_batches(config.data.path, 1, 32))[: 256 // 32]
    for batch in batches:
        logits = np.asarray(model.forward(config, params, jnp.asarray(batch[:, :-1])), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(logp, batch[:, 1:, None], -1)[..., 0]
        nats += (nll * (sizes[batch[:, 1:]] > 0)).sum()
        size += sizes[batch[:, 1:]].sum()
    assert metrics.read(whole, "eval")[-1]["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.long
def test_resume_in_process(whole: Path, home: Path, tmp_path: Path) -> None:
    """A run stopped by SIGTERM in mid-flight and resumed equals the uninterrupted run bit by bit, records included."""
    run = tmp_path / "run"
    thread = tiny_run.stop_after(run, 4)
    assert train.train(tiny_run.load(home / "tiny.py", run)) == exits.STOPPED
    thread.join()
    stopped = run_folder.available(run)[-1]
    assert 4 <= stopped < 12
    assert metrics.read(run, "train")[-1]["step"] == stopped
    train.train(tiny_run.load(home / "tiny.py", run))
    tiny_run.assert_same_run(whole, run)


def _kill_and_resume(home: Path, cache: Path, kills: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    often = dict(train__steps=steps, checkpoint__every=2, eval__every=0)
    reference, run = home / f"kill{steps}_reference", home / f"kill{steps}"
    train.train(tiny_run.load(home / "tiny.py", reference, **often))
    cut = 0
    for kill in range(kills):
        process = tiny_run.spawn(home / "tiny.py", run, cache, **often)
        begun = run_folder.available(run)[-1] if run_folder.available(run) else 0
        goal = begun + rng.integers(1, max(2, (steps - begun) // (kills - kill + 1)))
        tiny_run.wait_for(process, lambda goal=goal: any(r["step"] >= goal for r in metrics.read(run, "train")[-1:]))
        time.sleep(rng.uniform(0, 0.1))  # a step and a save of this model take about 20 and 100 ms
        cut += any((run / run_folder.CHECKPOINTS).glob("*tmp*"))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    train.train(tiny_run.load(home / "tiny.py", run, **often))
    tiny_run.assert_same_run(reference, run)
    assert not list((run / run_folder.CHECKPOINTS).glob("*tmp*"))
    print(f"{cut} of {kills} kills fell into a save")


@pytest.mark.long
def test_kill_9(home: Path, compile_cache: Path) -> None:
    """Two kill -9 at random moments: everything equals the uninterrupted run bit by bit."""
    _kill_and_resume(home, compile_cache, kills=2, steps=80, seed=0)


@pytest.mark.slow
def test_kill_9_twenty_times(home: Path, compile_cache: Path) -> None:
    """Twenty kill -9 at random moments of one run, most of them during a save."""
    _kill_and_resume(home, compile_cache, kills=20, steps=200, seed=1)


@pytest.mark.long
def test_second_sigint_exits_at_once(home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """The first SIGINT waits for a step of 20 seconds; the second ends the process within 3, status 130."""
    run = tmp_path / "run"
    process = tiny_run.spawn(home / "tiny.py", run, compile_cache, train__tokens_per_step=64 * 20000, train__steps=1000)
    tiny_run.wait_for(process, (run / metrics.FILE).exists)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    process.communicate()
    assert process.returncode == 130
    assert time.monotonic() - begin < 3
    assert run_folder.available(run) == []


@pytest.mark.long
def test_sigint_and_restart(home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """SIGINT: exit 3, the message says how to go on, the step is saved. A signal before the loop: exit 4, which it says."""
    run = tmp_path / "run"
    process = tiny_run.spawn(home / "tiny.py", run, compile_cache, train__steps=100000)
    tiny_run.wait_for(process, lambda: metrics.read(run, "train"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == exits.STOPPED
    assert "the same command resumes" in output
    step_saved = run_folder.available(run)[-1]
    assert metrics.read(run, "train")[-1]["step"] == step_saved
    early = tiny_run.spawn(home / "tiny.py", tmp_path / "early", compile_cache)
    tiny_run.wait_for(early, (tmp_path / "early" / "config.json").exists)
    early.send_signal(signal.SIGTERM)
    output, _ = early.communicate()
    assert early.returncode == exits.STOPPED_UNSAVED and "nothing was saved" in output
    assert run_folder.available(tmp_path / "early") == []


@pytest.mark.long
def test_nan_stops(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A NaN loss at step 8 ends with exit 1, naming step and last good checkpoint; nothing of it is saved or logged."""

    def poisoned(state: step.State, values: Values) -> tuple[step.State, Values]:
        return state, {**values, "loss": jnp.where(state.step == 8, jnp.nan, values["loss"])}

    change_step(monkeypatch, poisoned)
    monkeypatch.setattr("sys.argv", ["train", *tiny_run.arguments(home / "tiny.py", tmp_path / "run")])
    monkeypatch.setattr("nanojax.xla.settings", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.run_main(train.main)
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "step 8: loss is nan" in said[0] and f"{tmp_path}/run/checkpoints/6" in said[0]
    assert run_folder.available(tmp_path / "run") == [3, 6]
    assert metrics.read(tmp_path / "run", "train")[-1]["step"] == 7


@pytest.mark.long
def test_bad_state_is_not_saved(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that overflow while the loss still looks fine are refused by the save itself."""

    def poisoned(state: step.State, values: Values) -> tuple[step.State, Values]:
        head = jnp.where(state.step == 3, jnp.inf, state.params["head"])
        return state._replace(params={**state.params, "head": head}), values

    change_step(monkeypatch, poisoned)
    with pytest.raises(train.Diverged, match=r"step 3: params/head holds NaN or Inf, not saved"):
        train.train(tiny_run.load(home / "tiny.py", tmp_path / "run"))
    assert run_folder.available(tmp_path / "run") == []


def test_changed_config(whole: Path, home: Path, tmp_path: Path) -> None:
    """A changed seed and rate are named, both values told; logging, evaluation and checkpointing may change."""
    with pytest.raises(cli.UserError, match=r"optim.matrix_lr \(was 0.02, now 0.5\), train.seed \(was 0, now 1\)"):
        train.train(tiny_run.load(home / "tiny.py", whole, train__seed=1, optim__matrix_lr=0.5))
    harmless = dict(
        train__log_every=5, eval__every=3, checkpoint__every=7, profile__start=1, train__tensorboard="false"
    )
    train.train(tiny_run.load(home / "tiny.py", whole, **harmless))


def test_two_runs_in_one_folder(home: Path, tmp_path: Path) -> None:
    """The second process is refused."""
    other = pytest.raises(cli.UserError, match="another process is using it")
    with files.locked(tmp_path / "run", "--train.run"), other:
        train.train(tiny_run.load(home / "tiny.py", tmp_path / "run"))


@pytest.mark.long
def test_profile(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A trace of 2 steps names the steps and the layers, and the command prints its top kernels."""
    run = tmp_path / "run"
    train.train(tiny_run.load(home / "tiny.py", run, train__steps=5, profile__start=2, profile__steps=2))
    found, steps = top_kernels.with_sources(traced.newest_trace(run))
    assert steps == 2
    assert any("Block" in source for _, source in found) and all(k.ns >= 0 and k.times for k, _ in found)
    monkeypatch.setattr("sys.argv", ["top_kernels.py", str(run), "--top=5"])
    top_kernels.main()
    assert "2 steps" in " ".join(capsys.readouterr().out.split())  # a long path wraps the title
    with pytest.raises(cli.UserError, match="no profiler trace"):
        traced.newest_trace(tmp_path / "nothing")


NEWEST = dict(
    model__family="2026", model__window=8, stored__value="int8", optim__muon="normuon", optim__matrix_decay=0.3
)


@pytest.mark.long
@pytest.mark.parametrize("family", [NEWEST, pytest.param({}, marks=pytest.mark.slow)], ids=["2026", "2025"])
def test_int8_resume(home: Path, tmp_path: Path, family: dict[str, Any]) -> None:
    """The same bit-exactness with everything stored in int8 and rounded stochastically: 4 + 4 steps equal 8."""
    low = family | dict(
        stored__blocks="int8", stored__embed="bf16", stored__head="bf16", stored__momentum="int8", stored__adam="int8",
        accumulate__blocks="bf16", accumulate__embed_head="bf16", compute__dtype="bf16", compute__forward="int8",
        compute__dx="int8", compute__dw="int8", train__steps=6, checkpoint__every=0, eval__every=0, model__width=128,
        model__head_dim=64,
    )  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    train.train(tiny_run.load(home / "tiny.py", whole, **low))
    thread = tiny_run.stop_after(run, 2)
    train.train(tiny_run.load(home / "tiny.py", run, **low))
    thread.join()
    assert run_folder.available(run)[-1] < 6
    train.train(tiny_run.load(home / "tiny.py", run, **low))
    tiny_run.assert_same_run(whole, run)


@pytest.mark.parametrize("subcommand", [["--help"], ["--config=demo", "--help"]])
def test_help(subcommand: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """--help lists every key with type and meaning, and with a config its values."""
    monkeypatch.setattr("sys.argv", ["train", *subcommand])
    train.main()
    text = capsys.readouterr().out
    for key, (_, _, meaning) in configs.keys(configs.Config()).items():
        assert f"--{key}=" in text and meaning in text
    if len(subcommand) == 2:
        assert "--model.seq=256" in text


@pytest.mark.long
def test_mistakes_as_processes(home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """The real command: one line on stderr, exit 2, nothing on stdout, nothing written."""
    for extra in ({"model__dept": 3}, {"model__vocab": 299}, {"compute__residuals": "auto"}):
        process = tiny_run.spawn(home / "tiny.py", tmp_path / "run", compile_cache, **extra)
        output, _ = process.communicate()
        assert process.returncode == 2, output
        assert len(output.splitlines()) == 1 and output.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_every_metric_is_checked(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite gradient norm stops the run as a NaN loss does, though the loss is finite."""

    def poisoned(state: step.State, values: Values) -> tuple[step.State, Values]:
        return state, {**values, "grad_norm": jnp.where(state.step == 2, jnp.inf, values["grad_norm"])}

    change_step(monkeypatch, poisoned)
    with pytest.raises(train.Diverged, match="step 2: grad_norm is inf"):
        train.train(tiny_run.load(home / "tiny.py", tmp_path / "run"))
