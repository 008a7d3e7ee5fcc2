"""Logs: the JSONL is complete and truncated on resume, TensorBoard agrees with it, speeds and MFU are right."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tensorboard
from rich.console import Console

from nanojax.config import Config
from nanojax.run import metrics

Make = Callable[..., Config]


def test_forget_after(tmp_path: Path) -> None:
    """Records after the restored step, and a line cut off by a crash, are dropped; the others do not change."""
    lines = [json.dumps({"kind": "train", "step": s, "loss": s / 3}) for s in range(1, 6)]
    (tmp_path / metrics.FILE).write_text("\n".join(lines) + '\n{"kind": "train", "st')
    metrics.forget_after(tmp_path, 3)
    assert (tmp_path / metrics.FILE).read_text() == "\n".join(lines[:3]) + "\n"
    metrics.forget_after(tmp_path / "nothing", 3)


def test_peak_flops() -> None:
    """The driver's name gives the card's dense bf16 peak (RTX 4070: 58.3 TFLOPs, 1 %), an unknown one None."""
    assert metrics.peak_flops("NVIDIA GeForce RTX 4070") == pytest.approx(58.3e12, rel=0.01)
    assert metrics.peak_flops("cpu") is None
    assert metrics.peak_flops("NVIDIA GeForce GTX 970") is None


def _log(config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> str:
    """A run of 4 steps, 2 s each, with an evaluation of 100 s after step 2; and what the console shows."""
    clock = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    log = metrics.Metrics(config, run, 0, Console(file=out, force_terminal=terminal, width=200))
    for step in range(1, 5):
        clock[0] += 2
        log.train(step, {"loss": 5.0 - step, "lr": 1.0})
        if step == 2:
            log.evaluation(step, {"bpb": 1.5, "nll": 3.25, "tokens": 10, "bytes": 40}, "some text")
            clock[0] += 100
            log.restart_clock(step)
    log.close()
    return out.getvalue()


def test_records(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokens/s is 128 tokens in 2 s whatever the evaluation took; MFU and power are null if they are unknown."""
    config = tiny(train=dict(steps=4))
    text = _log(config, tmp_path, monkeypatch, terminal=False)
    train = metrics.read(tmp_path, "train")
    assert [r["step"] for r in train] == [1, 2, 3, 4] and [r["tokens"] for r in train] == [128, 256, 384, 512]
    assert [r["tokens_per_s"] for r in train] == pytest.approx([64.0] * 4)
    assert all(r["mfu"] is None and r["watts"] is None and r["kwh"] is None for r in train)
    assert metrics.read(tmp_path, "eval")[0]["bpb"] == 1.5
    assert metrics.read(tmp_path, "sample")[0]["text"] == "some text"
    lines = text.splitlines()
    assert "step 1/4 · loss 4.0000 · 64 tok/s · MFU n/a · ETA 00:00:06" in lines
    assert any(
        line.startswith("step 2 · validation 1.5000 bits/byte, 3.2500 nats/token · 'some text'") for line in lines
    )
    assert "step 4/4 · loss 1.0000 · bpb 1.5000 · 64 tok/s · MFU n/a · ETA 00:00:00" in lines


def test_log_every(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """log_every 3 of 4 steps logs 3 and the last one."""
    _log(tiny(train=dict(steps=4, log_every=3)), tmp_path, monkeypatch, terminal=False)
    assert [r["step"] for r in metrics.read(tmp_path, "train")] == [3, 4]


def test_mfu(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a known device: FLOPs per token times tokens/s, over the peak."""
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e9)
    config = tiny(train=dict(steps=4))
    _log(config, tmp_path, monkeypatch, terminal=False)
    expected = config.model.flops_per_token * 64 / 1e9
    assert metrics.read(tmp_path, "train")[0]["mfu"] == pytest.approx(expected)


def test_terminal(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal there is one bar, and no line of training beside it; the evaluation's line stays above it."""
    text = _log(tiny(train=dict(steps=4)), tmp_path, monkeypatch, terminal=True)
    assert "step 4/4" in text and "some text" in text
    assert not any(line.startswith("step 1/4 ·") for line in text.splitlines())


def test_tensorboard(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event file holds losses, bits per byte and text of the JSONL; a resumed run purges what it repeats."""
    config = tiny(train=dict(steps=4))
    _log(config, tmp_path, monkeypatch, terminal=False)
    values = [(v.tag, e.step, v) for e in tensorboard.events(tmp_path / "tensorboard") for v in e.summary.value]
    assert [v.simple_value for tag, _, v in values if tag == "train/loss"] == [4.0, 3.0, 2.0, 1.0]
    assert [(step, v.simple_value) for tag, step, v in values if tag == "eval/bpb"] == [(2, 1.5)]
    assert any(tag.startswith("sample") and b"some text" in v.tensor.string_val[0] for tag, _, v in values)
    metrics.Metrics(config, tmp_path, 2, Console(file=io.StringIO())).close()
    assert 3 in [e.step for e in tensorboard.events(tmp_path / "tensorboard") if e.session_log.status]
    off = tiny(train=dict(steps=4, tensorboard=False))
    metrics.Metrics(off, tmp_path.parent, 0, Console(file=io.StringIO())).close()
    assert not (tmp_path.parent / "tensorboard").exists()
