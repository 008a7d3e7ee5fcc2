"""The watch over a run: a step that does not return for train.stall_minutes is reported and ends the process."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from nanojax import hardware
from nanojax.run import exits
from nanojax.run.output import last_words

REPORT = "stalled.txt"
TICK = 1.0  # seconds
STARTING_MINUTES = 60.0  # allowed at least until the loop begins: compilation with autotuning, reading a checkpoint
GPU_SECONDS = 15.0  # a GPU that hangs does not answer its driver either


class Watch:
    """Counts the seconds since the last `beat`. Its own ticks are the clock: while the process or the machine sleeps, and
    when somebody sets the time, nothing passes.
    """

    def __init__(self, run: Path, minutes: float):
        self.run, self.minutes = run, minutes
        self.step: int | None = None  # None until the loop begins
        self.ticks = 0
        self.ended = threading.Event()

    def beat(self, step: int | None = None) -> None:
        """The loop is alive; with `step`, that step is done."""
        self.step = self.step if step is None else step
        self.ticks = 0

    def stand(self) -> None:
        """The thread: ends the process when too many ticks pass without a beat."""
        while not self.ended.wait(TICK):
            self.ticks += 1
            allowed = self.minutes if self.step is not None else max(self.minutes, STARTING_MINUTES)
            if self.ticks * TICK > allowed * 60:
                report(self.run, self.step, allowed)
                os._exit(exits.STALLED)


@contextlib.contextmanager
def standing(run: Path, minutes: float) -> Iterator[Watch]:
    """A Watch until the block ends; with 0 minutes one that never acts."""
    watch = Watch(run, minutes)
    thread = threading.Thread(target=watch.stand, daemon=True, name="watch")
    if minutes:
        thread.start()
    try:
        yield watch
    finally:
        watch.ended.set()
        if minutes:
            thread.join()


def report(run: Path, step: int | None, minutes: float) -> None:
    """Writes RUN/stalled.txt: when, after which step, what the GPU says, where every thread is; a line on stderr."""
    where = "before the first step" if step is None else f"after step {step}"
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: nothing has happened for {minutes:g} minutes {where}"
    gpu: list[str] = []
    asking = threading.Thread(target=lambda: gpu.append(_gpu()), daemon=True)
    asking.start()
    asking.join(GPU_SECONDS)
    with contextlib.suppress(OSError), open(run / REPORT, "w", encoding="utf-8") as file:
        file.write(f"{head}\n{gpu[0] if gpu else f'the GPU did not answer for {GPU_SECONDS:.0f} s'}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    last_words(f"error: {head}; {run / REPORT} has the stack of all threads; the same command resumes")


def _gpu() -> str:
    reading = hardware.read_gpu()
    if reading is None:
        return "no NVIDIA GPU"
    gib = 2**30
    power = "unknown" if reading.watts is None else f"{reading.watts:.0f}"
    used = (reading.memory_total - reading.memory_free) / gib
    return f"{reading.name}: {power} W, {used:.1f} of {reading.memory_total / gib:.1f} GiB used"
