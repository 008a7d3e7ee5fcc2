"""scripts/quality.py on a tiny model: runs are paired and resumable, and the table follows from the runs' files."""

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import quality

from nanojax import config_files
from nanojax.cli import UserError
from nanojax.config import Model
from nanojax.data import loader
from nanojax.data.__main__ import main as data_main
from nanojax.tokenizer import Tokenizer


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    quality.main()


@pytest.mark.slow
def test_run_resume_report(tmp_path, monkeypatch, capsys):
    """Two seeds of two arms train; a second call trains nothing; the table follows from the files; arms share data."""
    runs = [("d1", arm, 1.0, seed) for seed in (0, 1) for arm in ("f32", "b2.67")]
    monkeypatch.setattr(quality, "SIZES", {"d1": Model(depth=1, width=64)})
    monkeypatch.setattr(quality, "PLANS", {"two": runs})
    texts = [tmp_path / "train.txt", tmp_path / "valid.txt"]
    for start, path in enumerate(texts):
        path.write_text("\n".join(f"The {i}th sentence tells of {i * i} things." for i in range(start, 4000, 2)))
    prepare = ["prepare", "--input", *map(str, texts), "--out", str(tmp_path / "data"), "--vocab", "300"]
    monkeypatch.setattr(sys, "argv", ["data", *prepare, "--valid", "last", "--workers", "1"])
    data_main()
    out = tmp_path / "runs"
    sizes = ["--steps=6", "--tokens-per-step=64", "--seq=32", "--vocab=300"]
    run = ["run", "two", "--data", str(tmp_path / "data"), "--out", str(out), *sizes]
    call(monkeypatch, *run)
    files = sorted(out.glob("*.jsonl"))
    assert len(files) == 4 and not list(out.glob("*.part"))
    times = [f.stat().st_mtime_ns for f in files]
    call(monkeypatch, *run)
    assert [f.stat().st_mtime_ns for f in files] == times
    assert capsys.readouterr().out.count("finished before") == 4

    results = {r.run[1:]: r for r in map(quality.read, files)}
    first = [results[(arm, 1.0, 0)].curve[0][1] for arm in ("f32", "b2.67")]
    assert first[0] == pytest.approx(first[1], abs=0.1)  # the same data and initial parameters
    assert results[("f32", 1.0, 0)].curve != results[("f32", 1.0, 1)].curve
    call(monkeypatch, "report", "--out", str(out))
    gaps = [results[("b2.67", 1.0, s)].valid[-1][1] - results[("f32", 1.0, s)].valid[-1][1] for s in (0, 1)]
    row = next(line for line in (out / "table.md").read_text().splitlines() if "| b2.67 |" in line)
    assert f"{sum(gaps) / 2:+.4f} ±" in row and "| 2 |" in row
    first = results[("f32", 1.0, 0)]
    rising = dataclasses.replace(first, curve=[(i, float(i)) for i in range(10)])
    assert not rising.falls and dataclasses.replace(first, curve=[(i, -y) for i, y in rising.curve]).falls
    known = np.concatenate(
        [r[:, 1:].ravel() for r in loader.valid_batches(first.config.data.path, 8, first.config.model.T)]
    )
    share = np.bincount(known, minlength=first.config.model.V) / known.size
    least = -np.sum(share * np.log(share, where=share > 0, out=np.zeros_like(share)))
    assert (
        least < quality.unigram(first.config) < np.log(first.config.model.V)
    )  # no unigram model fits the text better than its own
    if importlib.util.find_spec("matplotlib"):
        assert (out / "loss.png").stat().st_size > 5000

    files[0].write_text(json.dumps({"run": 1}))
    with pytest.raises(UserError, match="not a finished run"):
        call(monkeypatch, "report", "--out", str(out))


def test_arms_are_configs():
    """Every arm of every plan resolves; the learning-rate factor reaches all three rates; arms of a shipped
    config store, compute and update as it does."""
    for plan in quality.PLANS.values():
        for run in plan:
            quality.make_config(run, "data", 300, 4096, 256, 2048)
    one, two = (
        quality.make_config(("d3", "adamw", rate, 0), "data", 300, 4096, 256, 2048).optim for rate in (1.0, 2.0)
    )
    for arm, name in {"nf4": "d32_4070_nf4", "int3-adamw8": "d32_4070_int3_adamw8", "largest": "largest_4070"}.items():
        ours, theirs = quality.make_config(("d3", arm, 1.0, 0), "data", 300, 4096, 256, 2048), config_files.load(name)
        assert (ours.stored, ours.accumulate, ours.optim) == (theirs.stored, theirs.accumulate, theirs.optim), arm
        same = {"residuals": "all", "loss_chunk": ours.compute.loss_chunk}
        assert ours.compute == dataclasses.replace(theirs.compute, **same), arm
    assert [two.matrix_lr, two.embed_lr, two.head_lr] == [2 * x for x in (one.matrix_lr, one.embed_lr, one.head_lr)]


def test_arms_of_the_recipe():
    """The int8 arm stores and computes as d28_2026_4070; its rates are the law's times RATES, as those of the f32 arm with
    which it is compared; both train with the FLOPs of the older model."""
    int8, f32, old = (
        quality.make_config(("d2", arm, 1.0, 0), "data", 300, 4096, 256, 2048) for arm in ("2026-int8", "2026", "f32")
    )
    shipped = config_files.load("d28_2026_4070")
    assert (int8.stored, int8.accumulate) == (shipped.stored, shipped.accumulate)
    assert (int8.compute.forward, int8.compute.dx, int8.compute.dw) == ("int8", "int8", "int8")
    rates = {key: quality.RATES * getattr(shipped.optim, key) for key in ("matrix_lr", "embed_lr", "head_lr")}
    assert int8.optim == f32.optim == dataclasses.replace(shipped.optim, **rates)
    flops = [c.train.tokens * c.model.flops_per_token for c in (f32, old)]
    assert flops[0] == pytest.approx(flops[1], rel=0.005)


def test_bits_per_byte(tmp_path, monkeypatch):
    """Of text of one-byte tokens, a nat is 1/ln 2 bits per byte; the begin token's share has no bytes."""
    config = quality.make_config(("d2", "f32", 1.0, 0), str(tmp_path), 300, 64, 32, 300)
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    tokenizer.save(tmp_path / "tokenizer")
    rows = np.full((8, 33), 65)
    monkeypatch.setattr(quality, "valid_rows", lambda config: [rows])
    assert quality.bits_per_byte(config) == pytest.approx(1 / np.log(2))
    rows[:, 1:17] = tokenizer.bos
    assert quality.bits_per_byte(config) == pytest.approx(2 / np.log(2))


def test_empty_folder(tmp_path, monkeypatch):
    """Without finished runs, the report says so."""
    with pytest.raises(UserError, match="no finished runs"):
        call(monkeypatch, "report", "--out", str(tmp_path))
