"""The logs of a run: metrics.jsonl, TensorBoard events, and a progress bar or plain lines. None of them can end the run.

Each line of metrics.jsonl is one record with a `kind`:
  start    {step, device, jax, command, time}              written at every (re)start
  train    {step, tokens, loss, lr, ...the step's metrics, tokens_per_s, mfu, watts, kwh, time}
  eval     {step, nll (nats per token), bpb (bits per byte), tokens, bytes, time}; of rollouts {step, accuracy (greedy, with low
           and high of its 95% interval), questions, pass_1, pass_2, ..., length, unfinished, time}
  core     {step, core, tasks {label: centred accuracy}, examples, time}
  sample   {step, text}
  init, rounding, extended   {step, what resume.py says of a run that began or went on otherwise}
  card     {step, choices, lines}                          on a GPU: what was chosen for it, and why
  warning  {step, about, text}                             the first trouble of its kind since the start
  end      {step, code (exits.py), text}                   unless the process was killed
`step` counts finished updates. mfu is nanochat's FLOPs per token times tokens/s over the card's dense bf16 peak, whatever
the dtype of compute; null on an unknown device. watts (mean since the last reading) and kwh (of the whole run) are null
without an NVIDIA driver. After a warning, train records have `warnings`, how often each kind came since the start.
"""

import collections
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nanojax import cli, hardware
from nanojax.cli import UserError, duration, first_line, short
from nanojax.config import Config
from nanojax.run.output import Output
from nanojax.run.records import FILE, Appender, forget_after, read
from nanojax.run.tensorboard import Board

LINE_SECONDS = 10.0  # without a terminal, at most one line per this many seconds
POWER_SECONDS = 10.0  # between readings: without NVML's Python module, nvidia-smi takes 50 ms
WINDOW = 20  # log lines over which tokens/s and ETA are averaged


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOPs per second of the device with this driver name; None if hardware.py does not know it."""
    try:
        return hardware.find_card(device_kind).peak("bf16")
    except UserError:
        return None


def measured(records: list[dict[str, Any]]) -> set[tuple[str, int]]:
    """("eval" or "core", step) of every measurement in `records`."""
    return {(r["kind"], r["step"]) for r in records if r["kind"] in ("eval", "core")}


class Metrics:
    """The open logs of a run. `step` is the restored step; records of later steps are dropped first."""

    def __init__(self, config: Config, run: Path, step: int, console: Console | None = None):
        self.config, self.step = config, step
        self.warnings: dict[str, int] = {}
        self.outputs = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Output)]
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind)
        self.peak = peak * config.devices if peak else None
        try:
            forget_after(run, step)
            earlier = read(run)
            self.file = Appender(run)
        except OSError as error:
            raise UserError(f"{run / FILE}: cannot be written ({error.strerror}); choose another --train.run") from None
        self.recorded = measured(earlier)
        self.kwh = next((r["kwh"] for r in reversed(earlier) if r.get("kwh")), 0.0)
        self.power = hardware.PowerMeter()
        self.power_read = time.monotonic()
        self.board: Board | None = None
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
        self.measured: list[str] = []  # the last evaluation's figure, as the progress shows it
        self.line_time = -math.inf
        started = {"device": device.device_kind, "jax": jax.__version__, "command": cli.command()}
        several = {"devices": config.devices} if config.several else {}
        several |= {"processes": config.parallel.processes} if config.parallel.processes > 1 else {}
        self._write({"kind": "start", "step": step, **started, **several})
        if config.train.tensorboard:
            try:
                self.board = Board(run / "tensorboard", purge_step=step + 1)
            except OSError as error:
                self.warn("tensorboard", f"{run / 'tensorboard'}: cannot be written ({error.strerror})")
        self.restart_clock(step)

    def warn(self, about: str, text: str) -> None:
        """Counts a trouble that the run survives. The first of its kind is printed and recorded."""
        self.warnings[about] = self.warnings.get(about, 0) + 1
        if self.warnings[about] == 1:
            print(f"warning: {text}", file=sys.stderr)
            self._write({"kind": "warning", "step": self.step, "about": about, "text": text})

    def restart_clock(self, step: int) -> None:
        """Excludes the time since the last record (evaluation, saving) from tokens/s. The device must be idle."""
        self.marks = collections.deque([(time.monotonic(), step)], maxlen=WINDOW + 1)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Logs a finished step's metrics every train.log_every steps; other steps only move the bar."""
        self.step = step
        if step % self.config.train.log_every and step != self.config.train.steps:
            self.bar.update(self.task, completed=step)
            return
        self.marks.append((time.monotonic(), step))
        (begin, first), (end, last) = self.marks[0], self.marks[-1]
        per_step = (end - begin) / max(1, last - first)
        rate = self.config.train.tokens_per_step / max(per_step, 1e-9)
        mfu = rate * self.config.model.flops_per_token / self.peak if self.peak else None
        watts, kwh = self._energy(end)
        speed = {"tokens_per_s": rate, "mfu": mfu, "watts": watts, "kwh": kwh}
        tokens = step * self.config.train.tokens_per_step
        self._count_lost_output()
        warnings = {"warnings": dict(self.warnings)} if self.warnings else {}
        self._write({"kind": "train", "step": step, "tokens": tokens, **values, **speed, **warnings})
        for name, value in {**values, **speed}.items():
            self._scalar(f"train/{name}", value, step)
        learnt = f"reward {values['reward']:.3f}" if "reward" in values else f"loss {values['loss']:.4f}"
        text = [learnt, *self.measured, f"{short(rate)} tok/s", f"MFU {mfu:.1%}" if mfu else "MFU n/a"]
        if watts is not None:
            text.append(f"{watts:.0f} W")
        text.append(f"ETA {duration((self.config.train.steps - step) * per_step)}")
        self.bar.update(self.task, completed=step, text=" · ".join(text))
        if not cli.live(self.console) and (end - self.line_time > LINE_SECONDS or step == self.config.train.steps):
            self.line_time = end
            self.console.print(f"step {step}/{self.config.train.steps} · {' · '.join(text)}")

    def evaluation(self, step: int, scores: dict[str, float], text: str | None) -> None:
        """Logs scores of what is held out and, if there is one, the sample text."""
        self.recorded.add(("eval", step))
        sampled = [{"kind": "sample", "step": step, "text": text}] if text else []
        self._write({"kind": "eval", "step": step, **scores}, *sampled)
        if "bpb" in scores:
            self.measured = [f"bpb {scores['bpb']:.4f}"]
            said = f"validation {scores['bpb']:.4f} bits/byte, {scores['nll']:.4f} nats/token"
            shown = ("bpb", "nll")
        else:
            self.measured = [f"accuracy {scores['accuracy']:.1%}"]
            said = f"held out: {scores['accuracy']:.1%} right ({scores['low']:.1%} to {scores['high']:.1%})"
            said += "".join(f", {key.replace('_', '@')} {value:.1%}" for key, value in scores.items() if "pass_" in key)
            shown = tuple(scores)
        self.say(f"step {step} · {said}" + (f" · {text!r}" if text else ""))
        for name in shown:
            self._scalar(f"eval/{name}", scores[name], step)
        if text and self.board:
            self._board_failed(self.board.text("sample", text, step))

    def core(self, step: int, core: float, tasks: dict[str, float], examples: int) -> None:
        """Logs CORE and its tasks' centred accuracies."""
        self.recorded.add(("core", step))
        self._write({"kind": "core", "step": step, "core": core, "tasks": tasks, "examples": examples})
        self.say(f"step {step} · CORE {core:.4f} over {len(tasks)} tasks, {examples:,} examples")
        for name, value in {"CORE": core, **tasks}.items():
            self._scalar(f"core/{name}", value, step)

    def end(self, code: int, text: str) -> None:
        """Logs how the process ends."""
        self._count_lost_output()
        counted = {"warnings": dict(self.warnings)} if self.warnings else {}
        self._write({"kind": "end", "step": self.step, "code": code, "text": text, **counted})

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self.console.print(text)

    def flush(self) -> None:
        """Writes the log to the disk. Called before each checkpoint, so that no restored step is missing from the log."""
        self._file_failed(self.file.sync())

    def close(self) -> None:
        """Stops the bar and closes the files."""
        self.bar.stop()
        self.file.close()
        if self.board:
            self.board.close()

    def record(self, record: dict[str, Any]) -> None:
        """Writes a record of its own kind and step."""
        self._write(record)

    def _write(self, *records: dict[str, Any]) -> None:
        self._file_failed(self.file.write(*({**record, "time": round(time.time(), 3)} for record in records)))

    def _file_failed(self, error: OSError | None) -> None:
        if error:
            self.warn(FILE, f"{self.file.path}: cannot be written ({error.strerror}); its records wait in memory")

    def _scalar(self, name: str, value: float | None, step: int) -> None:
        if self.board and value is not None:
            self._board_failed(self.board.scalar(name, value, step))

    def _board_failed(self, error: OSError | None) -> None:
        if error:
            self.warn("tensorboard", f"TensorBoard's events cannot be written ({error.strerror}) and are left out")

    def _count_lost_output(self) -> None:
        lost = sum(output.lost for output in self.outputs)
        if lost:
            reason = next(output.reason for output in self.outputs if output.lost)
            if "output" not in self.warnings:
                self.warn("output", f"output is lost ({reason}); the run goes on without it")
            self.warnings["output"] = lost

    def _energy(self, now: float) -> tuple[float | None, float | None]:
        """(watts, kWh of the run so far), read anew every POWER_SECONDS; None, None where nothing tells."""
        if not self.power.available:
            return None, None
        if now - self.power_read > POWER_SECONDS:
            before, self.power_read = self.power.joules, now
            try:
                self.power.update()
            except Exception as error:  # a driver's module may raise anything
                self.warn("power", f"the GPU's power cannot be read ({first_line(error)})")
            self.kwh += (self.power.joules - before) / 3.6e6
        return self.power.watts, self.kwh
