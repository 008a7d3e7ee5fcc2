"""Resuming with changes: other rounding, more steps, another run's weights; what is allowed, said, recorded and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import tiny_run

from nanojax import step as steps
from nanojax import train
from nanojax.cli import UserError
from nanojax.interop import convert
from nanojax.quant import decode_tree
from nanojax.run import checkpoint, metrics, resume, run_folder
from nanojax.tokenizer import Tokenizer

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.long]  # each begins with a run of 12 steps
PLANNED = dict(optim__warmdown=0.25, checkpoint__keep_last=9)  # of 12 steps, those from 9 on have a lower rate


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The run folder of 12 steps with checkpoints 3, 6, 9 and 12."""
    run = home / "whole"
    train.train(tiny_run.load(home / "tiny.py", run, **PLANNED))
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def go_on(home: Path, run: Path, **changes: Any) -> None:
    train.train(tiny_run.load(home / "tiny.py", run, **{**PLANNED, **changes}))


def without(run: Path, newest: int) -> None:
    """The run as it was when it had saved step `newest`."""
    for step in run_folder.available(run):
        if step > newest:
            shutil.rmtree(run / run_folder.CHECKPOINTS / str(step))


def test_what_only_rounds_otherwise_may_change(
    home: Path, whole: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    """Microbatch, residuals, loss_chunk: told in a line and a record with the step; the losses stay within rounding.

    The rows of each step are the same ones, so the losses of steps 7 to 12 differ by the order of sums only: 1e-5 relative
    is a hundred times f32's rounding.
    """
    without(run, 6)
    capsys.readouterr()
    changes = dict(train__microbatch=1, compute__residuals="inputs", compute__loss_chunk=16)
    go_on(home, run, **changes)
    said = [line for line in capsys.readouterr().out.splitlines() if "bit for bit" in line]
    assert len(said) == 1 and "train.microbatch (was 2, now 1)" in said[0] and "from step 7 on" in said[0]
    told = metrics.read(run, "rounding")
    assert (
        len(told) == 1 and told[0]["step"] == 6 and set(told[0]["changed"]) == {k.replace("__", ".") for k in changes}
    )
    losses = [[r["loss"] for r in metrics.read(folder, "train")] for folder in (whole, run)]
    assert losses[0][:6] == losses[1][:6] and losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert tiny_run.saved(run)[2] == tiny_run.saved(whole)[2]  # the data position
    capsys.readouterr()
    go_on(home, run, **changes)  # the same command again changes nothing more
    assert "bit for bit" not in capsys.readouterr().out


def test_an_extended_run_equals_a_longer_one(home: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    """Extended from the last checkpoint before warm-down, 12 steps become 18 that equal 18 steps from the start bit for bit.

    The steps that are trained again are kept aside, and the same command after a kill before the first save does it again.
    """
    longer = home / "longer"
    go_on(home, longer, train__steps=18)
    with pytest.raises(
        UserError, match=r"--train.extend=STEP goes on .*\(3, 6, 9, 12\).*: 9, the newest before"
    ) as told:
        go_on(home, run, train__steps=18)
    assert "train.steps (was 12, now 18)" in str(told.value)
    with pytest.raises(UserError, match=r"--train\.extend=5: no such checkpoint"):
        go_on(home, run, train__steps=18, train__extend=5)
    records = (run / metrics.FILE).read_text()
    capsys.readouterr()
    go_on(home, run, train__steps=18, train__extend=9)
    assert "extended as if it had been planned so" in capsys.readouterr().out
    (told,) = metrics.read(run, "extended")
    assert told["step"] == 9 and told["as_planned"] and told["changed"]["train.steps"] == [12, 18]
    assert (run / "superseded" / "12").is_dir() and (run / "superseded" / metrics.FILE).read_text() == records
    (run / metrics.FILE).write_text("".join(json.dumps(r) + "\n" for r in metrics.read(run) if r["kind"] != "extended"))
    tiny_run.assert_same_run(longer, run)
    go_on(home, run, train__steps=18, train__extend=9)  # does not go back to 9 again
    with pytest.raises(UserError, match="has this schedule already"):
        go_on(home, run, train__steps=18, train__extend=12)
    assert run_folder.available(run)[-1] == 18
    shutil.rmtree(run / run_folder.CHECKPOINTS / "12")
    without(run, 9)
    assert (
        resume.check(run, tiny_run.load(home / "tiny.py", run, **PLANNED, train__steps=18, train__extend=9)).step == 9
    )


def test_extending_after_warm_down_is_said(home: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    """From the end of a finished run: it goes on, and the line and the record say that no run is planned so."""
    go_on(home, run, train__steps=14, train__extend=12)
    assert "it jumps to the new schedule's at step 13" in capsys.readouterr().out
    (told,) = metrics.read(run, "extended")
    assert not told["as_planned"] and run_folder.available(run)[-1] == 14
    assert run_folder.read_config(run).train.extend == 12
    with pytest.raises(UserError, match="past its end"):
        go_on(home, run, train__steps=13, train__extend=14)


def test_what_changes_results_is_refused(home: Path, run: Path) -> None:
    """With train.extend too; and a run without checkpoints cannot be extended."""
    with pytest.raises(UserError, match=r"train.seed \(was 0, now 1\); choose another --train.run"):
        go_on(home, run, train__seed=1, train__steps=18, train__extend=9)
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        go_on(home, run.parent / "new", train__extend=9)


def test_weights_of_another_run(home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """train.init: step 0 has the other run's weights in this config's formats and a fresh optimizer; said and kept.

    f32 weights taken over as int8 decode to within half a step of each row's scale; taken over as f32, to the bit.
    """
    source = checkpoint.load(whole)
    same = tiny_run.load(home / "tiny.py", tmp_path / "same", train__init=whole)
    state, of_step = resume.init_state(same)
    assert of_step == source.step == 12 and int(state.step) == 0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(source.params), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(state.opt))
    int8 = tiny_run.load(home / "tiny.py", tmp_path / "int8", train__init=whole, stored__blocks="int8", train__steps=2)
    state, _ = resume.init_state(int8)
    assert jax.tree.structure(state) == jax.tree.structure(steps.abstract_state(int8))
    for a, b in zip(
        jax.tree.leaves(decode_tree(state.params, np.float32)), jax.tree.leaves(source.params), strict=True
    ):
        widest = np.abs(b).max(-1, keepdims=True)
        assert np.all(np.abs(a - b) <= widest / 127 * 0.5001)
    train.train(int8)
    assert f"weights of {whole}, step 12; fresh momenta" in capsys.readouterr().out
    (told,) = metrics.read(tmp_path / "int8", "init")
    assert told["from"] == str(whole) and told["from_step"] == 12
    first = metrics.read(tmp_path / "int8", "train")[0]["loss"]
    assert first < metrics.read(whole, "train")[5]["loss"]  # not ln V, where random weights begin
    on = tiny_run.load(home / "tiny.py", tmp_path / "int8", stored__blocks="int8", train__steps=2)
    assert resume.check(tmp_path / "int8", on).config.train.init == str(whole)
    same = tiny_run.load(
        home / "tiny.py", tmp_path / "int8", stored__blocks="int8", train__steps=2,
        train__init=f"{whole.parent}/./{whole.name}/",
    )  # fmt: skip
    assert resume.check(tmp_path / "int8", same).config.train.init == str(whole)
    elsewhere = tiny_run.load(
        home / "tiny.py", tmp_path / "int8", stored__blocks="int8", train__steps=2, train__init="x"
    )
    with pytest.raises(UserError, match=r"train.init \(was"):
        resume.check(tmp_path / "int8", elsewhere)


def test_weights_that_do_not_fit_are_refused_before_compiling(home: Path, whole: Path, tmp_path: Path) -> None:
    """Another shape, another tokenizer, no run: one line each, and no run folder config is written."""
    for changes, message in (
        (dict(model__depth=3), r"another shape: model.depth is 2, here 3"),
        (dict(model__width=128), r"model.width is 64, here 128"),
        (dict(train__init=tmp_path), r"not a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            train.train(tiny_run.load(home / "tiny.py", tmp_path / "new", **{"train__init": whole, **changes}))
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    Tokenizer(Tokenizer.load(whole / "tokenizer").tokens[:-1]).save(other / "tokenizer")
    with pytest.raises(UserError, match="has another tokenizer than"):
        train.train(tiny_run.load(home / "tiny.py", tmp_path / "new", train__init=other))
    assert not (tmp_path / "new" / "config.json").exists()


def test_an_imported_run_is_a_beginning(home: Path, whole: Path, tmp_path: Path) -> None:
    """Training in it is refused with the way to go; train.init takes it. Its config claims nothing about its training."""
    config, params, tokenizer, _ = checkpoint.load(whole)
    convert.export_transformers(tmp_path / "x", config, jax.tree.map(np.asarray, params), tokenizer)
    convert.to_run(convert.load(tmp_path / "x"), tmp_path / "imported")
    with pytest.raises(UserError, match=r"imported weights without optimizer state.*--train\.init="):
        go_on(home, tmp_path / "imported")
    assert set(json.loads((tmp_path / "imported" / "config.json").read_text())) == {
        "name", "model", "stored", "compute", "data"
    }  # fmt: skip
    go_on(home, tmp_path / "new", train__init=tmp_path / "imported", train__steps=1)
    assert metrics.read(tmp_path / "new", "train")[0]["loss"] < metrics.read(whole, "train")[5]["loss"]
