"""The logs of a run: metrics.jsonl (the source of truth), TensorBoard events, and a progress bar or plain lines.

Each line of metrics.jsonl is one record with a `kind`:
  start    {step, device, jax, time}                       written at every (re)start
  train    {step, tokens, loss, lr, ...the step's metrics, tokens_per_s, mfu, watts, kwh, time}
  eval     {step, nll (nats per token), bpb (bits per byte), tokens, bytes, time}
  core     {step, core, tasks {label: centred accuracy}, examples, time}
  sample   {step, text}
  init, rounding, extended   {step, what resume.py says of a run that began or went on otherwise}
`step` counts finished updates. mfu is nanochat's FLOPs per token times tokens/s over the card's dense bf16 peak, whatever
the dtype of compute; null on an unknown device. watts (mean since the last reading) and kwh (of the whole run) are null
without an NVIDIA driver.
"""

import collections
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from nanojax import cli, files, hardware
from nanojax.cli import UserError, duration, short
from nanojax.config import Config

FILE = "metrics.jsonl"
LINE_SECONDS = 10.0  # without a terminal, at most one line per this many seconds
POWER_SECONDS = 10.0  # between readings: without NVML's Python module, nvidia-smi takes 50 ms
WINDOW = 20  # log lines over which tokens/s and ETA are averaged


def read(run: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl, of one kind if given. A last line cut off by a crash is left out."""
    path = Path(run) / FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if kind in (None, record["kind"]):
            records.append(record)
    return records


def forget_after(run: Path, step: int) -> None:
    """Drops the records of steps after `step`; a resumed run writes them again."""
    if not (run / FILE).exists():
        return
    kept = "".join(json.dumps(r) + "\n" for r in read(run) if r["step"] <= step)
    with files.write_atomic(run / FILE) as file:
        file.write(kept.encode())


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOPs per second of the device with this driver name; None if hardware.py does not know it."""
    try:
        return hardware.find_card(device_kind).peak("bf16")
    except UserError:
        return None


class Metrics:
    """The open logs of a run. `step` is the restored step; records of later steps are dropped first."""

    def __init__(self, config: Config, run: Path, step: int, console: Console | None = None):
        self.config = config
        device = jax.devices()[0]
        self.peak = peak_flops(device.device_kind)
        forget_after(run, step)
        earlier = [r["kwh"] for r in read(run, "train") if r.get("kwh")]
        self.kwh = earlier[-1] if earlier else 0.0
        self.power = hardware.PowerMeter()
        self.power_read = time.monotonic()
        try:
            self.file = open(run / FILE, "a", buffering=1)  # noqa: SIM115  closed by close()
            folder = str(run / "tensorboard")
            self.board = SummaryWriter(folder, purge_step=step + 1) if config.train.tensorboard else None
        except OSError as error:
            raise UserError(f"{run}: cannot write there ({error.strerror}); choose another --train.run") from None
        self.console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not cli.live(self.console),
        )
        self.task = self.bar.add_task("", total=config.train.steps, completed=step, text="")
        self.bar.start()
        self.bpb: float | None = None
        self.line_time = -math.inf
        self._write({"kind": "start", "step": step, "device": device.device_kind, "jax": jax.__version__})
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Excludes the time since the last record (evaluation, saving) from tokens/s. The device must be idle."""
        self.marks = collections.deque([(time.monotonic(), step)], maxlen=WINDOW + 1)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Logs a finished step's metrics every train.log_every steps; other steps only move the bar."""
        if step % self.config.train.log_every and step != self.config.train.steps:
            self.bar.update(self.task, completed=step)
            return
        self.marks.append((time.monotonic(), step))
        (begin, first), (end, last) = self.marks[0], self.marks[-1]
        per_step = (end - begin) / max(1, last - first)
        rate = self.config.train.tokens_per_step / max(per_step, 1e-9)
        mfu = rate * self.config.model.flops_per_token / self.peak if self.peak else None
        if self.power.available and end - self.power_read > POWER_SECONDS:
            before, self.power_read = self.power.joules, end
            self.power.update()
            self.kwh += (self.power.joules - before) / 3.6e6
        watts, kwh = (self.power.watts, self.kwh) if self.power.available else (None, None)
        speed = {"tokens_per_s": rate, "mfu": mfu, "watts": watts, "kwh": kwh}
        tokens = step * self.config.train.tokens_per_step
        self._write({"kind": "train", "step": step, "tokens": tokens, **values, **speed})
        for name, value in {**values, **speed}.items():
            if self.board and value is not None:
                self.board.add_scalar(f"train/{name}", value, step)
        text = [f"loss {values['loss']:.4f}", f"{short(rate)} tok/s", f"MFU {mfu:.1%}" if mfu else "MFU n/a"]
        if self.bpb is not None:
            text.insert(1, f"bpb {self.bpb:.4f}")
        if watts is not None:
            text.append(f"{watts:.0f} W")
        text.append(f"ETA {duration((self.config.train.steps - step) * per_step)}")
        self.bar.update(self.task, completed=step, text=" · ".join(text))
        if not cli.live(self.console) and (end - self.line_time > LINE_SECONDS or step == self.config.train.steps):
            self.line_time = end
            self.console.print(f"step {step}/{self.config.train.steps} · {' · '.join(text)}")

    def evaluation(self, step: int, scores: dict[str, float], text: str | None) -> None:
        """Logs bits per byte and, if there is one, the sample text."""
        self.bpb = scores["bpb"]
        self._write({"kind": "eval", "step": step, **scores})
        line = f"step {step} · validation {scores['bpb']:.4f} bits/byte, {scores['nll']:.4f} nats/token"
        self.say(line + (f" · {text!r}" if text else ""))
        if text:
            self._write({"kind": "sample", "step": step, "text": text})
        if self.board:
            self.board.add_scalar("eval/bpb", scores["bpb"], step)
            self.board.add_scalar("eval/nll", scores["nll"], step)
            if text:
                self.board.add_text("sample", text, step)

    def core(self, step: int, core: float, tasks: dict[str, float], examples: int) -> None:
        """Logs CORE and its tasks' centred accuracies."""
        self._write({"kind": "core", "step": step, "core": core, "tasks": tasks, "examples": examples})
        self.say(f"step {step} · CORE {core:.4f} over {len(tasks)} tasks, {examples:,} examples")
        if self.board:
            for name, value in {"CORE": core, **tasks}.items():
                self.board.add_scalar(f"core/{name}", value, step)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self.console.print(text)

    def flush(self) -> None:
        """Writes the log to the disk. Called before each checkpoint, so that no restored step is missing from the log."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Stops the bar and closes the files."""
        self.bar.stop()
        self.flush()
        self.file.close()
        if self.board:
            self.board.close()

    def record(self, record: dict[str, Any]) -> None:
        """Writes a record of its own kind and step."""
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
